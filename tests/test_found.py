"""What `make fuzz` and attacks on the package once found, each in the shortest sequence that shows it."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import bsam_fused

SAM, BSAM = bsam_fused.SAM, bsam_fused.BSAM


def parameter(value=1.0, n=2):
    return nn.Parameter(torch.full((n,), value))


def whole_step(opt, value=1.0):
    for call in opt._calls:
        backward(opt, value)
        getattr(opt, call)()


def backward(opt, value=1.0):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)


@pytest.mark.parametrize("through", ["optimizer", "base_optimizer"])
def test_a_radius_outlives_a_load_and_a_group_that_follow_each_other(through):
    """Noticed together: options were taken over by index only where the number of groups had stayed."""
    opt = SAM([{"params": [parameter()], "rho": 0.25}], lr=0.1)
    plain = torch.optim.SGD([parameter()], lr=0.3)
    opt.base_optimizer.load_state_dict(plain.state_dict())
    owner = opt if through == "optimizer" else opt.base_optimizer
    owner.add_param_group({"params": [parameter()], "lr": 0.3})
    whole_step(opt)
    assert [group["rho"] for group in opt.param_groups] == [0.25, 0.05]


def test_thawed_after_the_descent(backend):
    """It takes part from the third pass on: g and g_max are zero there, so d = −c g_min."""
    p, q = parameter(), parameter()
    q.requires_grad_(False)
    opt = BSAM([p, q], lr=0.1, rho=0.0, backend=backend)
    for call in opt._calls:
        if call == "step":
            q.requires_grad_(True)
            q.grad = torch.full_like(q, 1.0)
        p.grad = torch.full_like(p, 1.0)
        getattr(opt, call)()
    c = math.sqrt(2) / math.sqrt(4)
    torch.testing.assert_close(p.detach(), torch.full((2,), 1 - 0.1 * (2 - c)))
    torch.testing.assert_close(q.detach(), torch.full((2,), 1 + 0.1 * c))


def test_a_plain_step_that_ends_half_way(backend, monkeypatch):
    """The FlatParams were within a step for good, and every later one raised."""
    opt = SAM([parameter()], lr=0.1, backend=backend)
    opt.active = False
    backward(opt)
    with monkeypatch.context() as patch:
        patch.setattr(opt._flats.__class__, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    opt.step()
    torch.testing.assert_close(opt.param_groups[0]["params"][0].detach(), torch.full((2,), 0.9))


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_skipped_step_leaves_an_entry_that_lacks_a_key(backend):
    """The step would have begun it anew; as it was skipped, the user's other keys stay."""
    opt = SAM([parameter()], torch.optim.Adam, lr=0.1, backend=backend)
    whole_step(opt)
    (p,) = opt.param_groups[0]["params"]
    del opt.state[p]["exp_avg"]
    left = copy.deepcopy(opt.state[p])
    whole_step(opt, math.nan)
    saved = opt.state_dict()["state"][0]
    assert saved.keys() == left.keys()
    assert all(torch.equal(torch.as_tensor(saved[key]), left[key]) for key in left)


def test_laid_out_anew_under_a_zero_gradient_without_memory(backend):
    """Torch's own zeros have no address; that was taken for memory that was freed, before the layout was looked at."""
    p = nn.Parameter(torch.ones(2, 3))
    opt = SAM([p], lr=0.1, backend=backend)
    whole_step(opt)
    before = p.detach().clone()
    p.data = p.data.t().contiguous().t()
    for call in opt._calls:
        p.grad = torch._efficientzerotensor((2, 3), device=p.device)
        getattr(opt, call)()
    assert torch.equal(p, before)


def test_autograd_records_after_two_dtypes_were_updated_together(backend):
    """Guards that were let go of in the order in which they were taken left it off."""
    opt = SAM([parameter(), nn.Parameter(torch.ones(2, dtype=torch.float64))], lr=0.1, backend=backend)
    whole_step(opt)
    assert torch.is_grad_enabled()
    assert len(list(opt._flats)) == 2


def test_the_last_gradient_lies_in_the_weights_of_an_unfused_base(backend):
    """d is what it was at w_max, and not the w that is put back into the same memory."""
    p = parameter(1.0)
    opt = SAM([p], torch.optim.RMSprop, lr=0.0, rho=1.0, backend=backend)
    backward(opt)
    opt.ascend()
    moved = p.detach().clone()
    p.grad = p.detach()
    opt.step()
    torch.testing.assert_close(opt.state[p]["square_avg"], 0.01 * moved.square())


@pytest.mark.parametrize("kind", [SAM, BSAM])
@pytest.mark.parametrize("perturb", [True, False])
def test_written_within_a_step_whose_last_pass_has_no_gradient(backend, perturb, kind):
    """The second one has gaps, and was worked on in a copy that was made when it last had a gradient."""
    params = parameter(n=3), nn.Parameter(torch.ones(6)[::2])
    opt = kind([{"params": params, "perturb": perturb}], lr=0.1, backend=backend)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.ascend()
    with opt.unperturbed(), torch.no_grad():
        for p in params:
            p.fill_(5.0)
    for call in opt._calls[1:]:
        params[0].grad = torch.ones(3)
        getattr(opt, call)()
    assert torch.equal(params[1], torch.full((3,), 5.0))


def test_state_of_what_is_in_no_group_is_packed_beside(backend):
    """The state dict leaves it out without touching the state, whatever interrupts."""
    opt = SAM([parameter()], lr=0.1, momentum=0.9, backend=backend)
    whole_step(opt)
    opt.param_groups[0]["params"][0] = parameter()
    state, entries = opt.state, dict(opt.state)
    assert opt.state_dict()["state"] == {}
    assert opt.state is state
    assert all(opt.state[p] is entry for p, entry in entries.items())


def test_a_load_into_the_base_within_a_step_keeps_w(backend):
    """What counts the steps of stochastic rounding came with it, and all FlatParams, with w in them, were let go of."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    opt = SAM([p], lr=0.1, momentum=0.9, rho=0.5, backend=backend)
    whole_step(opt)
    saved, w = copy.deepcopy(opt.state_dict()), p.detach().clone()
    backward(opt)
    opt.ascend()
    opt.base_optimizer.load_state_dict(saved)
    opt.restore()
    assert torch.equal(p, w)
    whole_step(opt)
    assert opt.state_dict()["param_groups"][0]["rounded_steps"] == 2


def test_a_base_that_is_refused_is_left_as_it_was():
    p = parameter()
    base = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones_like(p)
    base.step()
    groups, state, momentum = base.param_groups, base.state, base.state[p]["momentum_buffer"]
    with pytest.raises(ValueError, match="rho=-1"):
        SAM([p], base, rho=-1.0)
    assert base.param_groups is groups
    assert groups[0]["params"] == [p]
    assert base.state is state
    assert base.state[p]["momentum_buffer"] is momentum
    assert SAM([p], base).param_groups is groups


def test_an_owner_of_the_gradients_storage_has_it_to_himself(backend):
    """A storage that Python holds without a tensor, and a weak reference, raise none of the tensor's counts."""
    for hold in (lambda t: t.untyped_storage(), weakref.ref):
        p = nn.Parameter(torch.zeros(5000))
        opt = BSAM([p], lr=1.0, rho=0.0, backend=backend)
        p.grad = torch.ones(5000)
        held = hold(p.grad)
        opt.ascend()
        for call, value in (("descend", 10.0), ("step", 100.0)):
            p.grad = torch.full((5000,), value)
            getattr(opt, call)()
        if not isinstance(held, weakref.ref):
            assert torch.empty(0).set_(held, 0, (5000,)).eq(1).all()
        assert p[0].item() == pytest.approx(-1.0)


def test_a_radius_that_is_set_right_after_a_refusal_stays(backend):
    """A param group that was loaded into the base is completed, and refused; then another is loaded in its place."""
    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], torch.optim.SGD, lr=0.1, rho=0.05, backend=backend)
    saved = torch.optim.SGD([p], lr=0.1).state_dict()
    opt.base_optimizer.load_state_dict(saved)
    opt.param_groups[0]["rho"] = -1.0
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="rho"):
        opt.ascend()
    opt.param_groups[0]["rho"] = 0.3
    opt.base_optimizer.load_state_dict(saved)
    opt.ascend()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 + 0.3 / 3**0.5))
    assert opt.param_groups[0]["rho"] == 0.3


def test_options_of_what_was_loaded_into_the_base_are_there_for_who_asks_first(backend):
    """Read and set between two such loads, with no step in between: of the second, too, the group keeps its radius."""
    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], torch.optim.SGD, lr=0.1, rho=0.05, backend=backend)
    saved = torch.optim.SGD([p], lr=0.1).state_dict()
    opt.base_optimizer.load_state_dict(saved)
    assert opt.param_groups[0]["rho"] == 0.05
    opt.param_groups[0]["rho"] = 0.3
    opt.base_optimizer.load_state_dict(saved)
    p.grad = torch.ones(3)
    opt.ascend()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 + 0.3 / 3**0.5))


def test_a_load_that_was_interrupted_when_its_groups_were_there_counts_after_restore(monkeypatch):
    """The radius that they brought, and not that of before, is what a group keeps where another one is then loaded."""
    p = nn.Parameter(torch.ones(3))
    opt = SAM([p], torch.optim.SGD, lr=0.1, rho=0.05)
    saved, plain = opt.state_dict(), torch.optim.SGD([p], lr=0.1).state_dict()
    opt.param_groups[0]["rho"] = 0.3
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "__setstate__", lambda self, state: self.__dict__.update(state) or interrupt())
        with pytest.raises(KeyboardInterrupt):
            opt.load_state_dict(saved)
    opt.restore()
    opt.base_optimizer.load_state_dict(plain)
    assert opt.param_groups[0]["rho"] == 0.05


def test_a_group_that_is_exchanged_keeps_the_options_of_the_one_before():
    """Taken out and put in by two reads, in between which there is no group, or one less; and rho_min is no None."""
    p, q = parameter(), parameter()
    opt = BSAM([{"params": [p]}, {"params": [q]}], torch.optim.SGD, lr=0.1, rho=0.05)
    for group in opt.param_groups:
        group["rho"] = 0.3
    plain = [dict(group) for group in torch.optim.SGD([{"params": [p]}, {"params": [q]}], lr=0.1).param_groups]
    opt.param_groups.pop()
    opt.param_groups.append(plain[1])
    assert [group["rho"] for group in opt.param_groups] == [0.3, 0.3]
    opt.param_groups.clear()
    opt.param_groups.append(plain[0])
    assert opt.param_groups[0]["rho"] == 0.3
    opt.base_optimizer.add_param_group({"params": [parameter()], "rho": 0.7})
    assert opt.param_groups[1]["rho_min"] == 0.7


def test_a_group_that_is_none_can_be_taken_back():
    opt = SAM([parameter()], lr=0.1)
    opt.param_groups.append([parameter()])
    assert isinstance(opt.param_groups.pop(), list)
    assert len(opt.param_groups) == 1


def test_masters_that_torch_has_cast_are_refused(backend):
    opt = SAM(
        [parameter().bfloat16().detach().requires_grad_()], lr=0.1, momentum=0.9, master_weights=True, backend=backend
    )
    whole_step(opt)
    opt.base_optimizer.load_state_dict(opt.base_optimizer.state_dict())
    backward(opt)
    opt.ascend()
    backward(opt)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*master weight of torch.bfloat16"):
        opt.step()


def test_a_load_that_is_refused_loads_nothing():
    opt = SAM([parameter()], lr=0.1, momentum=0.9)
    whole_step(opt)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0].update(rho=-1.0, lr=5.0)
    with pytest.raises(ValueError, match="rho=-1"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.1


def test_memory_freed_within_a_step(backend):
    """An error, and w when the memory is there again; torch's own copy would write where nothing is."""
    p = nn.Parameter(torch.ones(1000))
    opt = SAM([p], lr=0.1, backend=backend)
    backward(opt)
    opt.ascend()
    p.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0"):
        opt.restore()
    p.untyped_storage().resize_(4000)
    opt.restore()
    assert p.eq(1).all()


def test_parameters_in_a_tuple():
    opt = SAM([parameter()], lr=0.1)
    opt.param_groups[0]["params"] = (parameter(),)
    whole_step(opt)
    torch.testing.assert_close(opt.param_groups[0]["params"][0].detach(), torch.full((2,), 0.9))


def test_a_base_that_is_no_longer_fused_has_its_state_alone(backend):
    """A hook on the base makes it take its own step; what was in flat buffers was held for good."""
    opt = SAM([parameter()], lr=0.1, momentum=0.9, backend=backend)
    whole_step(opt)
    (p,) = opt.param_groups[0]["params"]
    view = weakref.ref(opt.state[p]["momentum_buffer"])
    (flat,) = opt._flats
    held = flat.extra_bytes
    opt.base_optimizer.register_step_post_hook(lambda *_: None)
    whole_step(opt)
    opt.state.clear()
    gc.collect()
    assert view() is None
    assert flat.extra_bytes < held


# ---- found by a hostile reader of issue 14's delivery


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_clipped_plain_step_of_a_base_that_is_not_fused(backend, dtype):
    """By a norm in float64: torch's, in the gradients' dtype, overflowed and made them 0. An inf skips the step."""
    big = 0.5 * float(torch.finfo(dtype).max)
    p = nn.Parameter(torch.zeros(100, dtype=dtype))
    opt = bsam_fused.SAM([p], torch.optim.RMSprop, lr=0.1, eps=1e-3, max_grad_norm=5.0, backend=backend)
    opt.active = False
    p.grad = torch.full_like(p, big)
    opt.step()
    assert p.grad.float().tolist() == pytest.approx([0.5] * 100, rel=1e-2)
    p.grad = torch.full_like(p, torch.inf)
    before = p.tolist()
    opt.step()
    assert (p.tolist(), opt.skipped_steps) == (before, 1)


def test_another_sams_checkpoint_over_a_base_that_looks_into_its_state():
    p = nn.Parameter(torch.ones(3))
    opt = bsam_fused.SAM([p], torch.optim.Adagrad, lr=0.1)
    theirs = {"state": {0: {"old_p": torch.zeros(3)}}, "param_groups": opt.state_dict()["param_groups"]}
    with pytest.warns(UserWarning, match="begin anew"):
        opt.load_state_dict(theirs)
    opt.step(lambda: p.sum().backward())


def test_metrics_are_of_the_latest_step():
    p = nn.Parameter(torch.ones(2))
    opt = bsam_fused.SAM([p], lr=0.1)

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    for call in (opt.ascend, opt.step):
        closure()
        call()
    assert not {"loss", "max_sharpness"} & opt.metrics().keys()
    opt.step(closure)
    opt.step(lambda: None)  # given up
    assert not {"loss", "norm_g", "norm_g_max"} & opt.metrics().keys()


def test_a_key_lr_max_of_the_users_own_stays():
    opt = bsam_fused.BSAM([{"params": [nn.Parameter(torch.ones(1))], "lr_max": 5.0}], lr=0.1)
    assert opt.metrics()["rho_min"] == 0.05
    opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["lr_max"] == 5.0
    assert opt.metrics()["rho_min"] == 0.05


def test_groups_beside_a_base_instance():
    """Keys of one's own are carried; a slip of an option, and an option that the base has otherwise, are told."""
    p = nn.Parameter(torch.ones(1))
    base = torch.optim.SGD([p], lr=0.1)
    assert bsam_fused.SAM([{"params": [p], "lr_scale": 0.5}], base).param_groups[0]["lr_scale"] == 0.5
    assert bsam_fused.SAM(base.param_groups, base).param_groups[0]["lr"] == 0.1
    with pytest.raises(TypeError, match=r"rhoo.*did you mean rho"):
        bsam_fused.SAM([{"params": [p], "rhoo": 0.2}], torch.optim.SGD([p], lr=0.1))
    with pytest.raises(TypeError, match=r"group 0 of params has lr=0.5, but base_optimizer.* has 0.1"):
        bsam_fused.SAM([{"params": [p], "lr": 0.5}], torch.optim.SGD([p], lr=0.1))


def test_a_step_on_meta_is_saved_as_it_is():
    p = nn.Parameter(torch.ones(2))
    opt = bsam_fused.SAM([p], torch.optim.RMSprop, lr=0.1)
    with torch.device("meta"):  # where RMSprop then makes its step count
        opt.step(lambda: p.square().sum().backward())
        assert opt.state_dict()["state"][0]["square_avg"].device.type == "cpu"


def test_parameters_on_meta_are_named_in_a_plain_closure_step():
    net = nn.Linear(2, 2, device="meta")
    opt = bsam_fused.SAM(net.parameters(), lr=0.1)
    net.to_empty(device="cpu")
    opt.active = False

    def closure():
        loss = net(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="is on meta"):
        opt.step(closure)


@pytest.mark.parametrize("group", [{"max_lr": None}, {"lr_scale": None}, {"lr_scale": 0.0}])
def test_what_a_group_has_of_a_learning_rate(group):
    opt = bsam_fused.BSAM([{"params": [nn.Parameter(torch.ones(1))], **group}], lr=0.1)
    assert opt.metrics()["rho_min"] == 0.05
    opt.param_groups[0]["lr_scale"] = "x"
    with pytest.raises(ValueError, match="lr_scale='x'"):
        opt.metrics()
