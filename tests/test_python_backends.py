"""FlatParams written in Python, by themselves: whole or not at all, and other people's memory."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch

from bsam_fused.ops import contract, holders, torch_lists
from bsam_fused.ops.contract import MAX, AdamScalars, Mixing, Radius, Rule, RuleNumber, SGDScalars

RADII = [Radius(0.3)]
SAM, BSAM = Mixing(), Mixing(Rule.BILATERAL, [RuleNumber()])
LOOK_SAM, FRIENDLY_SAM = Mixing(Rule.ORTHOGONAL, [RuleNumber()]), Mixing(Rule.FRIENDLY, [RuleNumber(1.0, 1.0, 0.9)])
SGD = [SGDScalars(0.1, 0.9, 0.0, 0.01, False, False)]
ADAM = [AdamScalars(0.1, 0.9, 0.99, 1e-8, 0.01, True, False)]
DTYPES = [torch.float32, torch.bfloat16]  # over lists, and a tensor at a time


class Interrupt(BaseException):
    """Like KeyboardInterrupt: no Exception."""


def lines_of(call, stop=None):
    """Return the package's lines that ``call`` runs; raise Interrupt before the ``stop``-th."""
    lines = []

    def trace(frame, event, _):
        if "bsam_fused/ops" not in frame.f_code.co_filename:
            return None
        if event == "line":
            if len(lines) == stop:
                raise Interrupt
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return lines


def each_interrupt(prepared):
    """Interrupt what ``prepared()`` returns last before the first two runs and the last run of each of its lines.

    Yields what it returned before that; first of all with nothing interrupted.
    """
    *things, call = prepared()
    runs = {}
    for k, line in enumerate(lines_of(call)):
        runs.setdefault(line, []).append(k)
    yield things
    for stop in sorted({k for of_line in runs.values() for k in (*of_line[:2], of_line[-1])}):
        *things, call = prepared()
        with pytest.raises(Interrupt):
            lines_of(call, stop)
        yield things


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (3,), (40, 40), (), (0,), (2, 3, 4)
    gaps = torch.randn(4, 6).to(dtype)[:, ::2]
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes] + [torch.nn.Parameter(gaps)]


def flat_of(params, seed=0, exempt=False):
    return torch_lists.flat_params(params, [(0, i) for i in range(len(params))], seed, exempt)


def backward(params, seed, without=()):
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        p.grad = None if i in without else torch.randn(p.shape, generator=generator).to(p.dtype)


def walk_to_update(flat, mixing):
    backward(flat.params, 1)
    flat.read_gradients()
    if mixing is FRIENDLY_SAM:
        flat.mix(RADII, mixing)
    else:
        flat.square_norm(contract.ASCENT, RADII)
    flat.ascend(flat.sums, RADII, 1e-12, mixing)
    if mixing is BSAM:
        backward(flat.params, 2)
        flat.read_gradients()
        flat.descend(flat.sums, RADII, 1e-12)
    backward(flat.params, 3)
    flat.read_gradients()
    if mixing is LOOK_SAM:
        flat.direction_sums()
    else:
        flat.square_norm(mixing.rule.last_slot, RADII)
    flat.begin_state(flat.beginning([True]))


def update(flat, rule):
    if rule == "adam":
        flat.update_adam(flat.sums, ADAM, True, math.inf)
    else:
        flat.update_sgd(flat.sums, SGD, True, math.inf)


def state(flat, rule, mixing=SAM):
    keys = ("exp_avg", "exp_avg_sq") if rule == "adam" else ("momentum_buffer",)
    if mixing.rule.history:
        keys += (mixing.rule.history,)
    return [t.clone() for key in (*keys, "step") for t in flat.state(key)] + [flat.step_count.clone()]


def weights(params):
    return [p.detach().clone() for p in params]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("finite", [True, False], ids=["finite", "skipped"])
@pytest.mark.parametrize(
    ("dtype", "mixing", "rule"),
    [
        *itertools.product(DTYPES, [SAM, BSAM], ["sgd", "adam"]),
        (torch.float32, LOOK_SAM, "sgd"),
        (torch.bfloat16, FRIENDLY_SAM, "sgd"),
    ],
    ids=lambda x: x.rule.name if isinstance(x, Mixing) else None,
)
def test_an_interrupted_update_was_made_or_was_not(dtype, mixing, rule, finite):
    """With its history, at whatever line: `updated` says which; what was not made can be made, or be given up."""

    def prepared():
        params = parameters(dtype)
        flat, w = flat_of(params), weights(params)
        state(flat, rule, mixing)
        walk_to_update(flat, mixing)
        if not finite:
            flat.sums[contract.ASCENT] = math.nan
        return flat, w, state(flat, rule, mixing), lambda: update(flat, rule)

    whole, _, _, make = prepared()
    make()
    for n, (flat, w, before) in enumerate(each_interrupt(prepared)):
        if not flat.updated:
            assert same(state(flat, rule, mixing), before)
            if n % 2:
                update(flat, rule)
        if flat.updated:
            assert same(weights(flat.params), weights(whole.params))
            assert same(state(flat, rule, mixing), state(whole, rule, mixing))
        flat.restore()
        assert same(weights(flat.params), weights(whole.params) if flat.updated else w)
    assert n > 20


@pytest.mark.parametrize("phase", ["ascend", "descend"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_interrupted_phase_is_undone(dtype, phase):
    def prepared():
        params = parameters(dtype)
        flat, w = flat_of(params), weights(params)
        backward(params, 1)
        flat.read_gradients()
        flat.square_norm(contract.ASCENT, RADII)
        if phase == "ascend":
            return flat, w, lambda: flat.ascend(flat.sums, RADII, 1e-12, BSAM)
        flat.ascend(flat.sums, RADII, 1e-12, BSAM)
        backward(params, 2)
        flat.read_gradients()
        return flat, w, lambda: flat.descend(flat.sums, RADII, 1e-12)

    for flat, w in each_interrupt(prepared):
        flat.restore()
        assert same(weights(flat.params), w)


@pytest.mark.parametrize("into", [True, False])
def test_an_interrupted_look_at_w_keeps_what_was_edited(into):
    """w is what the weights are while it is shown, with what the user wrote there, also when leaving fails half way."""

    def prepared():
        params = parameters()
        flat, w = flat_of(params), weights(params)
        backward(params, 1)
        flat.read_gradients()
        flat.square_norm(contract.ASCENT, RADII)
        flat.ascend(flat.sums, RADII, 1e-12, SAM)
        if into:
            return flat, w, lambda: flat.show_w(True)
        flat.show_w(True)
        with torch.no_grad():
            params[1].add_(1.0)
        return flat, weights(params), lambda: flat.show_w(False)

    for flat, w in each_interrupt(prepared):
        flat.restore()
        assert same(weights(flat.params), w)


def test_combine_leaves_gradients_and_can_be_undone_for_every_parameter():
    """A base may write any weight before it raises, also of a parameter that was not perturbed."""
    params = parameters()
    flat, w = flat_of(params), weights(params)
    backward(params, 1, without={0})
    flat.read_gradients()
    flat.square_norm(contract.ASCENT, RADII)
    flat.ascend(flat.sums, RADII, 1e-12, SAM)
    backward(params, 2)
    flat.read_gradients()
    flat.square_norm(MAX, RADII)
    given = [p.grad for p in params]
    kept = [g.clone() for g in given]
    assert flat.combine(flat.sums, True, 0.5)
    assert same(given, kept)
    assert sum(p.grad.square().sum() for p in params).sqrt().item() == pytest.approx(0.5, rel=1e-4)
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
    flat.restore()
    assert same(weights(params), w)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_gradient_in_the_memory_of_weights(offset):
    """A wrong answer reads it after the weights over it have moved; with an offset only a part of it is there."""
    params = [torch.nn.Parameter(torch.arange(1.0, 2001.0)), torch.nn.Parameter(torch.ones(1999))]
    flat = flat_of(params)
    w, g = weights(params), params[0].detach()[offset : offset + 1999].clone()
    params[1].grad = params[0].detach()[offset : offset + 1999]
    params[0].grad = torch.ones(2000)
    flat.read_gradients()
    flat.begin_plain(Mixing())
    flat.square_norm(MAX, RADII)
    assert flat.sums[MAX].item() == pytest.approx(2000 + g.double().square().sum().item())
    flat.update_sgd(flat.sums, [SGDScalars(0.1, 0.0, 0.0, 0.0, False, False)], True, math.inf)
    torch.testing.assert_close(params[0].detach(), w[0] - 0.1)
    torch.testing.assert_close(params[1].detach(), w[1] - 0.1 * g)


FOREIGN = {
    "NumPy's": lambda: torch.from_numpy(np.ones(5000, dtype=np.float32)),
    "a buffer's": lambda: torch.frombuffer(bytearray(20000), dtype=torch.float32),
    "DLPack's": lambda: torch.from_dlpack(np.ones(5000, dtype=np.float32)),
    "shared": lambda: torch.ones(5000).share_memory_(),
}


@pytest.mark.parametrize("whose", FOREIGN)
def test_memory_that_others_see_is_not_taken(whose):
    """Nothing else holds the tensor, and yet g + g_max must not be written there: who owns it still reads it."""
    p = torch.nn.Parameter(torch.ones(5000))
    p.grad = FOREIGN[whose]()
    assert holders.held_elsewhere({0: p.grad}, 0)
    flat = flat_of([p])
    address = p.grad.data_ptr()
    flat.read_gradients()
    flat.square_norm(contract.ASCENT, RADII)
    flat.ascend(flat.sums, RADII, 1e-12, BSAM)
    assert flat._g[0].data_ptr() != address


def test_what_torch_allocated_for_nobody_else_is_taken():
    p = torch.nn.Parameter(torch.ones(5000))
    p.grad = torch.ones(5000)
    address = p.grad.data_ptr()
    flat = flat_of([p])
    flat.read_gradients()
    flat.square_norm(contract.ASCENT, RADII)
    flat.ascend(flat.sums, RADII, 1e-12, BSAM)
    assert flat._g[0].data_ptr() == address


def test_dropped_state_stays_as_it_is():
    params = parameters()
    flat = flat_of(params)
    walk_to_update(flat, BSAM)
    update(flat, "sgd")
    held = flat.state("momentum_buffer") + flat.state("step")
    before = [t.clone() for t in held]
    flat.drop_state()
    assert not any(t.any() for t in flat.state("momentum_buffer") + flat.state("step"))
    walk_to_update(flat, BSAM)
    assert len(flat.beginning([True])) == 0  # noted by the walk
    update(flat, "sgd")
    assert same(held, before)


def test_restore_of_another_shape_raises_before_it_writes():
    params = parameters()
    flat, w = flat_of(params), weights(params)
    backward(params, 1)
    flat.read_gradients()
    flat.square_norm(contract.ASCENT, RADII)
    flat.ascend(flat.sums, RADII, 1e-12, SAM)
    perturbed, mine = weights(params), params[1].data
    params[1].data = torch.zeros(7)
    for call in (flat.restore, lambda: flat.show_w(True)):
        with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .* had shape \(40, 40\)"):
            call()
    assert same(weights(params[:1]), perturbed[:1])
    params[1].data = mine
    flat.restore()
    assert same(weights(params), w)


def test_restore_whatever_became_of_strides_and_dtype():
    params = parameters()
    flat, w = flat_of(params), weights(params)
    backward(params, 1)
    flat.read_gradients()
    flat.square_norm(contract.ASCENT, RADII)
    flat.ascend(flat.sums, RADII, 1e-12, SAM)
    params[1].data = params[1].data.t().contiguous().t()
    params[4].data = params[4].data.double()
    flat.restore()
    assert same(weights(params), [x.to(p.dtype) for x, p in zip(w, params, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_holds_a_parameter_at_rest(dtype):
    """torch.utils.swap_tensors refuses one that something in C++ holds, or that has a weak reference."""
    params = parameters(dtype)
    flat = flat_of(params)
    walk_to_update(flat, BSAM)
    update(flat, "sgd")
    for p in params:
        p.grad = None
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().double()))
    assert params[0].dtype == torch.float64
