"""Every backend × optimizer × base × dtype × shape set, beside the papers' formulas in float64.

Gradients are prescribed, not computed, so that both sides see the same ones at each pass, and the weights are
compared after every phase. Each step of the oracle starts from the weights and state that the optimizer has
reached, so that tolerances can be those of one step's rounding.
"""

import pytest
import reference as ref
import torch
from samples import DTYPES, SHAPES, TOLERANCE, assign, gradients, interpreted, misaligned, parameters, strided

import bsam_fused

OPTIMIZERS = {
    "SAM": (bsam_fused.SAM, {"rho": 0.3}),
    "ASAM": (bsam_fused.ASAM, {"rho": 0.7, "eta": 0.05}),
    "BSAM": (bsam_fused.BSAM, {"rho": 0.3, "rho_min": 0.2, "rho_min_end": 0.05, "rho_min_lr_end": 0.001}),
    "adaptive BSAM": (bsam_fused.BSAM, {"rho": 0.3, "rho_min": 0.2, "adaptive": True, "eta": 0.1}),
}
BASES = {
    "plain SGD": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.02}, ref.sgd),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02}, ref.sgd),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, ref.sgd),
    "maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}, ref.sgd),
    "Adam": (
        torch.optim.Adam,
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.02},
        ref.adam,
    ),
    "AdamW": (
        torch.optim.AdamW,
        {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        ref.adamw,
    ),
    "Adam maximize": (torch.optim.Adam, {"lr": 0.05, "eps": 1e-3, "maximize": True}, ref.adam),
    # Not fused: the general path, with SGD's rule in its own step().
    "general": (
        type("Own", (torch.optim.SGD,), {}),
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02},
        ref.sgd,
    ),
}


def doubled(tensors):
    return [None if t is None else t.detach().double().clone() for t in tensors]


def assert_near(tensors, expected, tol, what):
    """All tensors at once, which is much faster than one by one."""
    together, others = (torch.cat([t.detach().double().reshape(-1) for t in ts]) for ts in (tensors, expected))
    torch.testing.assert_close(together, others, rtol=tol, atol=tol, msg=f"{what}: {{}}".format)


def step_beside(opt, params, options, rule, passes, given=None):
    """One step by hand beside the oracle; ``passes``: the gradients of each.

    ``given(k)``: the tensors to leave in .grad at pass k, instead of copies.
    """
    tol = TOLERANCE[params[0].dtype]
    w = doubled(params)
    state = [
        {k: v.double().clone() if k != "step" else int(v) for k, v in opt.state.get(p, {}).items()} for p in params
    ]
    grads = [doubled(g) for g in passes]
    n = ref.ascent_norm(w, grads[0], options)

    def leave(k):
        if given is None:
            assign(params, passes[k])
            return
        for p, g in zip(params, given(k % len(passes)), strict=True):
            p.grad = g

    leave(0)
    opt.ascend()
    assert_near(params, [ref.w_max(*x[:2], n, x[2]) for x in zip(w, grads[0], options)], tol, "w_max")
    assert opt.norms[0].item() == pytest.approx(n, rel=max(1e-6, TOLERANCE[torch.float64]))
    if isinstance(opt, bsam_fused.BSAM):
        leave(1)
        opt.descend()
        assert_near(params, [ref.w_min(*x[:2], n, x[2]) for x in zip(w, grads[0], options)], tol, "w_min")
        norms = ref.norm(grads[1]), ref.norm(grads[2])
        d = [ref.bsam_direction(*g, *norms, x) for *g, x in zip(*grads, w)]
        # g + g_max is kept in the gradient's dtype, as the byte budget has it.
        slack = 3
    else:
        d = [ref.sam_direction(g, g_max, x) for g, g_max, x in zip(grads[0], grads[1], w)]
        slack = 1
    leave(-1)
    opt.step()
    expected = [x if dx is None else rule(x, dx, s, o) for x, dx, s, o in zip(w, d, state, options)]
    assert_near(params, expected, slack * tol, "w")
    for key in {key for values in state for key in values}:
        pairs = [(opt.state[p][key], values[key]) for p, values in zip(params, state) if key in values]
        if key == "step":
            assert all(held == value for held, value in pairs)
        else:
            assert_near(*zip(*pairs), 2 * slack * tol, key)


def options_of(opt, params):
    return [{**group} for p in params for group in opt.param_groups if any(p is q for q in group["params"])]


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps(backend, name, base, dtype):
    """All shape sets as groups of one optimizer, each with options of its own, over three steps."""
    kind, options = OPTIMIZERS[name]
    base_class, base_options, rule = BASES[base]
    torch.manual_seed(1)
    names = [shapes for shapes in SHAPES if shapes != "many" or not interpreted(backend)]
    sets = [*(parameters(shapes, dtype) for shapes in names), strided(dtype), misaligned(dtype)]
    groups = [
        {"params": params, "rho": options["rho"] * (1 + i / 4), "lr": base_options["lr"] / (1 + i)}
        for i, params in enumerate(sets)
    ]
    # Both ways to round 16 bits, each beside every base.
    rounding = "nearest" if name in {"SAM", "adaptive BSAM"} else "stochastic"
    opt = kind(groups, base_class, backend=backend, rounding=rounding, **{**options, **base_options})
    params = [p for s in sets for p in s]
    for t in range(2 if interpreted(backend) else 3):
        for group in opt.param_groups:
            group["lr"] *= 0.7  # so that ρ_min decays
        step_beside(
            opt,
            params,
            options_of(opt, params),
            rule,
            [gradients(params, 100 * t + k) for k in range(len(opt._calls))],
        )
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", ["SAM", "BSAM"])
def test_each_shape_set_alone(backend, name, shapes):
    """The same sets one by one, so that a layout error cannot hide behind the others."""
    kind, options = OPTIMIZERS[name]
    params = parameters(shapes)
    opt = kind(params, lr=0.1, momentum=0.9, backend=backend, **options)
    for t in range(2):
        passes = [gradients(params, 7 * t + k) for k in range(len(opt._calls))]
        step_beside(opt, params, options_of(opt, params), ref.sgd, passes)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ["SAM", "BSAM"])
def test_misaligned_gradients(backend, name, dtype):
    """Views of one bucket, as DDP leaves them, at odd places: no vector fits, and none may be taken."""
    kind, options = OPTIMIZERS[name]
    params = parameters("odd", dtype) + misaligned(dtype)
    bucket = torch.zeros(1 + sum(p.numel() + 1 for p in params), dtype=dtype)
    opt = kind(params, lr=0.1, momentum=0.9, backend=backend, **options)

    def in_bucket(seed):
        views, at = [], 1
        for p, g in zip(params, gradients(params, seed)):
            views.append(bucket[at : at + p.numel()].view(p.shape).copy_(g))
            at += p.numel() + 1
        return views

    for t in range(2):
        kept = [doubled(in_bucket(10 * t + k)) for k in range(len(opt._calls))]
        step_beside(opt, params, options_of(opt, params), ref.sgd, kept, lambda k, t=t: in_bucket(10 * t + k))


@pytest.mark.pairwise
@pytest.mark.parametrize("name", ["SAM", "adaptive BSAM"])
def test_more_tensors_than_a_launch_carries(backend, name):
    """1,500 of them: on a GPU several launches a phase, whose sums and counts must come together."""
    kind, options = OPTIMIZERS[name]
    params = [torch.nn.Parameter(torch.randn(1 + i % 7)) for i in range(1500)]
    opt = kind(params, torch.optim.AdamW, lr=0.05, eps=1e-3, backend=backend, **options)
    for t in range(1 if interpreted(backend) else 2):
        passes = [gradients(params, 9 * t + k) for k in range(len(opt._calls))]
        step_beside(opt, params, options_of(opt, params), ref.adamw, passes)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("base", ["SGD", "AdamW", "general"])
@pytest.mark.parametrize("name", ["SAM", "BSAM"])
def test_gradients_in_some_passes_only(backend, name, base):
    """Zero in a pass without one; left alone without any. A parameter of each of the eight kinds, twice."""
    kind, options = OPTIMIZERS[name]
    base_class, base_options, rule = BASES[base]
    params = [torch.nn.Parameter(torch.randn(5 + i)) for i in range(16)]
    opt = kind(params, base_class, backend=backend, **{**options, **base_options})
    for t in range(3):
        passes = [
            gradients(params, 10 * t + k, without={i for i in range(16) if not (i + t) >> k & 1})
            for k in range(len(opt._calls))
        ]
        untouched = [i for i, g in enumerate(zip(*passes)) if all(x is None for x in g)]
        before = [params[i].detach().clone() for i in untouched]
        step_beside(opt, params, options_of(opt, params), rule, passes)
        assert untouched
        assert all(torch.equal(params[i], w) for i, w in zip(untouched, before))


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.BSAM])
def test_norm_is_over_everything(backend, kind):
    """One norm over groups and dtypes: a norm a group or a FlatParams would perturb each by ρ."""
    params = [torch.nn.Parameter(torch.randn(40, dtype=d)) for d in (torch.float32, torch.float64, torch.float32)]
    opt = kind([{"params": [p]} for p in params], lr=0.1, rho=0.3, backend=backend)
    for t in range(2):
        passes = [gradients(params, 5 * t + k) for k in range(len(opt._calls))]
        w = doubled(params)
        assign(params, passes[0])
        opt.ascend()
        moved = ref.norm([p.detach().double() - x for p, x in zip(params, w)])
        assert moved == pytest.approx(0.3, rel=1e-5)
        opt.restore()
        step_beside_mixed(opt, params, passes)


def step_beside_mixed(opt, params, passes):
    options = options_of(opt, params)
    grads, w = [doubled(g) for g in passes], doubled(params)
    for call, g in zip(opt._calls, passes):
        assign(params, g)
        getattr(opt, call)()
    if isinstance(opt, bsam_fused.BSAM):
        norms = ref.norm(grads[1]), ref.norm(grads[2])
        d = [ref.bsam_direction(*g, *norms, x) for *g, x in zip(*grads, w)]
    else:
        d = grads[1]
    assert_near(params, [ref.sgd(x, dx, {}, o) for x, dx, o in zip(w, d, options)], TOLERANCE[torch.float32], "w")


def test_zero_min_gradient_gives_c_zero(backend):
    params = parameters("odd")
    opt = bsam_fused.BSAM(params, lr=0.1, backend=backend)
    passes = [gradients(params, 0), gradients(params, 1), [torch.zeros_like(p) for p in params]]
    step_beside(opt, params, options_of(opt, params), ref.sgd, passes)


@pytest.mark.parametrize("magnitude", [1e-30, 1e25])
def test_norms_neither_overflow_nor_vanish(backend, magnitude):
    """Squares of these leave float32's range; the perturbation must still have length ρ."""
    p = torch.nn.Parameter(torch.zeros(1000))
    opt = bsam_fused.SAM([p], lr=0.1, rho=0.5, norm_eps=0.0, backend=backend)
    p.grad = torch.full_like(p, magnitude)
    opt.ascend()
    assert p.detach().double().norm().item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "general"])
def test_update_from_w_min(backend, base):
    """The released code's update: the base's whole rule, weight decay included, starts from w_min."""
    base_class, base_options, rule = BASES[base]
    params = parameters("odd", torch.float64)
    opt = bsam_fused.BSAM(params, base_class, rho=0.3, update_from="w_min", backend=backend, **base_options)
    options = options_of(opt, params)
    passes = [gradients(params, k) for k in range(3)]
    w, grads = doubled(params), [doubled(g) for g in passes]
    n = ref.ascent_norm(w, grads[0], options)
    start = [ref.w_min(x, g, n, o) for x, g, o in zip(w, grads[0], options)]
    d = [ref.bsam_direction(*g, ref.norm(grads[1]), ref.norm(grads[2]), x) for *g, x in zip(*grads, w)]
    for call, g in zip(opt._calls, passes):
        assign(params, g)
        getattr(opt, call)()
    expected = [rule(s, dx, {}, o) for s, dx, o in zip(start, d, options)]
    assert_near(params, expected, TOLERANCE[torch.float64], "w")
    assert (params[0].detach() - rule(w[0], d[0], {}, options[0])).abs().max() > 1e-3
