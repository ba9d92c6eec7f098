"""What LookSAM and Friendly SAM remember: the CUDA backend's FlatParams, and the CPU's, beside formulas in float64."""

import ctypes
import math

import graphed
import host_cuda
import host_graphs
import pytest
import torch
from cuda_flats import (
    DECAYS,
    NUMBERS,
    NUMELS,
    PLACES,
    RADII,
    SGD,
    WITHOUT,
    Flat,
    dot,
    mixing,
    pair,
    zero_if_none,
)

from bsam_fused.ops import rounding
from bsam_fused.ops.contract import ASCENT, MAX, PRODUCT, SCALE, SQUARE, Rule
from bsam_fused.ops.one_go import in_one_go

TO_HISTORY = 5
PLAIN = [scalars._replace(momentum=0.0, weight_decay=0.0, nesterov=False, maximize=False) for scalars in SGD]

every_kind = pytest.mark.parametrize("kind", ["cuda", "cpp"])
every_remembering_rule = pytest.mark.parametrize("rule", [rule for rule in Rule if rule.remembers])
of_friendly = dict(zip(("sigma", "lmbda"), (NUMBERS[Rule.FRIENDLY], DECAYS), strict=True))


def of_group(numbers, i):
    return numbers[PLACES[i][0]]


def copies(tensors):
    return [x.detach().cpu().clone() for x in tensors]


def filled(kind, *args, **options):
    one = Flat(kind, *args, **options)
    one.fill_histories()
    return one


def assert_close(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-12, msg=lambda m, i=i: f"{i}: {m}")


@graphed.where
@every_kind
def test_mix_is_of_those_that_have_a_gradient(backend, kind):
    """q = g − σ m, with σ of the group: its sums, and the way that `ascend` goes; .grad is not written to."""
    one = filled(kind)
    m, w = copies(one.history(Rule.FRIENDLY)), copies(one.params)
    grads = one.read(1, WITHOUT[0])
    one.flat.mix(RADII, mixing(Rule.FRIENDLY))
    assert all(p.grad is g for p, g in zip(one.params, grads, strict=True))
    assert all(map(torch.equal, *(map(zero_if_none, (grads, Flat(kind).read(1, WITHOUT[0]))))))
    there = [i for i, g in enumerate(grads) if g is not None]
    q = {i: grads[i].cpu() - of_group(of_friendly["sigma"], i) * m[i] for i in there}
    t = {i: w[i].abs() + 0.1 if PLACES[i][0] else torch.ones_like(w[i]) for i in there}
    square = sum((t[i] * q[i]).square().sum().item() for i in there)
    assert one.flat.sums[ASCENT].item() == pytest.approx(square, rel=1e-12)
    assert one.flat.sums[SQUARE].item() == pytest.approx(sum(m[i].square().sum().item() for i in there), rel=1e-12)
    assert one.flat.sums[PRODUCT].item() == pytest.approx(sum(q[i].square().sum().item() for i in there), rel=1e-12)
    one.flat.ascend(one.flat.sums, RADII, 1e-12, mixing(Rule.FRIENDLY))
    n = math.sqrt(square)
    reach = 0.3 / n, -min(0.5, 20.0 / n) / n
    w_max = [w[i] + of_group(reach, i) * t[i] ** 2 * q[i] if i in there else w[i] for i in range(len(NUMELS))]
    assert_close(copies(one.params), w_max)


@graphed.where
@every_kind
@pytest.mark.parametrize("first", [False, True])
def test_friendly_sam_remembers_g(backend, kind, first):
    """λ m + (1 − λ) g, and g in the first step of all; of those that had one in the first pass."""
    one = Flat(kind) if first else filled(kind)
    m = copies(one.history(Rule.FRIENDLY))
    grads = one.come_to_update(mixing(Rule.FRIENDLY))
    one.update()
    for i, g in enumerate(grads[0]):
        lmbda = 0.0 if first else of_group(of_friendly["lmbda"], i)
        if g is not None:
            m[i] = lmbda * m[i] + (1 - lmbda) * g.cpu()
    assert_close(one.history(Rule.FRIENDLY), m)


@graphed.where
@every_kind
def test_looksam_remembers_what_is_orthogonal_to_g(backend, kind):
    """Over all parameters that had a gradient; what was remembered before does not count, even where it is infinite."""
    one = filled(kind)
    for view in one.history(Rule.ORTHOGONAL):
        view[0] = math.inf
    before = copies(one.history(Rule.ORTHOGONAL))
    grads = one.come_to_update(mixing(Rule.ORTHOGONAL))
    one.flat.sums[SCALE] = 8.0
    one.update(0.5)
    g, g_max = map(zero_if_none, grads)
    v = [y - dot(g, g_max) / dot(g, g) * x for x, y in zip(g, g_max, strict=True)]
    members = [i for i in range(len(NUMELS)) if i not in WITHOUT[0] & WITHOUT[1]]
    assert_close(one.history(Rule.ORTHOGONAL), [v[i] if i in members else x for i, x in enumerate(before)])
    assert abs(dot(g, v)) < 1e-10 * dot(g, g)


@graphed.where
@every_kind
def test_looksam_uses_what_it_remembers(backend, kind):
    """In one pass: w − lr (g + α (‖g‖ / ‖v‖) v), ‖v‖ of those that have a gradient; v stays."""
    one = filled(kind)
    v, w = copies(one.history(Rule.REUSED)), copies(one.params)
    (grads,) = one.come_to_update(mixing(Rule.REUSED))
    one.update(scalars=PLAIN)
    g = zero_if_none(grads)
    there = [i for i, each in enumerate(grads) if each is not None]
    ratio = math.sqrt(dot(g, g) / sum(v[i].square().sum().item() for i in there))
    for i in there:
        d = g[i] + of_group(NUMBERS[Rule.REUSED], i) * ratio * v[i]
        w[i] -= of_group([scalars.lr for scalars in PLAIN], i) * d
    assert_close(copies(one.params), w)
    assert all(map(torch.equal, copies(one.history(Rule.REUSED)), v))


EXACT = {"sigma": (1.0, 0.5), "lmbda": (0.5, 0.75)}


def exact_history(rule, before, grads, i):
    """What a parameter's history is to be, in float32; None where it stays.

    All coefficients are of few bits, so that no sum is rounded before it is stored.
    """
    g, g_max = (None if grads[k][i] is None else grads[k][i].cpu().float() for k in range(2))
    if rule is Rule.FRIENDLY:
        sigma, lmbda = (of_group(EXACT[name], i) for name in ("sigma", "lmbda"))
        q = None if g is None else (g - sigma * before.float()).to(before.dtype).float()
        return None if g is None else (1 - lmbda) * q + (lmbda + (1 - lmbda) * sigma) * before.float()
    if g is None and g_max is None:
        return None
    return 0.75 * (0 if g is None else g) + (0 if g_max is None else g_max)


@graphed.where
@every_remembering_rule
@pytest.mark.parametrize("combines", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_by_the_count_with_this_step(backend, dtype, combines, rule):
    """The formula's bits, of the CUDA backend and the CPU's; those of `combine` are there after `remember` alone."""
    seed, steps = 3, 2
    for kind in ("cuda", "cpp"):
        one = filled(kind, dtype, seed=seed)
        one.flat.step_count.fill_(steps)
        before = copies(one.history(rule))
        grads = one.come_to_update(mixing(rule, EXACT["sigma"], EXACT["lmbda"]))
        if rule is Rule.ORTHOGONAL:
            one.flat.sums[PRODUCT] = -0.75 * one.flat.sums[SQUARE]
        if combines:
            assert one.flat.combine(one.flat.sums, True, math.inf)
            assert all(map(torch.equal, copies(one.history(rule)), before))
            in_one_go(*one.flat.remembering())
        else:
            one.update()
        for i, found in enumerate(copies(one.history(rule))):
            x = exact_history(rule, before[i], grads, i)
            key = rounding.tensor_key(seed, *PLACES[i])
            count, elements = torch.tensor(steps + 1, device="cpu"), torch.arange(NUMELS[i], device="cpu")
            bits = rounding.random_bits(key, count, TO_HISTORY, elements)
            assert torch.equal(found, before[i] if x is None else rounding.rounded(x, dtype, bits)), (kind, i)


FAULTS = {
    "infinite g_max": lambda sums: sums[MAX].fill_(math.inf),
    "infinite ‖T g‖": lambda sums: sums[ASCENT].fill_(math.inf),
    "nothing that float32 holds": lambda sums: (sums[PRODUCT].fill_(1e80), sums[SQUARE].fill_(1.0)),
}


@graphed.where
@every_remembering_rule
@pytest.mark.parametrize("fault", FAULTS)
def test_a_skipped_step_remembers_nothing(backend, rule, fault):
    """As the update decides, so does what comes after it, and the next step goes on from there."""
    both = pair(torch.float32)
    for one in both:
        before, w = copies(one.history(rule)), copies(one.params)
        one.come_to_update(mixing(rule))
        FAULTS[fault](one.flat.sums)
        one.update()
        assert one.flat.skipped.item() == 1
        assert all(map(torch.equal, copies(one.history(rule)), before))
        assert all(map(torch.equal, copies(one.params), w))
        one.come_to_update(mixing(rule))
        one.update()
        assert not all(map(torch.equal, copies(one.history(rule)), before))
    assert all(one.flat.skipped.item() == 1 for one in both)


@graphed.where
@every_kind
def test_what_is_exempt_has_no_q(backend, kind):
    """Its g is not read, so it has no part in m; LookSAM's v is over all parameters."""
    for rule, changes in ((Rule.FRIENDLY, False), (Rule.ORTHOGONAL, True)):
        one = filled(kind, exempt=True)
        before = copies(one.history(rule))
        one.come_to_update(mixing(rule))
        assert rule is Rule.ORTHOGONAL or not one.flat.sums[SQUARE].item()
        one.update()
        assert all(map(torch.equal, copies(one.history(rule)), before)) != changes


@graphed.where
@every_kind
def test_a_mix_whose_step_never_came_is_forgotten(backend, kind):
    """A step of another rule takes g as it came, not the q that was made of it."""
    ones = filled(kind), filled(kind)
    ones[0].read(1, WITHOUT[0])
    ones[0].flat.mix(RADII, mixing(Rule.FRIENDLY))
    for one in ones:
        one.come_to_update(mixing(Rule.LAST_ALONE))
        one.update()
    assert all(map(torch.equal, *(copies(one.params) for one in ones)))


@every_remembering_rule
def test_kernels_that_cannot_be_loaded_leave_an_update_unmade(rule):
    """A device loads a kernel as late as it can: those of two FlatParams come before the first of them is updated."""
    ones = [filled("cuda", dtype) for dtype in (torch.float32, torch.float64)]
    for one in ones:
        one.come_to_update(mixing(rule))

    def update():
        host_cuda.module().update_sgd([one.flat for one in ones], [one.flat.sums for one in ones], SGD, True, math.inf)

    def state():
        return [x for one in ones for x in copies(one.numbers("momentum_buffer", "step"))]

    before, shim = state(), host_graphs.shim()
    try:
        for room in range(4):  # an update and what it remembers, of each
            shim.shim_make_room(ctypes.c_size_t(room))
            with pytest.raises(RuntimeError, match="out of memory"):
                update()
            assert all(map(torch.equal, state(), before)), room
        shim.shim_make_room(ctypes.c_size_t(4))
        update()
    finally:
        shim.shim_make_room(ctypes.c_size_t(-1))
    assert [one.flat.step_count.item() for one in ones] == [1, 1]
