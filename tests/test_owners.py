"""Param groups that others change: what is in them when a step begins is trained, by its own group's options.

Beside torch.optim, to which the same is done: it looks into its groups and its state in every step.
"""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from twins import BASES, KINDS, assert_alike, copies, ours, plain, step

from bsam_fused.ops import dispatch

pytestmark = pytest.mark.part(3)

every_kind = pytest.mark.parametrize("kind", KINDS)
every_base = pytest.mark.parametrize("base", BASES)


def made(*shape):
    return nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape))


def start(base, backend, kind="SAM"):
    """Two groups of two and a frozen parameter, of ours and of torch's, all with state but the frozen one."""
    params = [made(4, 3), made(4, 3), made(2), made(4, 3), made(5)]
    params[2].requires_grad_(False)
    others = copies(params)
    second = BASES[base][2]
    optimizer = ours(kind, base, [{"params": params[:3]}, {"params": params[3:], **second}], backend)
    twin = plain(base, [{"params": others[:3]}, {"params": others[3:], **second}])
    for t in range(2):
        step(optimizer, t)
        step(twin, t)
    return optimizer, params, twin, others


# Each takes an optimizer and all parameters that were ever in it, and adds those that are new.


def replaced(optimizer, params):
    params.append(made(4, 3))
    optimizer.param_groups[0]["params"][0] = params[-1]


def replaced_by_another_shape(optimizer, params):
    params.append(made(7))
    optimizer.param_groups[1]["params"][0] = params[-1]


def exchanged_between_groups(optimizer, params):
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]


def exchanged_within_a_group(optimizer, params):
    group = optimizer.param_groups[1]["params"]
    group.reverse()


def removed_and_another_appended(optimizer, params):
    group = optimizer.param_groups[0]["params"]
    del group[0]
    params.append(made(4, 3))
    group.append(params[-1])


def all_in_a_new_list(optimizer, params):
    params.append(made(6))
    group = optimizer.param_groups[0]
    group["params"] = [params[-1], *group["params"][1:]]


def moved_to_the_other_group(optimizer, params):
    first, second = (group["params"] for group in optimizer.param_groups)
    second.append(first.pop(0))


def groups_exchanged(optimizer, params):
    optimizer.param_groups.reverse()


def removed(optimizer, params):
    del optimizer.param_groups[1]["params"][0]


def frozen_replaced_by_one_that_trains(optimizer, params):
    params.append(made(2))
    optimizer.param_groups[0]["params"][2] = params[-1]


def replaced_by_a_frozen_one(optimizer, params):
    params.append(made(4, 3).requires_grad_(False))
    optimizer.param_groups[0]["params"][1] = params[-1]


def frozen_replaced_by_a_frozen_one_and_thawed(optimizer, params):
    params.append(made(2).requires_grad_(False))
    optimizer.param_groups[0]["params"][2] = params[-1]
    params[-1].requires_grad_(True)


def replaced_with_its_state(optimizer, params, change):
    """As Gaussian splatting densifies and prunes: the new parameter takes the entry, its tensors changed likewise."""
    group = optimizer.param_groups[0]
    old = group["params"][0]
    entry = optimizer.state.pop(old)
    new = nn.Parameter(change(old.detach(), old.detach()[:2]))
    for key, value in entry.items():
        if value.shape == old.shape:
            entry[key] = change(value, torch.zeros_like(value[:2]))
    group["params"][0] = new
    optimizer.state[new] = entry
    params.append(new)


def grown(optimizer, params):
    replaced_with_its_state(optimizer, params, lambda x, more: torch.cat([x, more]))


def pruned(optimizer, params):
    replaced_with_its_state(optimizer, params, lambda x, _: x[torch.tensor([True, False, True, True])])


def reset_with_its_state(optimizer, params):
    """As it resets opacities: other values, state of zeros, the same shape and count."""
    replaced_with_its_state(optimizer, params, lambda x, _: torch.zeros_like(x))


def grown_and_pruned(optimizer, params):
    """Within one step of the loop, back to the shape of before."""
    grown(optimizer, params)
    replaced_with_its_state(optimizer, params, lambda x, _: x[2:])


EDITS = {
    edit.__name__: edit
    for edit in (
        *(replaced, replaced_by_another_shape, exchanged_between_groups, exchanged_within_a_group, removed),
        *(removed_and_another_appended, all_in_a_new_list, moved_to_the_other_group, groups_exchanged),
        *(frozen_replaced_by_one_that_trains, replaced_by_a_frozen_one, frozen_replaced_by_a_frozen_one_and_thawed),
        *(grown, pruned, reset_with_its_state, grown_and_pruned),
    )
}


def plain_step(optimizer):
    """One while active is False, which torch's takes, too."""
    if hasattr(optimizer, "active"):
        optimizer.active = False
    step(optimizer, 9)
    if hasattr(optimizer, "active"):
        optimizer.active = True


def saved(optimizer):
    """The keys of a saved state; none where torch refuses: of a parameter that is in no group any more."""
    try:
        return optimizer.state_dict()["state"].keys()
    except KeyError:
        return None


BETWEEN = {
    "nothing": lambda optimizer: None,
    "state_dict": saved,
    "deepcopy": lambda optimizer: copy.deepcopy(optimizer),
    "a plain step": plain_step,
}
whatever_comes_between = pytest.mark.parametrize("between", BETWEEN)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@every_base
@whatever_comes_between
@pytest.mark.parametrize("edit", EDITS)
def test_groups_are_edited(backend, base, between, edit):
    optimizer, params, twin, others = start(base, backend)
    for which, theirs in ((optimizer, params), (twin, others)):
        EDITS[edit](which, theirs)
        BETWEEN[between](which)
    assert_alike(optimizer, params, twin, others)
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)
    assert saved(twin) in (None, saved(optimizer))


@every_base
@pytest.mark.parametrize("edit", ["replaced", "exchanged_between_groups", "grown"])
def test_groups_are_edited_under_bsam(backend, base, edit):
    optimizer, params, twin, others = start(base, backend, "BSAM")
    for which, theirs in ((optimizer, params), (twin, others)):
        EDITS[edit](which, theirs)
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)


@every_base
def test_a_copy_trains_what_its_groups_hold(backend, base):
    optimizer, params, twin, others = start(base, backend)
    for which, theirs in ((optimizer, params), (twin, others)):
        grown(which, theirs)
        replaced_by_another_shape(which, theirs)
    optimizer, params = copy.deepcopy((optimizer, params))
    twin, others = copy.deepcopy((twin, others))
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
    assert_alike(optimizer, params, twin, others)


def test_edited_again_and_again(backend):
    """A parameter replaced before every step lives as long as it is in the groups: identity by address would err."""
    optimizer, _, twin, _ = start("SGD", backend)
    for t in range(2, 12):
        for which in (optimizer, twin):
            group = which.param_groups[0]["params"]
            which.state.pop(group[0], None)
            group[0] = made(4, 3)
        step(optimizer, t)
        step(twin, t)
        mine, theirs = (which.param_groups[0]["params"][0] for which in (optimizer, twin))
        assert_alike(optimizer, [mine], twin, [theirs])


def test_replaced_within_a_step(backend):
    """Raises, or leaves the new one alone until the next step; what was perturbed comes back exactly."""
    p, q = made(5), made(5)
    optimizer = ours("SAM", "SGD", [p], backend, rho=0.5)
    w = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.ascend()
    optimizer.param_groups[0]["params"][0] = q
    optimizer.restore()
    assert torch.equal(p, w)
    assert torch.equal(q, w)
    for call in optimizer._calls:
        q.grad = torch.ones_like(q)
        getattr(optimizer, call)()
    torch.testing.assert_close(q.detach(), w - 0.1)
    assert torch.equal(p, w)


# ---- what begins


def sharing_memory():
    p, q = made(6), made(6)
    q.data = p.data
    return [p, q], ValueError, lambda: setattr(q, "data", p.detach().clone())


def gradient_of_another_shape():
    p, q = made(6), made(6)
    q.grad = torch.ones_like(q)
    q.grad.data = torch.ones(7, dtype=torch.float64)
    return [p, q], RuntimeError, lambda: setattr(q, "grad", None)


def sparse_gradient():
    p, q = made(6), made(6)
    q.grad = torch.ones(6, dtype=torch.float64).to_sparse()
    return [p, q], RuntimeError, lambda: setattr(q, "grad", None)


@every_kind
@every_base
@pytest.mark.parametrize("fault", [sharing_memory, gradient_of_another_shape, sparse_gradient])
def test_a_first_step_that_fails(backend, kind, base, fault):
    params, error, mend = fault()
    before = [p.detach().clone() for p in params]
    optimizer = ours(kind, base, params, backend)
    params[0].grad = torch.ones_like(params[0])
    for _ in range(2):
        with pytest.raises(error, match="parameter 1 of group 0"):
            optimizer.ascend()
        assert all(torch.equal(p, w) for p, w in zip(params, before))
    mend()
    others = copies(params)
    twin = plain(base, others)
    for t in range(3):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)


@every_kind
@every_base
def test_a_lazy_layer_before_its_first_input(backend, kind, base):
    net = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)).double()
    optimizer = ours(kind, base, net.parameters(), backend)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    with pytest.raises(RuntimeError, match=r"parameter 2 of group 0.*run a forward pass"):
        optimizer.ascend()
    net(torch.ones(5, 3, dtype=torch.float64))
    params = list(net.parameters())
    others = copies(params)
    twin = plain(base, others)
    for t in range(3):
        step(optimizer, t)
        step(twin, t)
        assert_alike(optimizer, params, twin, others)


@every_kind
def test_a_build_that_fails_half_way(backend, kind, monkeypatch):
    """There is memory for one dtype's buffers, and in the first attempt none for the other's."""
    params = [made(5), nn.Parameter(torch.ones(5))]
    others = copies(params)
    optimizer, twin = ours(kind, "SGD", params, backend), plain("SGD", others)
    build = dispatch._FACTORIES[backend]

    def failing(given, *args):
        if given[0].dtype is torch.float32:
            raise torch.OutOfMemoryError
        return build(given, *args)

    with monkeypatch.context() as patch:
        patch.setitem(dispatch._FACTORIES, backend, failing)
        with pytest.raises(torch.OutOfMemoryError):
            step(optimizer, 0)
    for t in range(3):
        step(optimizer, t)
        step(twin, t)
    for p, q in zip(params, others):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"])


# ---- what moves


@pytest.fixture(params=[False, True], ids=["data is set", "tensors are swapped"])
def swapping(request):
    """How torch's modules move: `torch.__future__.set_swap_module_params_on_conversion`."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


MOVES = {"double": {"dtype": torch.float64}, "channels_last": {"memory_format": torch.channels_last}}


def convolution():
    net = nn.Conv2d(3, 4, 2)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
    return net


@every_kind
@pytest.mark.parametrize(("base", "move"), [*product(["SGD", "Adam"], MOVES), ("unfused", "channels_last")])
@pytest.mark.parametrize("grads", ["with gradients", "without"])
@pytest.mark.usefixtures("swapping")
def test_a_model_moved_at_rest_goes_on_with_its_state(backend, kind, base, move, grads):
    net, other = convolution(), convolution().double()
    optimizer, twin = ours(kind, base, net.parameters(), backend), plain(base, other.parameters())
    for t in range(2):
        step(optimizer, t)
        step(twin, t)
    if grads == "without":
        optimizer.zero_grad()
    net.to(**MOVES[move])
    assert next(net.parameters()) is optimizer.param_groups[0]["params"][0]
    for t in range(2, 4):
        step(optimizer, t)
        step(twin, t)
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)
        for key, value in twin.state[q].items():
            held = optimizer.state[p][key]
            torch.testing.assert_close(held.to(value.dtype), value, rtol=1e-5, atol=1e-5)
            fused = base != "unfused" and key != "step"
            assert not fused or (held.dtype, held.stride()) == (p.dtype, p.stride())


@every_kind
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.usefixtures("swapping")
def test_a_model_moved_within_a_step_comes_back_exactly(backend, kind, move):
    net = convolution()
    w = [p.detach().clone() for p in net.parameters()]
    radii = dict.fromkeys(KINDS[kind][1], 0.7)
    optimizer = ours(kind, "SGD", net.parameters(), backend, **radii)
    for call in optimizer._calls[:-1]:
        net(torch.ones(1, 3, 4, 4)).square().sum().backward()
        getattr(optimizer, call)()
    net.to(**MOVES[move])
    with optimizer.unperturbed():
        assert all(torch.equal(p, x.to(p.dtype)) for p, x in zip(net.parameters(), w))
    assert not torch.equal(net.weight.float(), w[0])
    optimizer.restore()
    assert all(torch.equal(p, x.to(p.dtype)) for p, x in zip(net.parameters(), w))
