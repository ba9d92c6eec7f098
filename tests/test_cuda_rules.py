"""The CUDA backend's directions, FlatParams by FlatParams: beside the CPU's loops, and their sums beside the formulas.

On the host (tests/shim) where there is no GPU. Tensors of more than a chunk and less, in two groups, with a gradient in
all passes, in some and in none: whoever mixes up groups, passes or ends of chunks is seen.
"""

import math

import graphed
import host_cuda
import host_graphs
import pytest
import torch
from samples import DTYPES, TOLERANCE
from torch import nn

from bsam_fused.ops import native_flat
from bsam_fused.ops.contract import (
    ASCENT,
    GIVEN_KEPT,
    GIVEN_LAST,
    MAX,
    MIN,
    PRODUCT,
    SCALE,
    SQUARE,
    AdamScalars,
    Mixing,
    Radius,
    Rule,
    RuleNumber,
    SGDScalars,
)

NUMELS = [2500, 7, 33, 300, 5]
PLACES = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]
WITHOUT = [{1, 4}, {2, 4}, {3, 4}]
"""Of each pass, the parameters that have no gradient in it; the last pass is WITHOUT[1] where there are two."""
RADII = [Radius(0.3, False, 0.0, 0.5), Radius(-0.5, True, 0.1, 0.5, 20.0)]
RADII_MIN = [Radius(-0.1, False, 0.0, 0.1), Radius(0.05, True, 0.1, 0.1)]
SGD = [SGDScalars(0.1, 0.9, 0.5, 0.01, True, False), SGDScalars(0.05, 0.0, 0.0, 0.0, False, True)]
ADAM = [AdamScalars(0.1, 0.9, 0.99, 0.1, 0.01, True, False), AdamScalars(0.05, 0.5, 0.9, 0.1, 0.0, False, True)]
NUMBERS = {
    Rule.EXTRAPOLATED: (0.5, 0.2),
    Rule.SURROGATE_GAP: (0.4, 0.7),
    Rule.WEIGHTED: (0.9, 0.3),
}
GIVEN = -0.7, 1.9

every_rule = pytest.mark.parametrize("rule", Rule)
every_keeping_rule = pytest.mark.parametrize("rule", [rule for rule in Rule if rule.keeps])


def mixing(rule, numbers=None):
    numbers = numbers or NUMBERS.get(rule, (0.0, 0.0))
    return Mixing(rule, [RuleNumber(number, max(numbers)) for number in numbers] if rule.keeps else [])


class Flat:
    """A FlatParams of random parameters, the same ones on every device."""

    def __init__(self, kind, dtype=torch.float64, seed=None, exempt=False):
        self.device = "cpu" if kind == "cpp" else torch.get_default_device()
        self.params = [nn.Parameter(w.to(self.device, dtype)) for w in self._random(0)]
        self.held = []
        module = host_cuda.module() if kind == "cuda" and self.device.type == "cpu" else native_flat.load()[0]
        build = module.CpuFlatParams if kind == "cpp" else module.CudaFlatParams
        self.flat = build(self.params, PLACES, seed, exempt)
        self.flat.sums[GIVEN_KEPT], self.flat.sums[GIVEN_LAST] = GIVEN

    @staticmethod
    def _random(seed):
        generator = torch.Generator("cpu").manual_seed(seed)
        return [torch.randn(n, generator=generator, device="cpu", dtype=torch.float64) for n in NUMELS]

    def read(self, seed, without, scale=1.0):
        """Read the gradients of a pass; returns them, None where there is none."""
        grads = [scale * g.to(self.device, self.params[0].dtype) for g in self._random(seed)]
        grads = [None if i in without else g for i, g in enumerate(grads)]
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        self.held.append(grads)
        self.flat.read_gradients()
        return grads

    def come_to_update(self, how, seed=1):
        """Make the passes of a step, each with gradients of its own; returns these."""
        flat = self.flat
        grads = [self.read(seed, WITHOUT[0])]
        flat.square_norm(ASCENT, RADII)
        flat.ascend(flat.sums, RADII, 1e-12, how)
        grads.append(self.read(seed + 1, WITHOUT[1]))
        if how.rule is Rule.BILATERAL:
            flat.descend(flat.sums, RADII_MIN, 1e-12)
            grads.append(self.read(seed + 2, WITHOUT[2]))
        if how.rule.keeps:
            flat.direction_sums()
        else:
            flat.square_norm(MAX, RADII)
        return grads

    def numbers(self, *keys):
        """All that a step changes."""
        flat = self.flat
        state = [view.detach() for key in keys for view in flat.state(key)]
        return [*(p.detach() for p in self.params), *state, flat.skipped, flat.step_count, flat.sums]


def pair(*args, **options):
    return Flat("cuda", *args, **options), Flat("cpp", *args, **options)


def assert_alike(found, expected, dtype):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        tolerance = TOLERANCE[dtype] * 10 ** (dtype is torch.float64)
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}")


@graphed.where
@every_rule
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_updates_are_the_cpus(backend, rule, dtype, base):
    """Of a scaled loss and clipped with SGD, of neither with Adam; a second step goes on from the first one's state."""
    clips = base == "sgd"
    keys = ("momentum_buffer", "step") if base == "sgd" else ("exp_avg", "exp_avg_sq", "step")
    both = pair(dtype, seed=3 if clips else None)
    for step in range(2):
        for one in both:
            one.come_to_update(mixing(rule), 10 * step + 1)
            one.flat.sums[SCALE] = 4.0 if clips else 0.0
            if base == "sgd":
                one.flat.update_sgd(one.flat.sums, SGD, True, 0.5)
            else:
                one.flat.update_adam(one.flat.sums, ADAM, True, math.inf)
        found, expected = (one.numbers(*keys) for one in both)
        assert found[-2].item() == step + 1
        assert found[-3].item() == 0
        assert_alike(found, expected, dtype)


def zero_if_none(grads):
    return [torch.zeros(n, dtype=torch.float64) if g is None else g.cpu().double() for n, g in zip(NUMELS, grads)]


def dot(some, others):
    return sum((a * b).sum().item() for a, b in zip(some, others, strict=True))


@graphed.where
@every_keeping_rule
@pytest.mark.parametrize("kind", ["cuda", "cpp"])
def test_direction_sums(backend, kind, rule):
    """The formulas in float64, of both: where a parameter lacks one of two gradients its ĝ_min is 0."""
    one = Flat(kind)
    grads = one.come_to_update(mixing(rule))
    first, second, *third = map(zero_if_none, grads)
    if rule is Rule.EXTRAPOLATED:
        r = [NUMBERS[rule][group] for group, _ in PLACES]
        both = [g is not None and g_max is not None for g, g_max in zip(*grads, strict=True)]
        y = [b * (g - each * (g_max - g)) for b, each, g, g_max in zip(both, r, first, second, strict=True)]
        x = [g + g_max for g, g_max in zip(first, second, strict=True)]
        assert one.flat.sums[MIN].item() == pytest.approx(dot(y, y), rel=1e-12)
        assert one.flat.sums[MAX].item() == pytest.approx(dot(second, second), rel=1e-12)
    else:
        x = [g + g_max for g, g_max in zip(first, second, strict=True)] if third else first
        y = third[0] if third else second
        assert one.flat.sums[rule.last_slot].item() == pytest.approx(dot(y, y), rel=1e-12)
    assert one.flat.sums[SQUARE].item() == pytest.approx(dot(x, x), rel=1e-12)
    assert one.flat.sums[PRODUCT].item() == pytest.approx(dot(x, y), rel=1e-12)


@graphed.where
@every_keeping_rule
@pytest.mark.parametrize("operator", ["merge", "combine"])
def test_directions_are_the_cpus(backend, rule, operator):
    """Also of parameters whose last pass has no gradient, or only that one has."""
    found, expected = pair(torch.float32)
    for one in (found, expected):
        one.come_to_update(mixing(rule))
        if operator == "merge":
            one.flat.merge(one.flat.sums, 0.5)
        else:
            one.flat.combine(one.flat.sums, True, 0.5)
    there = [[p.grad for p in one.params if p.grad is not None] for one in (found, expected)]
    assert len(there[0]) == len(NUMELS) - 1
    assert_alike(*there, torch.float32)


@graphed.where
@every_rule
def test_exempt_parameters_stay_and_have_their_share_of_d(backend, rule):
    both = pair(torch.float32, exempt=True)
    for one in both:
        before = [p.detach().clone() for p in one.params]
        one.come_to_update(mixing(rule))
        assert one.flat.sums[ASCENT].item() == 0
        assert all(map(torch.equal, one.params, before))
        one.flat.update_sgd(one.flat.sums, SGD, True, math.inf)
        moved = [not torch.equal(p, w) for p, w in zip(one.params, before, strict=True)]
        assert moved == [True, True, rule.keeps, True, False]
    assert_alike(*(one.numbers("momentum_buffer", "step") for one in both), torch.float32)


@graphed.where
def test_exempt_parameters_whose_g_and_g_max_are_too_long(backend):
    """3e38 is beyond half of what float32 holds: so may d be, and g + g_max says so as it does where w moves."""
    one = Flat("cuda", torch.float32, exempt=True)
    one.read(1, WITHOUT[0])
    one.flat.ascend(one.flat.sums, RADII, 1e-12, mixing(Rule.BILATERAL))
    one.read(1, WITHOUT[1], scale=1e38)
    one.flat.descend(one.flat.sums, RADII_MIN, 1e-12)
    assert math.isnan(one.flat.sums[MAX].item())


@graphed.where
def test_a_loss_budget_bounds_the_ascent(backend):
    """By budget / n, in the second group alone, where the radius is longer than that."""
    one = Flat("cuda")
    w = [p.detach().clone() for p in one.params]
    grads = one.read(1, WITHOUT[0])
    plain = [radius._replace(adaptive=False) for radius in RADII]
    one.flat.square_norm(ASCENT, plain)
    n = math.sqrt(one.flat.sums[ASCENT].item())
    one.flat.ascend(one.flat.sums, plain, 1e-12, mixing(Rule.LAST_ALONE))
    for i, g in enumerate(grads):
        if g is not None:
            reach = -20.0 / n if PLACES[i][0] else 0.3
            torch.testing.assert_close(one.params[i].detach(), w[i] + reach / n * g, rtol=1e-12, atol=1e-12)


NEXT = {Rule.EXTRAPOLATED: (0.1, 0.9), Rule.SURROGATE_GAP: (0.9, 0.1), Rule.WEIGHTED: (0.2, 0.8)}


def replay(one, step, tables):
    """Capture the launches of ``step()`` and make them after other options are written."""
    shim = host_graphs.shim()
    first = shim.shim_captured()
    shim.shim_capture(True)
    try:
        step()
    finally:
        shim.shim_capture(False)
    last = shim.shim_captured()
    one.flat.write_options(tables)
    for i in range(first, last):
        shim.shim_launch(i)


@pytest.mark.parametrize("rule", NEXT)
def test_replays_read_the_numbers_written_last(rule):
    """Of direction_sums and the update; also the largest, by which a step is skipped: here where it is 1e39."""
    both = pair(torch.float32)

    def step(one, numbers, seed, max_norm=0.5):
        one.come_to_update(mixing(rule, numbers), seed)
        one.flat.update_sgd(one.flat.sums, SGD, True, max_norm)

    for one in both:
        step(one, NUMBERS[rule], 1)
    tables = [RADII, [], SGD, mixing(rule, NEXT[rule]).numbers]
    replay(both[0], lambda: step(both[0], NUMBERS[rule], 11), tables)
    step(both[1], NEXT[rule], 11)
    found, expected = (one.numbers("momentum_buffer", "step") for one in both)
    assert_alike(found, expected, torch.float32)
    before = [p.detach().clone() for p in both[0].params]
    tables[-1] = [number._replace(largest=1e39) for number in tables[-1]]
    replay(both[0], lambda: step(both[0], NEXT[rule], 21, math.inf), tables)
    skipped = rule is not Rule.WEIGHTED  # whose coefficients are bounded: none of a number beyond 1 is one
    assert both[0].flat.skipped.item() == skipped
    assert all(map(torch.equal, both[0].params, before)) == skipped
