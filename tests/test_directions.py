"""Every rule of a direction on every backend, at the level of FlatParams, beside the papers' symbols in float64."""

import itertools
import math
from typing import NamedTuple

import pytest
import reference
import torch
from samples import TOLERANCE, interpreted

from bsam_fused.ops import dispatch
from bsam_fused.ops.contract import (
    ASCENT,
    GIVEN_KEPT,
    GIVEN_LAST,
    MAX,
    MIN,
    PRODUCT,
    SCALE,
    SLOTS,
    SQUARE,
    AdamScalars,
    Mixing,
    Radius,
    Rule,
    RuleNumber,
    SGDScalars,
)
from bsam_fused.ops.directions import Direction

SCALE_OF_LOSS, MAX_NORM, SHARE = 8.0, 0.25, 0.5
GIVEN = (-0.3, 1.7)
# The second group is maximised, adaptive, and reaches as far as its loss budget lets it.
RADII = [Radius(0.1, False, 0.0, 0.2), Radius(-0.2, True, 0.1, 0.2, 0.9)]
DESCENT = [Radius(-0.05, False, 0.0, 0.07), Radius(0.07, True, 0.1, 0.07)]
NORM_EPS = 1e-12
NUMBERS = {
    Rule.LAST_ALONE: (),
    Rule.BILATERAL: (0.0, 0.0),
    Rule.EXTRAPOLATED: (0.5, 0.8),
    Rule.SURROGATE_GAP: (0.4, 0.7),
    Rule.WEIGHTED: (0.9, 0.2),
    Rule.GIVEN: (0.0, 0.0),
}
# Of each tensor its shape, its param group, and the passes without a gradient (-1: the last). The first FlatParams is
# perturbed, the second exempt.
TENSORS = (
    ([((7,), 0, ()), ((33, 5), 1, ()), ((13,), 0, (-1,)), ((4,), 1, (0,))], False),
    ([((3, 2), 0, (1,)), ((1500,), 1, ()), ((5,), 1, (-1,)), ((), 0, (0,))], True),
)
SGD = [SGDScalars(0.5, 0.9, 0.1, 0.01, False, False), SGDScalars(0.4, 0.0, 0.0, 0.0, False, True)]
ADAM = [AdamScalars(0.1, 0.9, 0.99, 1e-3, 0.01, False, False), AdamScalars(0.2, 0.8, 0.9, 1e-3, 0.1, True, True)]


class Tensors(NamedTuple):
    """Of every tensor of all FlatParams."""

    w: list
    groups: list
    exempt: list


def double(tensors):
    return [None if t is None else t.detach().cpu().to(torch.float64, copy=True) for t in tensors]


def dot(xs, ys):
    return sum((x * y).sum().item() for x, y in zip(xs, ys, strict=True))


def filled(gs, ws):
    return [torch.zeros_like(w) if g is None else g for g, w in zip(gs, ws, strict=True)]


def expected_d(rule, numbers, passes, tensors):
    """The papers' d; a gradient that is missing is 0."""
    g, last = filled(passes[0], tensors.w), filled(passes[-1], tensors.w)
    number = [numbers[group] if numbers else 0.0 for group in tensors.groups]
    if rule is Rule.LAST_ALONE:
        return last
    if rule is Rule.BILATERAL:
        g_max = filled(passes[1], tensors.w)
        c = math.sqrt(dot(g_max, g_max) / dot(last, last))
        return [x + y - c * z for x, y, z in zip(g, g_max, last, strict=True)]
    if rule is Rule.EXTRAPOLATED:
        lack = [None in pair for pair in zip(passes[0], passes[-1], strict=True)]
        g_min = [0 * x if no else x - r * (y - x) for x, y, r, no in zip(g, last, number, lack, strict=True)]
        c = math.sqrt(dot(last, last) / dot(g_min, g_min))
        return [x + y - c * z for x, y, z in zip(g, last, g_min, strict=True)]
    if rule is Rule.SURROGATE_GAP:
        along = dot(g, last) / dot(last, last)
        return [y - alpha * (x - along * y) for x, y, alpha in zip(g, last, number, strict=True)]
    if rule is Rule.WEIGHTED:
        return [(1 - 2 * c) / (1 - c) * x + c / (1 - c) * y for x, y, c in zip(g, last, number, strict=True)]
    return [GIVEN[0] * x + GIVEN[1] * y for x, y in zip(g, last, strict=True)]


def finished(d, clipped, share=1.0):
    """d / scale, clipped as torch does it."""
    d = [share * x / SCALE_OF_LOSS for x in d]
    norm = math.sqrt(dot(d, d))
    return [x * min(MAX_NORM / (norm + 1e-6), 1.0) for x in d] if clipped else d


class Step:
    """Steps of two FlatParams, one exempt from the perturbation, and what the papers say of them."""

    def __init__(self, backend, dtype, rule, clipped):
        self.rule, self.dtype, self.max_norm = rule, dtype, MAX_NORM if clipped else math.inf
        # Groups' numbers may differ only where d is not clipped, but extrapolated.
        numbers = NUMBERS[rule]
        self.numbers = numbers[:1] * 2 if clipped and rule is not Rule.EXTRAPOLATED else numbers
        self.mixing = Mixing(rule, [RuleNumber(x, max(self.numbers)) for x in self.numbers])
        build = dispatch._FACTORIES[backend]
        self.flats, self.without = [], []
        for tensors, exempt in TENSORS:
            params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape, _, _ in tensors]
            places = [(group, i) for i, (_, group, _) in enumerate(tensors)]
            self.flats.append(build(params, places, None, exempt))
            self.without += [passes for *_, passes in tensors]
        self.params = [p for flat in self.flats for p in flat.params]
        self.passes = []

    @property
    def tensors(self):
        groups = [group for flat in self.flats for group, _ in flat.places]
        exempt = [exempt for tensors, exempt in TENSORS for _ in tensors]
        return Tensors(double(self.params), groups, exempt)

    def totals(self):
        totals = sum(flat.sums for flat in self.flats)
        totals[SCALE] = SCALE_OF_LOSS
        totals[GIVEN_KEPT], totals[GIVEN_LAST] = GIVEN
        return totals

    def read(self, k):
        """Make and read the gradients of the k-th pass, -1 the last."""
        grads = [
            None if k in passes else torch.randn(p.shape).to(p.dtype) for p, passes in zip(self.params, self.without)
        ]
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        self.passes.append(double(grads))
        for flat in self.flats:
            flat.read_gradients()

    def to_last_pass(self):
        self.passes, self.before = [], self.tensors
        self.read(0)
        for flat in self.flats:
            flat.square_norm(ASCENT, RADII)
        self.n = math.sqrt(self.totals()[ASCENT].item())
        totals = self.totals()
        for flat in self.flats:
            flat.ascend(totals, RADII, NORM_EPS, self.mixing)
        self.check_perturbed(RADII)
        if self.rule is Rule.BILATERAL:
            self.read(1)
            for flat in self.flats:
                flat.descend(totals, DESCENT, NORM_EPS)
            self.check_perturbed(DESCENT)
        self.read(-1)
        for flat in self.flats:
            if self.rule.keeps:
                flat.direction_sums()
            else:
                flat.square_norm(MAX, RADII[:1] * 2)

    def check_perturbed(self, radii):
        """w + ρ T² g / n, |ρ| at most σ / n; n and w know nothing of what is exempt."""
        w, groups, exempt = self.before
        options = [{"eta": o.eta, "adaptive": o.adaptive} for o in (radii[group] for group in groups)]
        g = [None if left_out else x for x, left_out in zip(self.passes[0], exempt, strict=True)]
        assert reference.ascent_norm(w, g, options) == pytest.approx(self.n, rel=1e-6)
        for x, slope, o, group, p in zip(w, g, options, groups, self.params, strict=True):
            radius = radii[group]
            rho = math.copysign(min(abs(radius.radius), radius.budget / self.n), radius.radius)
            moved = x if slope is None else x + rho * reference.T(x, o) ** 2 * slope / self.n
            self.close([p], [moved])

    def close(self, found, expected):
        tolerance = 4 * TOLERANCE[self.dtype]
        for a, b in zip(double(found), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


BASES = {"sgd": SGD, "adam": ADAM}
CASES = list(itertools.product([torch.float32, torch.float64, torch.bfloat16], BASES))
WITHOUT_HISTORY = [rule for rule in Rule if rule.history is None]  # the others are test_history.py's
RULES = pytest.mark.parametrize("rule", WITHOUT_HISTORY, ids=lambda rule: rule.name)


@RULES
def test_an_update_is_the_bases_with_the_papers_direction(backend, rule):
    """Scaled, with a maximised group and missing gradients; Adam's clipped. Two steps: nothing is left of the first."""
    for dtype, base in [CASES[rule]] if interpreted(backend) else CASES:
        groups, clipped = BASES[base], base == "adam"
        step = Step(backend, dtype, rule, clipped)
        state = [{} for _ in step.params]
        for _ in range(1 if interpreted(backend) else 2):
            step.to_last_pass()
            totals = step.totals()
            w, of_group, _ = step.before
            ds = finished(expected_d(rule, step.numbers, step.passes, step.before), clipped)
            options = [groups[group]._asdict() for group in of_group]
            expected = [updated(base, *of_tensor) for of_tensor in zip(w, ds, state, options, strict=True)]
            for flat in step.flats:
                flat.begin_state(flat.beginning([o.stateful for o in groups]))
                getattr(flat, f"update_{base}")(totals, groups, True, step.max_norm)
                assert flat.updated
                assert flat.skipped == 0
            step.close(step.params, expected)


def updated(base, w, d, state, o):
    if base == "sgd":
        return reference.sgd(w, d, state, o)
    return reference.adam(w, d, state, o | {"betas": (o["beta1"], o["beta2"])}, o["decoupled"])


@RULES
def test_combine_gives_the_direction_to_any_base(backend, rule):
    """d over the scale, clipped, in .grad; w in the weights, exempt or not, whatever a base then does to them."""
    for dtype in [torch.float32] if interpreted(backend) else [torch.float32, torch.bfloat16]:
        step = Step(backend, dtype, rule, True)
        step.to_last_pass()
        totals = step.totals()
        for flat in step.flats:
            assert flat.combine(totals, True, step.max_norm)
        ds = finished(expected_d(rule, step.numbers, step.passes, step.before), True)
        step.close([p.grad for p in step.params], ds)
        step.close(step.params, step.before.w)
        with torch.no_grad():
            torch._foreach_zero_(step.params)
        for flat in step.flats:
            flat.restore()
        assert all(torch.equal(a, b) for a, b in zip(double(step.params), step.before.w, strict=True))


@pytest.mark.parametrize("rule", [rule for rule in WITHOUT_HISTORY if rule.keeps])
def test_merged_directions_go_on_as_one_pass(backend, rule):
    """As if the share of d, at a quarter of the loss's scale, were SAM's g_max."""
    step = Step(backend, torch.float32, rule, True)
    step.to_last_pass()
    totals = step.totals()
    totals[SCALE] = 4
    for flat in step.flats:
        flat.merge(totals, SHARE)
        flat.read_gradients()
        flat.square_norm(MAX, RADII[:1] * 2)
    totals = step.totals()
    totals[SCALE] /= 4
    for flat in step.flats:
        flat.begin_state(flat.beginning([True, False]))
        flat.update_sgd(totals, SGD, True, step.max_norm)
    ds = finished(expected_d(rule, step.numbers, step.passes, step.before), True, SHARE)
    w, groups, _ = step.before
    step.close(step.params, [reference.sgd(x, d, {}, SGD[i]._asdict()) for x, d, i in zip(w, ds, groups, strict=True)])


@pytest.mark.parametrize("rule", [rule for rule in WITHOUT_HISTORY if rule.mixes and rule.keeps])
def test_headroom(rule):
    """d / it is within a limit that its gradients reach; of several sums the largest, and 1 where the limit is far."""
    step = Step("torch", torch.float64, rule, False)
    step.to_last_pass()
    totals = step.totals()
    passes = [filled(gs, step.before.w) for gs in step.passes]
    kept = passes[0] if rule is not Rule.BILATERAL else [x + y for x, y in zip(*passes[:2], strict=True)]
    longest = max(float(x.abs().max()) for x in [*kept, *passes[-1]])
    d = max(float(x.abs().max()) for x in expected_d(rule, step.numbers, step.passes, step.before))

    def room(limit, *others):
        direction = Direction(rule, True, math.inf, limit, max(step.numbers))
        return direction.headroom(torch.stack([totals, *others], 1)).item()

    assert d <= room(longest) * longest
    assert math.frexp(room(longest))[0] == 0.5
    assert room(longest, totals * math.nan, totals * math.inf) == room(longest)
    assert room(longest / 4, 1e-9 * totals) == room(longest / 4) > 1
    assert room(1e4 * longest) == 1


@pytest.mark.parametrize(("x", "y", "room"), [(3.0, 0.0, 16), (0.0, 3.0, 16), (3.0, -3.0, 32), (0.1, 0.1, 1)])
def test_headroom_of_one_element(x, y, room):
    """WSAM's d = 9 y − 8 x, where 3 is the limit."""
    sums = torch.zeros(SLOTS, 1, dtype=torch.float64)
    sums[SQUARE], sums[MAX], sums[PRODUCT] = x * x, y * y, x * y
    assert Direction(Rule.WEIGHTED, True, math.inf, 3.0, 0.9).headroom(sums) == room


@pytest.mark.parametrize("rule", [Rule.EXTRAPOLATED, Rule.SURROGATE_GAP, Rule.GIVEN])
def test_a_coefficient_beyond_the_limit_skips_the_step(backend, rule):
    """Also where only another group's number makes it so, as all FlatParams decide alike."""
    step = Step(backend, torch.float32, rule, False)
    step.mixing = Mixing(rule, [RuleNumber(0.5, 1e39)] * 2)
    step.to_last_pass()
    totals = step.totals()
    if rule is Rule.GIVEN:
        totals[GIVEN_KEPT] = math.nan
    for flat in step.flats:
        flat.begin_state(flat.beginning([True, False]))
        flat.update_sgd(totals, SGD, True, math.inf)
        assert flat.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(double(step.params), step.before.w, strict=True))


def test_no_surrogate_gap_without_a_last_gradient(backend):
    """g⊥ is 0 where ‖g_max‖ is, and so is d: nothing moves but by weight decay."""
    step = Step(backend, torch.float32, Rule.SURROGATE_GAP, False)
    step.to_last_pass()
    totals = step.totals()
    totals[MAX] = totals[MIN] = totals[PRODUCT] = 0
    for p in step.params:
        p.grad = torch.zeros_like(p)
    plain = [o._replace(weight_decay=0.0, momentum=0.0) for o in SGD]
    for flat in step.flats:
        flat.read_gradients()
        flat.update_sgd(totals, plain, True, math.inf)
    assert all(torch.equal(a, b) for a, b in zip(double(step.params), step.before.w, strict=True))


def test_an_exempt_gradient_may_be_too_long(backend):
    """Nothing that bounds g is in Σ (T g)²: `descend` has to look at g + g_max itself."""
    flat = Step(backend, torch.float32, Rule.BILATERAL, False).flats[1]
    plain = [Radius(0.1)] * 2
    huge = [torch.full_like(p, 3e38) for p in flat.params]
    for p, g in zip(flat.params, huge, strict=True):
        p.grad = g
    flat.read_gradients()
    flat.square_norm(ASCENT, plain)
    assert flat.sums[ASCENT] == 0
    flat.ascend(flat.sums, plain, NORM_EPS, Mixing(Rule.BILATERAL, [RuleNumber()] * 2))
    for p in flat.params:
        p.grad = torch.ones_like(p)
    flat.read_gradients()
    flat.descend(flat.sums, plain, NORM_EPS)
    assert flat.sums[MAX].isnan()
