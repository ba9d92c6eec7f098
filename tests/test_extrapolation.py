"""BSAM in two passes: exact where the loss is quadratic, WSAM where c is 1, and to first order what BSAM is."""

import inspect
import itertools
import math
import warnings

import pytest
import reference as ref
import torch
from quadratic import Quadratic, assert_alike, flat, parameters, twins, walk
from samples import assign, gradients
from torch import nn

from bsam_fused import BSAM, SAM, WSAM

pytestmark = pytest.mark.usefixtures("one_thread")

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAPTIVE = pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])

EQUAL = ({"rho": 0.1, "rho_min": 0.05}, {"rho": 0.3, "rho_min": 0.15}, {"rho": 0.2, "rho_min": 0.1})
UNEQUAL = ({"rho": 0.1, "rho_min": 0.1}, {"rho": 0.3, "rho_min": 0.05}, {"rho": 0.0, "rho_min": 0.0})


def both_descents(radii, coupled, backend, **options):
    """The weights after some steps of exact and of extrapolated BSAM, with ρ_min falling, on a quadratic loss."""
    loss = Quadratic(coupled=coupled)
    params, copies = twins()
    for weights, descent in ((params, "exact"), (copies, "extrapolate")):
        groups = [{"params": [p], **radius} for p, radius in zip(weights, radii)]
        opt = BSAM(groups, descent=descent, lr=0.05, momentum=0.9, backend=backend, norm_eps=0.0, **options)
        for _ in range(4):
            loss.step(opt, weights)
            for group in opt.param_groups:
                group["lr"] *= 0.7
        assert opt.skipped_steps == 0
    return params, copies


@ADAPTIVE
@pytest.mark.parametrize("max_grad_norm", [None, 3.0], ids=["", "clipped"])
@pytest.mark.parametrize(
    "other",
    [{}, {"perturb": False, "rho_min": 0.01}, {"rho": 0.0, "rho_min": 0.0}, {"maximize": True}],
    ids=["", "exempt", "still", "maximize"],
)
def test_extrapolation_is_exact_on_a_quadratic(backend, adaptive, max_grad_norm, other):
    """The Hessian couples groups of different radii; the gradient is linear, and w_min, w and w_max lie on a line.

    So do the gradients of a group that stays at w, whatever r it would have.
    """
    radii = (*EQUAL[:2], {**EQUAL[2], **other})
    options = {"adaptive": adaptive, "eta": 0.1, "max_grad_norm": max_grad_norm}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_alike(*both_descents(radii, True, backend, **options), rtol=1e-9)


@ADAPTIVE
def test_extrapolation_with_unequal_ratios(backend, adaptive):
    """Exact where the Hessian couples no groups, one without radii among them; else not, which is said once."""
    options = {"adaptive": adaptive, "eta": 0.1}
    with pytest.warns(UserWarning, match=r"different rho_min / rho in the groups \(0\.\d+, 1\)") as told:
        assert_alike(*both_descents(UNEQUAL, False, backend, **options), rtol=1e-9)
    assert len(told) == 1
    assert told[0].filename == inspect.getfile(Quadratic)  # the caller's line
    with pytest.warns(UserWarning, match="different rho_min / rho"):
        params, copies = both_descents(UNEQUAL, True, backend, **options)
    assert (flat(params) - flat(copies)).abs().max() > 1e-3


def test_extrapolation_far_behind_w(backend):
    """Once, and not at r = 4."""
    for rho_min, told in ((0.4, 0), (0.41, 1)):
        params = parameters()
        opt = BSAM(params, descent="extrapolate", rho=0.1, rho_min=rho_min, lr=0.1, backend=backend)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for t in range(3):
                walk(opt, params, gradients(params, t), gradients(params, 9 + t))
        assert ["rho_min at most 4 rho" in str(w.message) for w in caught] == [True] * told


def test_extrapolation_where_a_gradient_lacks(backend):
    """By hand: ĝ_min = 0 where one is missing, g or g_max; of the others c = ‖(3, 4, 12)‖ / ‖(3, 4)‖ = 13/5."""
    params = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (2, 1, 1)]
    opt = BSAM(params, descent="extrapolate", rho=0.1, lr=1.0, rho_min_decay="none", norm_eps=0.0, backend=backend)
    g = [torch.tensor(x, dtype=torch.float64) for x in ([3.0, 4.0], [5.0], [12.0])]
    walk(opt, params, [g[0], g[1], None], [g[0], None, g[2]])
    assert_alike(params, [-torch.tensor(d, dtype=torch.float64) for d in ([-1.8, -2.4], [5.0], [12.0])])
    assert opt.norms[2].item() == pytest.approx(5.0)


def test_extrapolation_to_nothing(backend):
    """g_max = 2 g, r = 1: ĝ_min = 0, and so c; d = g + g_max."""
    params = parameters()
    opt = BSAM(params, descent="extrapolate", lr=1.0, rho_min_decay="none", backend=backend)
    before, g = [p.detach().clone() for p in params], gradients(params, 0)
    walk(opt, params, g, [2 * x for x in g])
    assert_alike(params, [w - 3 * x for w, x in zip(before, g)])
    assert opt.skipped_steps == 0


def test_what_an_extrapolation_tells(backend):
    """L(w_min) is not known, ‖ĝ_min‖ is; ρ_min as it is in effect."""
    loss, params = Quadratic(), parameters()
    opt = BSAM(params, descent="extrapolate", rho=0.3, rho_min=0.2, lr=0.1, backend=backend, norm_eps=0.0)
    opt.param_groups[0]["lr"] = 0.05
    w = flat(params)
    g = loss.gradient(w)
    g_min = loss.gradient(w - 0.1 * g / g.norm())

    def closure():
        w = flat(params)
        assign(params, loss.gradient(w).split(loss.sizes))
        return w @ loss.hessian @ w / 2 + loss.slope @ w

    opt.step(closure)
    assert opt.sharpness.loss_min is None
    assert opt.sharpness.min_sharpness is None
    told = opt.metrics()
    assert told["norm_g_min"] == pytest.approx(g_min.norm().item(), rel=1e-9)
    assert (told["rho"], told["rho_min"]) == pytest.approx((0.3, 0.1))
    assert not {"loss_min", "min_sharpness", "bilateral_sharpness"} & told.keys()


def test_what_an_extrapolation_refuses(backend):
    params = parameters()
    with pytest.raises(ValueError, match=r'descent="extrapolate" with update_from="w_min"'):
        BSAM(params, descent="extrapolate", update_from="w_min", lr=0.1)
    with pytest.raises(ValueError, match="descent"):
        BSAM(params, descent="extrapolated", lr=0.1)
    with pytest.raises(ValueError, match=r"rho=0 with rho_min=0.1 in group 0"):
        BSAM(params, descent="extrapolate", rho=0.0, rho_min=0.1, lr=0.1)
    opt = BSAM(params, descent="extrapolate", rho=0.1, lr=0.1, backend=backend)
    before = flat(params)
    assign(params, gradients(params, 0))
    opt.param_groups[0]["rho"] = 0.0
    with pytest.raises(ValueError, match=r"rho=0 with rho_min=0.1 in group 0"):
        opt.ascend()
    assert torch.equal(flat(params), before)
    opt.param_groups[0]["rho"] = 0.1
    for call in ("descend", "third_step"):
        with pytest.raises(RuntimeError, match=rf"{call}\(\).*two passes.* step\(\)|second_step\(\)"):
            getattr(opt, call)()
    opt.first_step(zero_grad=True)
    moved = flat(params)
    assign(params, gradients(params, 1))
    for call in ("descend", "third_step"):
        with pytest.raises(RuntimeError, match=rf"{call}\(\).*two passes.* (step|second_step)\(\)"):
            getattr(opt, call)()
    assert torch.equal(flat(params), moved)
    opt.second_step(zero_grad=True)
    assert all(p.grad is None for p in params)
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("r", [0.0, 0.5, 1.0])
def test_extrapolated_bsam_with_c_of_1_is_wsam(backend, r):
    """γ = (1 + r)/(2 + r). c is 1 where ‖g_max‖ = ‖(1 + r) g − r g_max‖: of a g_max along v, t v, a quadratic in t."""
    params, copies = twins()
    bsam = BSAM(params, descent="extrapolate", rho=0.2, rho_min=0.2 * r, rho_min_decay="none", backend=backend, **SGD)
    wsam = WSAM(copies, rho=0.2, gamma=(1 + r) / (2 + r), backend=backend, **SGD)
    for t in range(3):
        g, v = gradients(params, t), gradients(params, 9 + t)
        if ref.product(g, v) < 0:
            v = [-x for x in v]
        a, b, c = (1 - r**2) * ref.norm(v) ** 2, r * (1 + r) * ref.product(g, v), -((1 + r) ** 2) * ref.norm(g) ** 2
        t = -c / (2 * b) if a == 0 else (math.sqrt(b**2 - a * c) - b) / a
        g_max = [t * x for x in v]
        walk(bsam, params, g, g_max)
        walk(wsam, copies, g, g_max)
    assert_alike(params, copies)


@pytest.mark.parametrize("descent", ["exact", "extrapolate"])
def test_bsam_is_sam_less_the_curvature_along_g(backend, descent):
    """To first order g + (ρ + ρ_min)(H ĝ − (ĝᵀ H ĝ) ĝ), ĝ = g/‖g‖, which SAM at ρ + ρ_min is not, at any radius."""
    loss = Quadratic()

    def direction(kind, **options):
        params = [nn.Parameter(p.detach().clone()) for p in start]
        opt = kind(params, lr=1.0, backend=backend, norm_eps=0.0, **options)
        loss.step(opt, params)
        return flat(start) - flat(params)

    start = parameters()
    g = loss.gradient(flat(start))
    unit = g / g.norm()
    curved = loss.hessian @ unit
    curvature = unit @ curved
    from_formula, from_sam = [], []
    for rho in (0.04, 0.02, 0.01, 0.005):
        length = rho + 0.5 * rho
        d = direction(BSAM, rho=rho, rho_min=0.5 * rho, rho_min_decay="none", descent=descent)
        formula = g + length * (curved - curvature * unit)
        from_formula.append(((d - formula).norm() / length).item())
        from_sam.append(((d - direction(SAM, rho=length)).norm() / length).item())
    assert all(later < 0.6 * earlier for earlier, later in itertools.pairwise(from_formula)), from_formula
    assert from_sam[-1] == pytest.approx(abs(curvature.item()), rel=0.1), from_sam
