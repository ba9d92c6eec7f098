"""Every backend × optimizer × base × dtype × shape set, beside the papers' formulas in float64.

Gradients are prescribed, not computed, so that both sides see the same ones at each pass, and the weights are
compared after every phase. Each step of the oracle starts from the weights and state that the optimizer has
reached, so that tolerances can be those of one step's rounding.
"""

import pytest
import reference as ref
import torch
from members import MEMBERS, calls, options_of, some_of_each_member
from samples import DTYPES, SHAPES, TOLERANCE, assign, gradients, interpreted, misaligned, parameters, strided

import bsam_fused

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


def step_beside(member, opt, params, rule, passes, given=None):
    """One step by hand beside the oracle; ``passes``: the gradients of each.

    ``given(k)``: the tensors to leave in .grad at pass k, instead of copies.
    """
    tol, options = TOLERANCE[params[0].dtype], options_of(opt, params)
    w = doubled(params)
    held = [{k: v for k, v in opt.state.get(p, {}).items() if v is not None} for p in params]
    state = [{k: v.double().clone() if k != "step" else int(v) for k, v in entry.items()} for entry in held]
    names = calls(opt)
    grads = [doubled(g) for g in passes[: len(names)]]
    history = member.history(opt, params) if member.memory else None
    q = member.memory.along(grads[0], options, history) if member.memory else grads[0]
    n = ref.ascent_norm(w, q, options)
    perturbed = {
        "ascend": ("w_max", [ref.w_max(*x, n, o) for *x, o in zip(w, q, options)]),
        "descend": (
            "w_min",
            [ref.w_min(*x, n, o) for *x, o in zip(w, grads[0], options)] if member.passes == 3 else [],
        ),
    }
    for k, call in enumerate(names):
        if given is None:
            assign(params, passes[k])
        else:
            for p, g in zip(params, given(k), strict=True):
                p.grad = g
        getattr(opt, call)()
        if call != "step":
            assert_near(params, perturbed[call][1], tol, perturbed[call][0])
            kept = member.memory is ref.AVERAGED  # q, in the gradient's dtype
            assert opt.norms[0].item() == pytest.approx(n, rel=tol if kept else max(1e-6, TOLERANCE[torch.float64]))
    # What is kept is in the gradient's dtype, as the byte budget has it, and what is mixed may cancel.
    slack = 1 if member.direction is ref.sam else 3
    directions = member.d(grads, options, history)
    if opt.max_grad_norm is not None:
        directions = ref.clipped(directions, opt.max_grad_norm)
    expected = [x if d is None else rule(x, d, s, o) for x, d, s, o in zip(w, directions, state, options)]
    assert_near(params, expected, slack * tol, "w")
    if member.memory:
        remembered = member.memory.remembered(grads, options, history)
        assert_near(member.history(opt, params), remembered, 2 * slack * tol, "history")
    for key in {key for values in state for key in values} - {member.memory and member.memory.key}:
        pairs = [(opt.state[p][key], values[key]) for p, values in zip(params, state) if key in values]
        if key == "step":
            assert all(held == value for held, value in pairs)
        else:
            assert_near(*zip(*pairs), 2 * slack * tol, key)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("base", BASES)
@some_of_each_member
@pytest.mark.filterwarnings("ignore:.*different rho_min")
def test_steps(backend, member, base, dtype):
    """All shape sets as groups of one optimizer, each with options of its own, over three steps."""
    base_class, base_options, rule = BASES[base]
    torch.manual_seed(1)
    names = [shapes for shapes in SHAPES if shapes != "many" or not interpreted(backend)]
    sets = [*(parameters(shapes, dtype) for shapes in names), strided(dtype), misaligned(dtype)]
    groups = member.groups(sets)
    for i, group in enumerate(groups):
        group |= {"rho": member.options["rho"] * (1 + i / 4), "lr": base_options["lr"] / (1 + i)}
        numbers = ("alpha", "gamma", "sigma", "lmbda")
        group |= {key: member.options[key] / (1 + i / 4) for key in numbers if key in member.options}
    # Both ways to round 16 bits, each beside every base.
    rounding = "nearest" if member in (MEMBERS["SAM"], MEMBERS["adaptive BSAM"]) else "stochastic"
    opt = member.kind(groups, base_class, backend=backend, rounding=rounding, **{**member.options, **base_options})
    params = [p for s in sets for p in s]
    for t in range(2 if interpreted(backend) else 3):
        for group in opt.param_groups:
            group["lr"] *= 0.7  # so that ρ_min decays
        step_beside(member, opt, params, rule, [gradients(params, 100 * t + k) for k in range(member.passes)])
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", ["SAM", "BSAM", "extrapolated BSAM"])
def test_each_shape_set_alone(backend, name, shapes):
    """The same sets one by one, so that a layout error cannot hide behind the others."""
    member, params = MEMBERS[name], parameters(shapes)
    opt = member.build(params, lr=0.1, momentum=0.9, backend=backend)
    for t in range(2):
        step_beside(member, opt, params, ref.sgd, [gradients(params, 7 * t + k) for k in range(member.passes)])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ["SAM", "BSAM", "GSAM"])
def test_misaligned_gradients(backend, name, dtype):
    """Views of one bucket, as DDP leaves them, at odd places: no vector fits, and none may be taken."""
    member, params = MEMBERS[name], parameters("odd", dtype) + misaligned(dtype)
    bucket = torch.zeros(1 + sum(p.numel() + 1 for p in params), dtype=dtype)
    opt = member.build(params, lr=0.1, momentum=0.9, backend=backend)

    def in_bucket(seed):
        views, at = [], 1
        for p, g in zip(params, gradients(params, seed)):
            views.append(bucket[at : at + p.numel()].view(p.shape).copy_(g))
            at += p.numel() + 1
        return views

    for t in range(2):
        kept = [doubled(in_bucket(10 * t + k)) for k in range(member.passes)]
        step_beside(member, opt, params, ref.sgd, kept, lambda k, t=t: in_bucket(10 * t + k))


@pytest.mark.parametrize("name", ["adaptive BSAM", "extrapolated BSAM"])
def test_more_tensors_than_a_launch_carries(backend, name):
    """1,500 of them: on a GPU several launches a phase, whose sums and counts must come together; of Triton one."""
    count = 100 if interpreted(backend) else 1500
    member, params = MEMBERS[name], [torch.nn.Parameter(torch.randn(1 + i % 7)) for i in range(count)]
    opt = member.build(params, torch.optim.AdamW, lr=0.05, eps=1e-3, backend=backend)
    for t in range(1 if interpreted(backend) else 2):
        step_beside(member, opt, params, ref.adamw, [gradients(params, 9 * t + k) for k in range(member.passes)])
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("base", ["SGD", "AdamW", "general"])
@pytest.mark.parametrize(
    "name", ["SAM", "BSAM", "extrapolated BSAM", "GSAM", "LookSAM", "FriendlySAM", "BSAM, some exempt"]
)
def test_gradients_in_some_passes_only(backend, name, base):
    """Zero in a pass without one; left alone without any. A parameter of each kind, several times."""
    member = MEMBERS[name]
    base_class, base_options, rule = BASES[base]
    params = [torch.nn.Parameter(torch.randn(5 + i)) for i in range(16)]
    opt = member.build(params, base_class, backend=backend, **base_options)
    for t in range(3):
        passes = [
            gradients(params, 10 * t + k, without={i for i in range(16) if not (i + t) >> k & 1})
            for k in range(len(calls(opt)))
        ]
        untouched = [i for i, g in enumerate(zip(*passes)) if all(x is None for x in g)]
        before = [params[i].detach().clone() for i in untouched]
        step_beside(member, opt, params, rule, passes)
        assert untouched
        assert all(torch.equal(params[i], w) for i, w in zip(untouched, before))


@pytest.mark.parametrize("name", ["SAM", "BSAM", "extrapolated BSAM", "GSAM"])
def test_sums_are_over_everything(backend, name):
    """One norm over groups and dtypes: a norm a group or a FlatParams would perturb each by ρ, and mix each its way."""
    member = MEMBERS[name]
    params = [torch.nn.Parameter(torch.randn(40, dtype=d)) for d in (torch.float32, torch.float64, torch.float32)]
    opt = member.kind([{"params": [p]} for p in params], lr=0.1, backend=backend, **member.options)
    for t in range(2):
        passes = [gradients(params, 5 * t + k) for k in range(member.passes)]
        w = doubled(params)
        assign(params, passes[0])
        opt.ascend()
        moved = ref.norm([p.detach().double() - x for p, x in zip(params, w)])
        assert moved == pytest.approx(0.3, rel=1e-5)
        opt.restore()
        options = options_of(opt, params)
        for call, g in zip(opt._calls, passes):
            assign(params, g)
            getattr(opt, call)()
        d = member.direction([doubled(g) for g in passes], options)
        assert_near(params, [ref.sgd(*x[:2], {}, x[2]) for x in zip(w, d, options)], TOLERANCE[torch.float32], "w")


@pytest.mark.parametrize("name", ["BSAM", "extrapolated BSAM", "GSAM"])
def test_zero_last_gradient(backend, name):
    """c = 0 where g_min = 0; nothing of g is orthogonal to a g_max that is 0."""
    member, params = MEMBERS[name], parameters("odd")
    opt = member.build(params, lr=0.1, backend=backend)
    passes = [gradients(params, k) for k in range(member.passes - 1)]
    step_beside(member, opt, params, ref.sgd, [*passes, [torch.zeros_like(p) for p in params]])
    assert opt.skipped_steps == 0


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
    d = ref.bsam(grads)
    for call, g in zip(opt._calls, passes):
        assign(params, g)
        getattr(opt, call)()
    expected = [rule(s, dx, {}, o) for s, dx, o in zip(start, d, options)]
    assert_near(params, expected, TOLERANCE[torch.float64], "w")
    assert (params[0].detach() - rule(w[0], d[0], {}, options[0])).abs().max() > 1e-3
