"""What the C++ FlatParams promises beyond its arithmetic: whose tensors it holds, reads and writes, and when."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bsam_fused
from bsam_fused.ops import native_flat
from bsam_fused.ops.contract import Mixing, Rule, RuleNumber

RADII, RULE = [(0.05, 0.0, 0.0, 0.05, math.inf)], [(0.1, 0.9, 0.0, 0.0, 0.0, 0.0)]
SAM, BSAM = Mixing(), Mixing(Rule.BILATERAL, [RuleNumber()])
MODULE = native_flat.load()[0]


def build(params):
    return MODULE.CpuFlatParams(params, [(0, i) for i in range(len(params))], None, False)


def parameters(n=3, numel=2000):
    return [nn.Parameter(torch.randn(numel)) for _ in range(n)]


def values(params):
    return [p.detach().clone() for p in params]


def ascend(flat, params, mixing=SAM):
    for p in params:
        p.grad = torch.randn_like(p)
    flat.read_gradients()
    flat.square_norm(0, RADII)
    flat.ascend(flat.sums, RADII, 1e-12, mixing)


def read(flat, params):
    for p in params:
        p.grad = torch.randn_like(p)
    flat.read_gradients()
    flat.square_norm(1, RADII)


def plain_step(flat, params):
    read(flat, params)
    flat.begin_plain(Mixing())
    flat.square_norm(1, RADII)
    flat.update_sgd(flat.sums, RULE, True, math.inf)


def test_parameters_are_held_as_python_objects_alone():
    p = nn.Parameter(torch.zeros(3))
    before = p._use_count()
    objects = sys.getrefcount(p)
    flat = build([p])
    assert flat.params[0] is p
    assert p._use_count() == before
    assert sys.getrefcount(p) == objects + 1


@pytest.mark.parametrize("conversion", [{"dtype": torch.float64}, {"memory_format": torch.channels_last}])
def test_model_can_be_converted_by_swapping_after_a_step(conversion):
    model = nn.Conv2d(3, 4, 3)
    opt = bsam_fused.SAM(model.parameters(), lr=0.1, backend="cpp")
    inputs = torch.randn(2, 3, 8, 8)

    def step():
        opt.step(lambda: model(inputs.to(model.weight.dtype)).square().mean().backward())

    step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(**conversion)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == conversion.get("dtype", torch.float32)


CHANGES = {
    "strides": lambda p: setattr(p, "data", p.data.to(memory_format=torch.channels_last)),
    "gaps": lambda p: setattr(p, "data", torch.stack([p.data, p.data], -1)[..., 0]),
    "dtype": lambda p: setattr(p, "data", p.data.double()),
    "swapped": lambda p: torch.utils.swap_tensors(p, nn.Parameter(torch.zeros_like(p))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_restore_and_show_w_are_exact_whatever_was_changed(change):
    params = [nn.Parameter(torch.randn(4, 3, 5, 5)), nn.Parameter(torch.randn(2, 3, 2, 2))]
    w = values(params)
    flat = build(params)
    ascend(flat, params)
    moved = values(params)
    CHANGES[change](params[0])
    if change != "swapped":
        flat.show_w(True)
        assert all(torch.equal(p, x.to(p.dtype)) for p, x in zip(params, w, strict=True))
        flat.show_w(False)
        assert all(torch.equal(p, x.to(p.dtype)) for p, x in zip(params, moved, strict=True))
    flat.restore()
    assert all(torch.equal(p, x.to(p.dtype)) for p, x in zip(params, w, strict=True))


def test_another_shape_is_named_and_saved_kept():
    params = parameters()
    w = values(params)
    flat = build(params)
    ascend(flat, params)
    params[1].data = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 \(shape \(7,\).*had shape \(2000,\)"):
        flat.restore()
    params[1].data = torch.zeros(2000)
    flat.restore()
    assert all(torch.equal(p, x) for p, x in zip(params, w, strict=True))


def test_updated_says_whether_the_gradients_read_are_in_the_weights():
    params = parameters()
    flat = build(params)
    assert not flat.updated
    plain_step(flat, params)
    assert flat.updated
    after = values(params)
    flat.restore()  # nothing to undo
    assert all(torch.equal(p, x) for p, x in zip(params, after, strict=True))
    flat.read_gradients()
    assert not flat.updated
    flat.begin_plain(Mixing())
    assert not flat.combine(torch.full((8,), math.nan, dtype=torch.float64), True, math.inf)
    assert flat.updated


def test_state_begins_with_those_that_had_a_gradient():
    params = parameters()
    flat = build(params)
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    flat.read_gradients()
    assert flat.beginning([True]) == [0, 1]
    assert flat.beginning([False]) == []
    flat.begin_state([1])
    assert flat.beginning([True]) == [0]
    with pytest.raises(IndexError):
        flat.begin_state([0, 3])
    assert flat.beginning([True]) == [0]


def test_dropped_state_begins_anew_and_old_views_stay():
    params = parameters()
    flat = build(params)
    plain_step(flat, params)
    momentum, step = flat.state("momentum_buffer")[0], flat.state("step")[0]
    kept = momentum.clone()
    assert step == 1
    flat.drop_state()
    assert flat.state("step")[0] == 0
    assert not flat.state("momentum_buffer")[0].any()
    plain_step(flat, params)
    assert step == 1
    assert torch.equal(momentum, kept)


def test_a_plain_step_is_sgd_from_w():
    params = parameters()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    flat, sgd = build(params), torch.optim.SGD(others, lr=0.1, momentum=0.9)
    for _ in range(3):
        plain_step(flat, params)
        for p, other in zip(params, others, strict=True):
            other.grad = p.grad
        sgd.step()
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other)


FOREIGN = {
    "NumPy": lambda g: torch.from_numpy(g.numpy().copy()),
    "DLPack": lambda g: torch.from_dlpack(np.array(g.numpy())),
    "frombuffer": lambda g: torch.frombuffer(bytearray(g.numpy().tobytes()), dtype=g.dtype),
    "shared": lambda g: g.clone().share_memory_(),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_memory_of_others_is_read_and_not_written(kind):
    """BSAM takes g and adds g_max to it: in place, were the memory its own."""
    params = parameters(1)
    flat = build(params)
    g = FOREIGN[kind](torch.randn(2000))
    before = g.clone()
    for call in ("ascend", "descend"):
        params[0].grad = g
        flat.read_gradients()
        if call == "ascend":
            flat.square_norm(0, RADII)
            flat.ascend(flat.sums, RADII, 1e-12, BSAM)
        else:
            flat.descend(flat.sums, RADII, 1e-12)
    assert torch.equal(g, before)


def test_a_gradient_in_a_parameters_storage_is_read_before_that_is_written():
    """Each of its elements is the weight before: read in place it would be w_max, and after a base's step not d."""
    memory = torch.randn(2001)
    w, g = memory[1:].clone(), memory[:-1].clone()
    inside, outside = nn.Parameter(memory[1:]), nn.Parameter(w.clone())
    assert inside.data_ptr() == memory[1:].data_ptr()
    for p, grad in ((inside, memory[:-1]), (outside, g)):
        flat = build([p])
        p.grad = grad
        flat.read_gradients()
        flat.square_norm(0, RADII)
        flat.ascend(flat.sums, RADII, 1e-12, SAM)
    assert torch.equal(inside, outside)
    inside.data.copy_(w)
    flat = build([inside])
    inside.grad = memory[:-1]
    g = inside.grad.clone()
    flat.read_gradients()
    flat.begin_plain(Mixing())
    flat.square_norm(1, RADII)
    assert flat.combine(flat.sums, True, math.inf)
    inside.data.zero_()
    assert torch.equal(inside.grad, g)


@pytest.mark.parametrize("max_norm", [math.inf, 1e-3])
def test_combine_saves_every_weight_and_writes_to_no_gradient(max_norm):
    params = parameters()
    w = values(params)
    flat = build(params)
    ascend(flat, params[:1])
    params[2].grad = None
    shared = torch.randn(2000)
    before = shared.clone()
    params[0].grad = params[1].grad = shared
    flat.read_gradients()
    flat.square_norm(1, RADII)
    assert flat.combine(flat.sums, True, max_norm)
    assert torch.equal(shared, before)
    factor = 1.0 if max_norm == math.inf else max_norm / (math.sqrt(2) * before.norm().item() + 1e-6)
    for p in params[:2]:
        torch.testing.assert_close(p.grad, before * factor)
    for p in params:
        p.data.add_(1.0)  # a base that raises afterwards
    flat.restore()
    assert all(torch.equal(p, x) for p, x in zip(params, w, strict=True))


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from tensors: a GPU is waited for at each."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, None])
def test_combine_of_16_bits_finds_what_is_not_finite_and_waits_once(bad):
    params = [nn.Parameter(torch.randn(n, dtype=torch.bfloat16)) for n in (0, *[5] * 20)]
    flat = build(params)
    read(flat, params)
    flat.begin_plain(Mixing())
    flat.square_norm(1, RADII)
    if bad is not None:
        params[-1].grad[3] = bad  # behind the sums' back, as too large a d would be
    with Reads() as reads:
        assert flat.combine(flat.sums, True, 1e-3) == (bad is None)
    assert reads.count == 1


def test_several_dtypes_in_one_call():
    kinds = [[nn.Parameter(torch.randn(300, dtype=dtype))] for dtype in (torch.float32, torch.float64)]
    flats = [build(params) for params in kinds]
    before = [values(params)[0] for params in kinds]
    for flat, params in zip(flats, kinds, strict=True):
        read(flat, params)
        flat.begin_plain(Mixing())
        flat.square_norm(1, RADII)
    total = sum(flat.sums for flat in flats)
    MODULE.update_sgd(flats, [total, total], RULE, True, math.inf)
    assert torch.is_grad_enabled()  # for each of them it was off
    for flat, (p,), w in zip(flats, kinds, before, strict=True):
        assert flat.updated
        torch.testing.assert_close(p.detach(), w - 0.1 * p.grad)


# ---- what tells whether others changed something


@pytest.fixture
def state():
    opt = torch.optim.SGD(parameters(4, 10), lr=0.1, momentum=0.9)
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.state["note"] = "a string key"
    return opt.state


def _reordered(state):
    first = next(iter(state))
    state[first] = state.pop(first)


CHANGED = {
    "an entry is gone": lambda state: state.popitem(),
    "an entry came": lambda state: state.update({"more": 1}),
    "all is gone": lambda state: state.clear(),
    "an entry is another": lambda state: state.update({k: dict(v) for k, v in state.items() if k != "note"}),
    "another order": _reordered,
    "another text": lambda state: state.update(note="another"),
    "a tensor is another": lambda state: next(iter(state.values())).update(momentum_buffer=torch.zeros(10)),
    "a tensor's data is another": lambda state: setattr(
        next(iter(state.values()))["momentum_buffer"], "data", torch.zeros(10)
    ),
    "another key": lambda state: next(iter(state.values())).update(more=1),
    "a key for another": lambda state: (lambda e: e.update(other=e.pop("momentum_buffer")))(next(iter(state.values()))),
}


@pytest.mark.parametrize("change", CHANGED)
def test_seen_notices(state, change):
    seen = MODULE.Seen(state)
    assert seen.same(state)
    CHANGED[change](state)
    assert not seen.same(state)


def test_seen_looks_at_identity_alone(state):
    """Values written in place are no change, and what was seen is held: no other object can have its id."""
    seen = MODULE.Seen(state)
    next(iter(state.values()))["momentum_buffer"].zero_()
    assert seen.same(state)
    entry = next(iter(state.values()))
    entry["momentum_buffer"] = entry["momentum_buffer"].clone()
    assert not seen.same(state)


def test_same_items():
    a, b = object(), object()
    assert MODULE.same_items([], [])
    assert MODULE.same_items([a, b], [a, b])
    assert not MODULE.same_items([a, b], [b, a])
    assert not MODULE.same_items([a], [a, b])
    assert not MODULE.same_items([1.5], [float("1.5")])


@pytest.mark.parametrize("wrong", [None, 3, (), "text"])
def test_what_is_compared_must_be_lists_and_dicts(wrong):
    with pytest.raises(TypeError):
        MODULE.same_items([], wrong)
    with pytest.raises(TypeError):
        MODULE.Seen(wrong)
    with pytest.raises(TypeError):
        MODULE.Seen({}).same(wrong)
    with pytest.raises(RuntimeError, match="never called"):
        MODULE.Seen.__new__(MODULE.Seen).same({})
