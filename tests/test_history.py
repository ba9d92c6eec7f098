"""What a step remembers for the next ones, on every backend, at the level of FlatParams, beside formulas in float64.

LookSAM's v and Friendly SAM's m: where they come from, what they are in the direction, and that they are written with
the update or not at all.
"""

import math

import pytest
import reference
import torch
from samples import TOLERANCE, strided

from bsam_fused.ops import dispatch, rounding
from bsam_fused.ops.contract import (
    ASCENT,
    MAX,
    PRODUCT,
    SQUARE,
    AdamScalars,
    Mixing,
    Radius,
    Rule,
    RuleNumber,
    SGDScalars,
)
from bsam_fused.ops.one_go import in_one_go

V, M = Rule.ORTHOGONAL.history, Rule.FRIENDLY.history
# The second group is maximised, and adaptive.
RADII = [Radius(0.1, False, 0.0, 0.2), Radius(-0.2, True, 0.1, 0.2)]
PLAIN = [Radius(0.0), Radius(0.0)]
NORM_EPS = 1e-12
ALPHA = [0.7, 0.2]
SIGMA, DECAY = [0.5, 1.5], [0.9, 0.6]
MIXINGS = {
    Rule.LAST_ALONE: Mixing(),
    Rule.ORTHOGONAL: Mixing(Rule.ORTHOGONAL, [RuleNumber()] * 2),
    Rule.REUSED: Mixing(Rule.REUSED, [RuleNumber(x, max(ALPHA)) for x in ALPHA]),
    Rule.FRIENDLY: Mixing(Rule.FRIENDLY, [RuleNumber(x, max(SIGMA), y) for x, y in zip(SIGMA, DECAY)]),
}
SGD = [SGDScalars(0.5, 0.9, 0.1, 0.01, False, False), SGDScalars(0.4, 0.0, 0.0, 0.0, False, True)]
ADAM = [AdamScalars(0.1, 0.9, 0.99, 1e-3, 0.01, False, False), AdamScalars(0.2, 0.8, 0.9, 1e-3, 0.1, True, True)]
# Of each tensor its shape, its param group, and the passes without a gradient (-1: the last): none has both, and one
# none at all. The first FlatParams is perturbed, the second exempt.
TENSORS = (
    ([((7,), 0, ()), ((33, 5), 1, ()), ((13,), 0, (-1,)), ((4,), 1, (0,)), ((2,), 0, (0, -1))], False),
    ([((3, 2), 0, ()), ((5,), 1, (-1,)), ((), 0, (0,))], True),
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
remembering = pytest.mark.parametrize("rule", [Rule.ORTHOGONAL, Rule.FRIENDLY], ids=lambda rule: rule.name)


def double(tensors):
    return [None if t is None else t.detach().cpu().to(torch.float64, copy=True) for t in tensors]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def square(tensors):
    return sum(t.square().sum().item() for t in tensors if t is not None)


class Run:
    """Steps of two FlatParams, one exempt from the perturbation."""

    def __init__(self, backend, dtype=torch.float32):
        self.dtype, self.flats, self.without, self.groups, self.exempt = dtype, [], [], [], []
        for tensors, exempt in TENSORS:
            params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape, _, _ in tensors]
            places = [(group, i) for i, (_, group, _) in enumerate(tensors)]
            self.flats.append(dispatch._FACTORIES[backend](params, places, None, exempt))
            self.without += [passes for *_, passes in tensors]
            self.groups += [group for group, _ in places]
            self.exempt += [exempt] * len(params)
        self.params = [p for flat in self.flats for p in flat.params]

    def state(self, key):
        return [t for flat in self.flats for t in flat.state(key)]

    def read(self, k):
        """Make and read the gradients of a pass; returns them."""
        for p, passes in zip(self.params, self.without, strict=True):
            p.grad = None if k in passes else torch.randn(p.shape).to(self.dtype)
        for flat in self.flats:
            flat.read_gradients()
        return double(p.grad for p in self.params)

    def totals(self):
        return sum(flat.sums for flat in self.flats)

    def each(self, name, *args):
        return [getattr(flat, name)(*args) for flat in self.flats]

    def remember(self):
        """As it is once a base has made its own step."""
        for flat in self.flats:
            in_one_go(*flat.remembering())

    def combined(self):
        """Hand d over to a base, which may do what it likes to it; returns it."""
        assert all(self.each("combine", self.totals(), True, math.inf))
        ds = [None if p.grad is None else p.grad.clone() for p in self.params]
        with torch.no_grad():
            for p in self.params:
                p.sub_(0.1)
                if p.grad is not None:
                    p.grad.zero_()
        return ds

    def turn(self):
        """Have others lack gradients from now on."""
        self.without = self.without[1:] + self.without[:1]

    def to_last_pass(self, rule):
        """Returns the gradients of both passes."""
        mixing, passes = MIXINGS[rule], [self.read(0)]
        self.each(*(("mix", RADII, mixing) if rule is Rule.FRIENDLY else ("square_norm", ASCENT, RADII)))
        self.each("ascend", self.totals(), RADII, NORM_EPS, mixing)
        passes.append(self.read(-1))
        self.each(*(("direction_sums",) if rule is Rule.ORTHOGONAL else ("square_norm", MAX, PLAIN)))
        return passes

    def to_only_pass(self):
        """Returns its gradients."""
        g = self.read(0)
        self.each("begin_plain", MIXINGS[Rule.REUSED])
        self.each("direction_sums")
        return g

    def update(self, base="sgd", totals=None):
        groups = {"sgd": SGD, "adam": ADAM}[base]
        self.each(f"update_{base}", self.totals() if totals is None else totals, groups, True, math.inf)

    def begin(self, rule):
        """Make a first step that remembers something; returns the history."""
        self.to_last_pass(rule)
        self.update()
        return [t.clone() for t in self.state(rule.history)]

    def close(self, found, expected):
        tolerance = 8 * TOLERANCE[self.dtype]
        for a, b in zip(double(found), expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def updated(base, w, d, state, o):
    if base == "sgd":
        return reference.sgd(w, d, state, o)
    return reference.adam(w, d, state, o | {"betas": (o["beta1"], o["beta2"])}, o["decoupled"])


def base_steps(run, base, state, w, ds):
    """The next weights; a parameter without a gradient in the whole step stays."""
    options = [{"sgd": SGD, "adam": ADAM}[base][group]._asdict() for group in run.groups]
    return [x if d is None else updated(base, x, d, s, o) for x, d, s, o in zip(w, ds, state, options, strict=True)]


def orthogonal(g, g_max):
    """v = g_max − (⟨g, g_max⟩ / ‖g‖²) g, a missing gradient 0; None where there is no gradient at all."""
    along = reference.product(g, g_max) / square(g)
    return [
        None if x is None and y is None else (0 if y is None else y) - along * (0 if x is None else x)
        for x, y in zip(g, g_max, strict=True)
    ]


def last_or_zero(passes):
    return [y if y is not None else None if x is None else torch.zeros_like(x) for x, y in zip(*passes, strict=True)]


CASES = [(torch.float32, "sgd"), (torch.float64, "adam"), (torch.bfloat16, "sgd")]


@pytest.mark.parametrize(("dtype", "base"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_look_sam(backend, dtype, base):
    """SAM's step, whose v is remembered; two of g and v in one pass, which leave v as it is; and SAM's again."""
    run = Run(backend, dtype)
    state, v = [{} for _ in run.params], [torch.zeros_like(p) for p in double(run.params)]
    for rule in [Rule.ORTHOGONAL, Rule.REUSED, Rule.REUSED, Rule.ORTHOGONAL]:
        w, before = double(run.params), [t.clone() for t in run.state(V)]
        if rule is Rule.REUSED:
            g = run.to_only_pass()
            norms = square(g), square(x for x, y in zip(v, g, strict=True) if y is not None)
            assert run.totals()[MAX].item() == pytest.approx(norms[0], rel=1e-6)
            assert run.totals()[SQUARE].item() == pytest.approx(norms[1], rel=1e-6)
            ratio = math.sqrt(norms[0] / norms[1])
            ds = [
                None if x is None else x + ALPHA[group] * ratio * y
                for x, y, group in zip(g, v, run.groups, strict=True)
            ]
        else:
            passes = run.to_last_pass(rule)
            ds, new = last_or_zero(passes), orthogonal(*passes)
        run.update(base)
        expected = base_steps(run, base, state, w, ds)
        run.close(run.params, expected)
        if rule is Rule.REUSED:
            assert same(run.state(V), before)
        else:
            v = [x if y is None else y for x, y in zip(v, new, strict=True)]
            run.close(run.state(V), v)
            v = double(run.state(V))
        run.turn()


@pytest.mark.parametrize(("dtype", "base"), CASES, ids=lambda x: str(x).removeprefix("torch."))
def test_friendly_sam(backend, dtype, base):
    """Along q = g − σ m, of the old m; SAM's direction; m begins as g. What is exempt has neither q nor m."""
    run = Run(backend, dtype)
    state, m = [{} for _ in run.params], [torch.zeros_like(p) for p in double(run.params)]
    options = [RADII[group]._asdict() for group in run.groups]
    for step in range(3):
        w, g = double(run.params), run.read(0)
        grads = [p.grad for p in run.params]
        left = [None if p.grad is None else p.grad.clone() for p in run.params]
        run.each("mix", RADII, MIXINGS[Rule.FRIENDLY])
        assert all(p.grad is grad for p, grad in zip(run.params, grads, strict=True))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, left, strict=True))
        q = [
            None if x is None or exempt else x - SIGMA[group] * y
            for x, y, group, exempt in zip(g, m, run.groups, run.exempt, strict=True)
        ]
        n = reference.ascent_norm(w, q, options)
        rel = TOLERANCE[dtype] * 4
        assert run.totals()[ASCENT].item() == pytest.approx(n * n, rel=rel)
        assert run.totals()[PRODUCT].item() == pytest.approx(square(q), rel=rel)
        assert run.totals()[SQUARE].item() == pytest.approx(
            square(x for x, y in zip(m, q, strict=True) if y is not None), rel=1e-6
        )
        run.each("ascend", run.totals(), RADII, NORM_EPS, MIXINGS[Rule.FRIENDLY])
        moved = [
            x if slope is None else x + o["radius"] * reference.T(x, o) ** 2 * slope / n
            for x, slope, o in zip(w, q, options, strict=True)
        ]
        run.close(run.params, moved)
        last = run.read(-1)
        run.each("square_norm", MAX, PLAIN)
        run.update(base)
        run.close(run.params, base_steps(run, base, state, w, last_or_zero([g, last])))
        new = [
            y if x is None or exempt else x if step == 0 else DECAY[group] * y + (1 - DECAY[group]) * x
            for x, y, group, exempt in zip(g, m, run.groups, run.exempt, strict=True)
        ]
        run.close(run.state(M), new)
        m = double(run.state(M))
        run.turn()


@remembering
def test_a_base_of_its_own_remembers_when_it_has_stepped(backend, rule):
    """Not before, what a fused update remembers, and whatever the base did to the gradients meanwhile."""
    histories = []
    for fused in (True, False):
        torch.manual_seed(1)
        run = Run(backend)
        before = run.begin(rule)
        passes = run.to_last_pass(rule)
        if fused:
            run.update()
        else:
            run.close(run.combined(), last_or_zero(passes))
            assert same(run.state(rule.history), before)
            run.remember()
            run.each("release")
        histories.append([t.clone() for t in run.state(rule.history)])
        assert not same(histories[-1], before)
    assert same(*histories)


@remembering
def test_a_base_that_raises_leaves_the_history(backend, rule):
    """And nothing of its step is in the history of the next one."""
    run = Run(backend)
    before = run.begin(rule)
    run.to_last_pass(rule)
    run.combined()
    run.each("restore")
    assert same(run.state(rule.history), before)
    run.to_only_pass()
    run.combined()
    run.remember()
    run.each("release")
    assert same(run.state(rule.history), before)


def test_d_for_any_base_is_not_made_where_the_history_is(backend):
    run = Run(backend)
    before = run.begin(Rule.ORTHOGONAL)
    g = run.to_only_pass()
    ratio = math.sqrt(run.totals()[MAX].item() / run.totals()[SQUARE].item())
    expected = [None if x is None else x + ALPHA[o] * ratio * y for x, y, o in zip(g, double(before), run.groups)]
    run.close(run.combined(), expected)
    run.remember()
    run.each("release")
    assert same(run.state(V), before)


FAULTS = {"g": {ASCENT: math.nan}, "g_max": {MAX: math.inf}, "too long": {SQUARE: 1e80, PRODUCT: 1e90}}


@pytest.mark.pairwise
@pytest.mark.parametrize("fault", FAULTS)
@each_dtype
@remembering
def test_a_skipped_step_leaves_the_history(backend, rule, dtype, fault):
    """Bit for bit; also where it is the history alone that would be beyond the limit."""
    run = Run(backend, dtype)
    before = run.begin(rule)
    for base in ("fused", "its own"):
        run.to_last_pass(rule)
        totals = run.totals()
        for slot, value in FAULTS[fault].items():
            totals[slot] = value
        if base == "fused":
            run.update(totals=totals)
        else:
            assert not any(run.each("combine", totals, True, math.inf))
        assert same(run.state(rule.history), before)
    assert all(flat.skipped == 2 for flat in run.flats)


@each_dtype
def test_what_does_not_count_is_not_read(backend, dtype):
    """0 · ∞ is no number: v that somebody spoiled is written anew, and without a v, or a g, it is g_max."""
    run = Run(backend, dtype)
    for t in run.state(V):
        t.fill_(math.inf)
    g, g_max = run.to_last_pass(Rule.ORTHOGONAL)
    run.update()
    v = orthogonal(g, g_max)
    run.close([None if y is None else x for x, y in zip(run.state(V), v)], v)
    run = Run(backend, dtype)
    w = double(run.params)
    g = run.to_only_pass()
    assert run.totals()[SQUARE] == 0
    run.update()
    run.close(run.params, base_steps(run, "sgd", [{} for _ in w], w, g))
    run.without = [(0,)] * len(run.params)
    _, g_max = run.to_last_pass(Rule.ORTHOGONAL)
    run.update()
    run.close(run.state(V), g_max)


def test_float16_holds_the_largest_of_what_it_cannot_hold(backend):
    """An infinite v or m would have every step until the next one skipped, or all of them; but inf stays inf."""
    dtype, most = torch.float16, torch.finfo(torch.float16).max
    p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    (flat,) = [dispatch._FACTORIES[backend]([p], [(0, 0)], None, False)]
    (m,) = flat.state(M)
    m.copy_(torch.tensor([-most, 1.0, 0.0]))
    p.grad = torch.tensor([most / 2, 1.0, -math.inf], dtype=dtype)
    flat.read_gradients()
    flat.mix([Radius(0.5)], Mixing(Rule.FRIENDLY, [RuleNumber(1.0, 1.0, 0.5)]))
    assert flat.sums[ASCENT].item() == math.inf
    assert flat.sums[SQUARE].item() == pytest.approx(most**2 + 1)
    p.grad[2] = 2.0
    flat.read_gradients()
    flat.mix([Radius(0.5)], Mixing(Rule.FRIENDLY, [RuleNumber(1.0, 1.0, 0.5)]))
    assert flat.sums[ASCENT].item() == pytest.approx(most**2 + 4)


def test_what_was_mixed_for_a_step_that_never_came(backend):
    """q is no gradient of any other step."""
    run = Run(backend)
    run.begin(Rule.FRIENDLY)
    for rule in (Rule.LAST_ALONE, Rule.ORTHOGONAL, Rule.REUSED):
        run.read(0)
        run.each("mix", RADII, MIXINGS[Rule.FRIENDLY])
        w = double(run.params)
        plain = [o._replace(momentum=0.0, weight_decay=0.0) for o in SGD]
        if rule is Rule.REUSED:
            g, v = run.to_only_pass(), double(run.state(V))
            ratio = math.sqrt(run.totals()[MAX].item() / run.totals()[SQUARE].item())
            ds = [None if x is None else x + ALPHA[o] * ratio * y for x, y, o in zip(g, v, run.groups)]
        else:
            passes = run.to_last_pass(rule)
            ds = last_or_zero(passes)
        run.each("update_sgd", run.totals(), plain, True, math.inf)
        expected = [
            x if d is None else x - o.lr * d * (-1 if o.maximize else 1)
            for x, d, o in zip(w, ds, (plain[group] for group in run.groups))
        ]
        run.close(run.params, expected)
        if rule is Rule.ORTHOGONAL:
            v = orthogonal(*passes)
            run.close([None if y is None else x for x, y in zip(run.state(V), v)], v)


def alone(backend, params, seed=None):
    return dispatch._FACTORIES[backend](params, [(0, i) for i in range(len(params))], seed, False)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "a base of its own"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@remembering
def test_the_same_bits_on_every_backend(backend, rule, dtype, fused):
    """Arithmetic is exact here, so that rounding alone is seen: the bits are those of the step that remembers.

    Of parameters in strides of their own. ⟨g, g_max⟩ / ‖g‖² is 1/4; σ = λ = 1/2.
    """
    params = strided(dtype)
    flat = alone(backend, params, seed=7)
    mixing = Mixing(rule, [RuleNumber(0.5, 0.5, 0.5)])
    history, drawn = [torch.zeros_like(p, dtype=torch.float32) for p in params], 0
    for step in range(3):
        passes = exact_passes(params, rule)
        for k, gs in enumerate(passes):
            for p, g in zip(params, gs):
                p.grad = torch.empty_like(p, requires_grad=False).copy_(g)
            flat.read_gradients()
            if k == 0:
                flat.mix(PLAIN, mixing) if rule is Rule.FRIENDLY else flat.square_norm(ASCENT, PLAIN)
                flat.ascend(flat.sums, PLAIN, NORM_EPS, mixing)
        flat.direction_sums() if rule is Rule.ORTHOGONAL else flat.square_norm(MAX, PLAIN)
        assert flat.step_count == step
        if fused:
            flat.update_sgd(flat.sums, SGD, True, math.inf)
        else:
            assert flat.combine(flat.sums, True, math.inf)
            in_one_go(*flat.remembering())
            flat.release()
            flat.step_count.add_(1)
        for i, (g, g_max, h) in enumerate(zip(*passes, history)):
            if rule is Rule.FRIENDLY:
                x = h / 2 + (g - h / 2).to(dtype).float() / 2 + h / 4 if step else g
            else:
                x = g_max - g / 4
            history[i] = rounded(x, flat.state(rule.history)[i], i, step + 1).float()
            drawn += (history[i] != x.to(dtype)).sum().item()
        assert same(flat.state(rule.history), [h.to(dtype) for h in history])
    assert drawn > 10


def exact_passes(params, rule):
    """Gradients of few bits; of LookSAM's, a quarter of g's square is along g_max."""
    numel = sum(p.numel() for p in params)
    looks = rule is Rule.ORTHOGONAL
    few, shift = (torch.randint(*ends, (numel,), device="cpu") for ends in ((1, 128), (4, 16 if looks else 12)))
    few = (few * 2.0 ** -shift.float()).to(torch.get_default_device())
    g, g_max = few, few.flip(0)
    if looks:
        half = numel // 2
        g = torch.ones(numel)
        g_max = torch.cat([few[: half // 2], -few[: half // 2], torch.full((half,), 0.5)])
    cut = [p.numel() for p in params]
    return [[t.view(p.shape) for t, p in zip(x.split(cut), params)] for x in (g, g_max)]


def rounded(x, like, i, step):
    """float32 x as it is rounded stochastically, elements counted as they lie in memory."""
    at = torch.arange(x.numel(), device=x.device).as_strided(x.shape, like.stride())
    key = rounding.tensor_key(7, 0, i)
    return rounding.rounded(x, like.dtype, rounding.random_bits(key, torch.tensor(step), rounding.TO_HISTORY, at))
