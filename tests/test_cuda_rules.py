"""The CUDA backend's directions, FlatParams by FlatParams: beside the CPU's loops, their sums beside the formulas."""

import math

import graphed
import pytest
import torch
from cuda_flats import (
    ADAM,
    NUMBERS,
    NUMELS,
    PLACES,
    RADII,
    RADII_MIN,
    SGD,
    WITHOUT,
    Flat,
    assert_alike,
    dot,
    mixing,
    pair,
    replay,
    zero_if_none,
)
from samples import DTYPES

from bsam_fused.ops.contract import ASCENT, MAX, MIN, PRODUCT, SCALE, SQUARE, Rule

every_rule = pytest.mark.parametrize("rule", Rule)
every_keeping_rule = pytest.mark.parametrize("rule", [rule for rule in Rule if rule.keeps])


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
                one.update(0.5)
            else:
                one.flat.update_adam(one.flat.sums, ADAM, True, math.inf)
        found, expected = (one.numbers(*keys) for one in both)
        assert found[-2].item() == step + 1
        assert found[-3].item() == 0
        assert_alike(found, expected, dtype)


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


MIXED = [(operator, rule) for operator in ("merge", "combine") for rule in Rule if rule.keeps and rule.mixes]


@graphed.where
@pytest.mark.parametrize(("operator", "rule"), [*MIXED, ("combine", Rule.REUSED)])
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
    assert len(there[0]) == len(NUMELS) - 1 - (rule is Rule.REUSED)
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
        one.update()
        moved = [not torch.equal(p, w) for p, w in zip(one.params, before, strict=True)]
        assert moved == [True, True, rule.keeps and rule.mixes, True, False]
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


NEXT = {
    Rule.EXTRAPOLATED: (0.1, 0.9),
    Rule.SURROGATE_GAP: (0.9, 0.1),
    Rule.WEIGHTED: (0.2, 0.8),
    Rule.REUSED: (0.2, 0.9),
    Rule.FRIENDLY: (0.3, 0.8),
}


@pytest.mark.parametrize("rule", NEXT)
def test_replays_read_the_numbers_written_last(rule):
    """Of every launch of a step; also the largest, by which a step is skipped: here where it is 1e39."""
    both = pair(torch.float32)
    before, after = mixing(rule), mixing(rule, NEXT[rule], (0.5, 0.8))

    def step(one, how, seed, max_norm=0.5):
        one.come_to_update(how, seed)
        one.update(max_norm)

    for one in both:
        step(one, before, 1)
    replay(both[0], lambda: step(both[0], before, 11), [RADII, [], SGD, after.numbers])
    step(both[1], after, 11)
    found, expected = (one.numbers("momentum_buffer", "step") for one in both)
    assert_alike(found, expected, torch.float32)
    state = [x.clone() for x in both[0].numbers("momentum_buffer", "step")[:-3]]
    beyond = [number._replace(largest=1e39) for number in after.numbers]
    replay(both[0], lambda: step(both[0], after, 21, math.inf), [RADII, [], SGD, beyond])
    skipped = rule is not Rule.WEIGHTED  # whose coefficients are bounded: none of a number beyond 1 is one
    assert both[0].flat.skipped.item() == skipped
    assert all(map(torch.equal, both[0].numbers("momentum_buffer", "step")[:-3], state)) == skipped
