"""How the members relate, to each other and to other packages, and what their numbers, radii and rules may be."""

import math

import pytest
import reference as ref
import torch
from members import MEMBERS, every_member
from pytorch_optimizer.lr_scheduler import ProportionScheduler
from pytorch_optimizer.optimizer.sam import GSAM as PackagedGSAM
from pytorch_optimizer.optimizer.sam import WSAM as PackagedWSAM
from quadratic import Quadratic, assert_alike, flat, parameters, twins, walk
from samples import assign, gradients
from torch import nn

from bsam_fused import BSAM, GSAM, SAM, WSAM, FriendlySAM, LookSAM, MixedSAM

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAPTIVE = pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])

# ---- members that are others


OTHERS = {
    "GSAM, α = 0": ((GSAM, {"alpha": 0.0}), (SAM, {})),
    "WSAM, γ = ½": ((WSAM, {"gamma": 0.5}), (SAM, {})),
    "MixedSAM of g_max": ((MixedSAM, {"mix": lambda sums: (0.0, 1.0)}), (SAM, {})),
    "MixedSAM with WSAM's": ((MixedSAM, {"mix": lambda sums: (-8.0, torch.tensor(9.0))}), (WSAM, {"gamma": 0.9})),
    "an unlimited budget": ((SAM, {"loss_budget": 1e6}), (SAM, {})),
    "LookSAM, k = 1": ((LookSAM, {"k": 1}), (SAM, {})),
    "FriendlySAM, σ = 0": ((FriendlySAM, {"sigma": 0.0}), (SAM, {})),
}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", OTHERS)
@ADAPTIVE
def test_one_is_another(backend, name, base, adaptive):
    options = {"lr": 0.1, "rho": 0.3, "adaptive": adaptive, "eta": 0.1, "max_grad_norm": 2.0, "backend": backend}
    (one, own), (other, others) = OTHERS[name]
    params, copies = twins()
    opts = one(params, base, **own, **options), other(copies, base, **others, **options)
    for t in range(3):
        passes = gradients(params, 2 * t), gradients(params, 2 * t + 1)
        walk(opts[0], params, *passes)
        walk(opts[1], copies, *passes)
    assert_alike(params, copies)


def without_radius(member):
    """Its options; WSAM's γ = 0 does the same at any radius. LookSAM, whose v is then rounding noise, without α."""
    radii = {name: 0.0 for name in ("rho", "rho_min", "rho_min_end") if name in member.options}
    return {**member.options, **radii, **({"alpha": 0.0} if member.kind is LookSAM else {})}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@every_member
def test_without_a_radius_it_is_the_base(backend, member, base):
    """All passes have one gradient then, of which no member makes anything else; r = 0 where ρ = 0 = ρ_min."""
    params, copies = twins()
    opt = member._replace(options=without_radius(member)).build(params, base, lr=0.1, backend=backend)
    plain = base(copies, lr=0.1)
    for t in range(3):
        g = gradients(params, t)
        walk(opt, params, *[g] * opt.passes)
        walk(plain, copies, g)
    assert_alike(params, copies)


def test_wsam_without_weight_is_the_base(backend):
    params, copies = twins()
    opt, plain = WSAM(params, gamma=0.0, rho=0.5, backend=backend, **SGD), torch.optim.SGD(copies, **SGD)
    for t in range(3):
        walk(opt, params, gradients(params, t), gradients(params, 9 + t))
        walk(plain, copies, gradients(params, t))
    assert_alike(params, copies)


# ---- radii, exempt groups, numbers


@pytest.mark.parametrize(("budget", "moved"), [(1.0, 0.2), (10.0, 0.5), (0.0, 0.0)])
def test_a_loss_budget(backend, budget, moved):
    """ρ_t = min(σ / ‖g‖, ρ), ‖g‖ = 5: within it, ⟨g, w_max − w⟩ = σ; of BSAM's radii both in one ratio."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    opt = BSAM(
        [p], rho=0.5, rho_min=0.25, rho_min_decay="none", loss_budget=budget, norm_eps=0.0, lr=0.1, backend=backend
    )
    for call, radius in (("ascend", moved), ("descend", -moved / 2)):
        p.grad = g.clone()
        getattr(opt, call)()
        assert_alike([p], [radius * g / 5])
    assert opt.metrics()["rho"] == pytest.approx(moved)
    assert opt.metrics()["rho_min"] == pytest.approx(moved / 2)


@pytest.mark.parametrize("budget", [-1.0, math.nan, "much"])
def test_a_loss_budget_that_cannot_be(budget):
    with pytest.raises(ValueError, match="loss_budget"):
        SAM(parameters(), lr=0.1, loss_budget=budget)


@every_member
def test_what_is_exempt_is_neither_moved_nor_kept(backend, member):
    """Its gradient is in no norm of the ascent; SAM holds no copy of it, no member one of its weights."""
    params = parameters((2000, 50))
    groups = [{"params": params[:1], "perturb": False}, {"params": params[1:]}]
    opt = member.kind(groups, lr=0.1, backend=backend, **member.options)
    before = [p.detach().clone() for p in params]
    for call in opt._calls[:-1]:
        grads = gradients(params, 0)
        assign(params, grads)
        getattr(opt, call)()
        assert torch.equal(params[0], before[0])
        assert not torch.equal(params[1], before[1])
    n = ref.ascent_norm(before[1:], grads[1:], [{**opt.param_groups[1]}])
    assert opt.norms[0].item() == pytest.approx(n, rel=1e-11)
    held = sum(flat.extra_bytes for flat in opt._flats)
    g, v, q_and_m = opt._rule.keeps, member.kind is LookSAM, 2 * (member.kind is FriendlySAM)
    assert held < 8 * (2000 * (g + v) + 50 * (1 + g + v + q_and_m)) + 1000
    opt.restore()
    assert all(torch.equal(p, w) for p, w in zip(params, before))


@pytest.mark.parametrize(
    ("kind", "option", "wrong"),
    [
        (WSAM, "gamma", 1.0),
        (WSAM, "gamma", -0.1),
        (WSAM, "gamma", math.nan),
        (GSAM, "alpha", -0.1),
        (GSAM, "alpha", math.inf),
        (LookSAM, "alpha", -0.1),
        (FriendlySAM, "sigma", -0.1),
        (FriendlySAM, "lmbda", 1.0),
        (FriendlySAM, "lmbda", math.nan),
    ],
)
def test_numbers_that_cannot_be(backend, kind, option, wrong):
    """At once, and where a group is given it later, before anything is written."""
    with pytest.raises(ValueError, match=f"{option}="):
        kind(parameters(), lr=0.1, **{option: wrong})
    params = parameters()
    opt = kind([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, backend=backend)
    opt.param_groups[1][option] = wrong
    before = flat(params)
    assign(params, gradients(params, 0))
    with pytest.raises(ValueError, match=f"{option}=.* in group 1"):
        opt.ascend()
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize("name", ["BSAM", "extrapolated BSAM", "GSAM", "WSAM"])
def test_an_overflow_of_what_is_exempt_backs_the_scale_off(backend, name):
    """Its g is in no norm of the ascent, and what the scaler looks at, the last gradients, is finite."""
    params = parameters((7, 5, 4, 6))
    member = MEMBERS[name]
    groups = [{"params": params[:2]}, {"params": params[2:], "perturb": False}]
    opt = member.kind(groups, lr=0.1, backend=backend, **member.options)
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=1024.0)
    scaler.scale(torch.ones((), device=params[0].device))  # which makes its scale
    before = [p.detach().clone() for p in params]
    for k, call in enumerate(opt._calls):
        assign(params, gradients(params, k))
        if call == "ascend":
            params[3].grad.view(-1)[5] = math.inf
        if call == "step":
            scaler.step(opt)
            scaler.update()
        else:
            getattr(opt, call)()
    assert scaler.get_scale() == 512.0
    assert opt.skipped_steps == 1
    assert all(torch.equal(p, w) for p, w in zip(params, before))


def test_clipping_where_numbers_differ(backend):
    """‖d‖ is of one a and b; extrapolated BSAM's sums have each group's r, and are not concerned."""
    for kind, option in ((GSAM, "alpha"), (WSAM, "gamma")):
        params = parameters()
        groups = [{"params": [p], option: 0.1 * i} for i, p in enumerate(params)]
        opt = kind(groups, lr=0.1, max_grad_norm=1.0, backend=backend)
        before = flat(params)
        assign(params, gradients(params, 0))
        with pytest.raises(ValueError, match=f"max_grad_norm=1 where {option} differs between param groups"):
            opt.ascend()
        assert torch.equal(flat(params), before)
        opt.max_grad_norm = None
        walk(opt, params, gradients(params, 0), gradients(params, 1))
        assert opt.skipped_steps == 0


def test_clipping_is_checked_with_the_numbers_of_the_step(backend):
    """Those of its ascent, whatever the groups say by its end; of a captured step those written for a replay."""
    params = parameters()
    groups = [{"params": [p], "alpha": 0.1 * i} for i, p in enumerate(params)]
    opt = GSAM(groups, lr=0.1, backend=backend)
    before = flat(params)
    assign(params, gradients(params, 0))
    opt.ascend()
    for group in opt.param_groups:
        group["alpha"] = 0.4
    opt.max_grad_norm = 1.0
    assign(params, gradients(params, 1))
    with pytest.raises(ValueError, match="max_grad_norm=1 where alpha differs"):
        opt.step()
    opt.restore()
    assert torch.equal(flat(params), before)
    opt.param_groups[0]["alpha"] = 0.1
    with pytest.raises(ValueError, match="max_grad_norm=1 where alpha differs"):
        opt.write_options()


def test_a_radius_within_any_budget_is_told(backend):
    """Where g = 0 no budget cuts the radius, not even 0: `metrics` had 0 / 0."""
    params = parameters()
    opt = SAM(params, rho=0.3, loss_budget=0.0, lr=0.1, backend=backend)
    walk(opt, params, *[[torch.zeros_like(p) for p in params]] * 2)
    assert opt.metrics()["rho"] == 0.3
    walk(opt, params, gradients(params, 0), gradients(params, 1))
    assert opt.metrics()["rho"] == 0.0


# ---- a rule of one's own


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_mix_sees_the_sums_of_everything(backend, base):
    """Of parameters of several dtypes and groups, without a GradScaler's scale; float64, 0-dim."""
    seen = []

    def mix(sums):
        seen.append(sums)
        return 0.5, 0.5

    params = [nn.Parameter(torch.randn(5, dtype=d)) for d in (torch.float64, torch.float32)]
    opt = MixedSAM(
        [{"params": [params[0]]}, {"params": [params[1]], "perturb": False}], base, mix=mix, lr=0.1, backend=backend
    )
    scaler = torch.amp.GradScaler(params[0].device.type, init_scale=8.0)
    for scale in (1.0, 8.0):
        g, g_max = ([x.double() for x in gradients(params, k)] for k in range(2))
        assign(params, [scale * x for x in gradients(params, 0)])
        opt.ascend()
        assign(params, [scale * x for x in gradients(params, 1)])
        if scale == 1.0:
            opt.step()
        else:
            scaler.scale(torch.ones(()))
            scaler.step(opt)
        sums = seen.pop()
        assert not seen
        assert all(x.dtype == torch.float64 and x.shape == () for x in sums)
        right = ref.norm(g) ** 2, ref.norm(g_max) ** 2, ref.product(g, g_max)
        assert (sums.g.item(), sums.g_max.item(), sums.product.item()) == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("wrong", [(math.nan, 1.0), (1.0, math.inf), (1e300, 1e300)])
def test_coefficients_that_are_not_finite_skip_the_step(backend, base, wrong):
    """Or that make d infinite: 1e300 is beyond what float32 can compute with."""
    params = [nn.Parameter(torch.randn(5))]
    coefficients = [wrong, (0.5, 0.5)]
    opt = MixedSAM(params, base, mix=lambda sums: coefficients[0], lr=0.1, backend=backend)
    before = flat(params)
    walk(opt, params, gradients(params, 0), gradients(params, 1))
    assert torch.equal(flat(params), before)
    assert opt.skipped_steps == 1
    del coefficients[0]
    walk(opt, params, gradients(params, 0), gradients(params, 1))
    assert opt.skipped_steps == 1
    assert not torch.equal(flat(params), before)


def test_a_clipped_direction_longer_than_any_number(backend):
    """‖d‖² is beyond float64: to clip d to nothing would be a step that nobody counts as skipped."""
    p = torch.nn.Parameter(torch.zeros(2))
    opt = GSAM([p], alpha=1e300, max_grad_norm=1.0, lr=1.0, backend=backend)
    walk(opt, [p], [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])])
    assert opt.skipped_steps == 1


def test_a_mix_that_raises(backend):
    """Like any error in a phase: the step is still to be made, or given up."""
    params = parameters()
    opt = MixedSAM(params, mix=lambda sums: 1 / 0, lr=0.1, momentum=0.9, backend=backend)
    before = flat(params)
    with pytest.raises(ZeroDivisionError):
        walk(opt, params, gradients(params, 0), gradients(params, 1))
    opt.restore()
    assert torch.equal(flat(params), before)
    opt.mix = lambda sums: (0.0, 1.0)
    walk(opt, params, gradients(params, 0), gradients(params, 1))
    assert opt.skipped_steps == 0
    with pytest.raises(TypeError, match="mix is a tuple"):
        MixedSAM(params, mix=(1.0, 1.0), lr=0.1)


NO_PAIRS = [None, (1.0,), (1.0, 0.0, 0.0), {"a": 0.0, "b": 1.0}, (None, 1.0), "ab", (0.0, 1j), torch.ones(2, 2)]
NO_COEFFICIENTS = [*NO_PAIRS, 1.0, torch.tensor(1.0), (torch.ones(1), 1.0), (0.0, torch.tensor(1j))]
COEFFICIENTS = [(0, 1), [0.0, True], torch.tensor([0.0, 1.0]), (torch.tensor(0), torch.ones((), requires_grad=True))]


@pytest.mark.parametrize("wrong", NO_COEFFICIENTS, ids=str)
def test_what_a_mix_must_not_return(wrong):
    params = parameters()
    opt = MixedSAM(params, mix=lambda sums: wrong, lr=0.1)
    with pytest.raises(TypeError, match=r"^mix returned (?s:.*): it must return a and b"):
        walk(opt, params, gradients(params, 0), gradients(params, 1))


@pytest.mark.parametrize("right", COEFFICIENTS, ids=str)
def test_what_a_mix_may_return(right):
    params, copies = twins()
    opt = MixedSAM(params, mix=lambda sums: right, lr=0.1)
    walk(opt, params, gradients(params, 0), gradients(params, 1))
    walk(SAM(copies, lr=0.1), copies, gradients(copies, 0), gradients(copies, 1))
    assert_alike(params, copies)


# ---- beside pytorch_optimizer, whose norms are of float32


def packaged_gsam(params, adaptive):
    scheduler = ProportionScheduler(
        torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(params, lr=1.0), 1.0), 1.0, 1.0, 0.3, 0.3
    )
    return PackagedGSAM(params, torch.optim.SGD(params, **SGD), nn.Identity(), scheduler, alpha=0.4, adaptive=adaptive)


@ADAPTIVE
def test_gsam_beside_another(backend, adaptive):
    params, copies = twins()
    opt = GSAM(params, rho=0.3, alpha=0.4, adaptive=adaptive, backend=backend, **SGD)
    other = packaged_gsam(copies, adaptive)
    loss = Quadratic()
    for _ in range(3):
        loss.step(opt, params)
        assign(copies, loss.gradient(flat(copies)).split(loss.sizes))
        other.perturb_weights(other.rho_t)
        assign(copies, loss.gradient(flat(copies)).split(loss.sizes))
        other.gradient_decompose(alpha=0.4)
        other.un_perturb()
        other.base_optimizer.step()
    assert_alike(params, copies, rtol=3e-7)


@ADAPTIVE
def test_wsam_beside_another(backend, adaptive):
    params, copies = twins()
    opt = WSAM(params, rho=0.3, gamma=0.8, adaptive=adaptive, backend=backend, **SGD)
    options = {"rho": 0.3, "gamma": 0.8, "adaptive": adaptive, "decouple": False, **SGD}
    other = PackagedWSAM(nn.ParameterList(copies), copies, torch.optim.SGD, **options)
    loss = Quadratic()
    for _ in range(3):
        loss.step(opt, params)
        for call in (other.first_step, other.second_step):
            assign(copies, loss.gradient(flat(copies)).split(loss.sizes))
            call()
    assert_alike(params, copies, rtol=3e-6)


def test_every_member_is_what_the_table_says():
    for member in MEMBERS.values():
        assert member.build(parameters(), lr=0.1).passes == member.passes
