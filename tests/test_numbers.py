"""Numbers at the edge: finite gradients never make a weight that is not finite, and an infinite one stays."""

import math

import pytest
import torch
from samples import DTYPES

import bsam_fused


class OwnSGD(torch.optim.SGD):
    """No fused base."""


KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
BASES = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "general": (OwnSGD, {"momentum": 0.9}),
}
INF = math.inf


def calls(opt):
    return [opt.ascend, opt.descend, opt.step] if isinstance(opt, bsam_fused.BSAM) else [opt.ascend, opt.step]


def step_by_hand(opt, *passes):
    """One step; of each pass a gradient a parameter, as numbers. All weights are to be finite after every call."""
    params = [p for group in opt.param_groups for p in group["params"]]
    infinite = [p.isinf() for p in params]
    for call, grads in zip(calls(opt), passes):
        for p, g in zip(params, grads):
            p.grad = torch.as_tensor(g, dtype=p.dtype).expand(p.shape).clone()
        call()
        assert all((p.isfinite() | inf).all() for p, inf in zip(params, infinite))


def weight(*values, dtype=torch.float32):
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


@pytest.mark.part(4)
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_weight_without_gradient_stays(backend, kind, base, dtype, masters):
    """As in torch.optim. The finite weights go where they go without it: it counts nothing in ASAM's norm, either."""
    if masters and (dtype.itemsize > 2 or base == "general"):
        pytest.skip("no master weights here")
    optimizer, options = BASES[base]
    p, alone = weight(0.5, -INF, INF, -0.25, dtype=dtype), weight(0.5, -0.25, dtype=dtype)
    for q, grads in ((p, (1.0, 0.0, 0.0, -2.0)), (alone, (1.0, -2.0))):
        opt = kind([q], optimizer, lr=0.1, backend=backend, rounding="nearest", master_weights=masters, **options)
        for _ in range(2):
            step_by_hand(opt, *[[grads]] * 3)
    assert p[1:3].tolist() == [-INF, INF]
    assert torch.equal(p[[0, 3]], alone)


def beyond(dtype):
    return 0.75 * torch.finfo(dtype).max


# What makes d, c or a coefficient beyond what it is computed in: kind, options, dtype, a gradient a pass.
IMPOSSIBLE = {
    "c": (bsam_fused.BSAM, {}, torch.float32, (1.0, 1.0, 1e-40)),
    "c of float64": (bsam_fused.BSAM, {}, torch.float64, (1.0, 1e153, 1e-161)),
    **{f"g + g_max, {dtype}": (bsam_fused.BSAM, {}, dtype, [beyond(dtype)] * 3) for dtype in DTYPES[1:]},
    "d, though g + g_max is finite": (bsam_fused.BSAM, {}, torch.float32, (1e38, 2e38, -2e38)),
    "rho": (bsam_fused.SAM, {"rho": 1e39}, torch.float32, (1.0, 1.0)),
    "rho of one group": (bsam_fused.SAM, {"rho": 1e39}, torch.bfloat16, (1.0, 1.0)),
    "rho of float64": (bsam_fused.ASAM, {"rho": 1e300}, torch.float64, (1e-20, 1.0)),
    "rho_min": (bsam_fused.BSAM, {"rho_min": 1e39}, torch.float32, (1.0, 1.0, 1.0)),
    "denormal norm": (bsam_fused.SAM, {"norm_eps": 0.0}, torch.float32, (1e-45, 1.0)),
    "denormal norm of bfloat16": (bsam_fused.BSAM, {"norm_eps": 0.0, "rho": 1.0}, torch.bfloat16, (1e-40, 1.0, 1.0)),
    "the squares of float64": (bsam_fused.SAM, {}, torch.float64, (1e160, 1e160)),
}


@pytest.mark.parametrize("base", ["momentum", "AdamW", "general"])
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_step_whose_coefficients_overflow_is_skipped_and_counted(backend, case, base):
    """Weights and state stay, whole: a second group, with an ordinary radius, does not step alone."""
    kind, options, dtype, passes = IMPOSSIBLE[case]
    p, q = weight(0.5, -0.25, dtype=dtype), weight(0.125, dtype=dtype)
    before = [x.detach().clone() for x in (p, q)]
    groups = [{"params": [p]}, {"params": [q], "rho": 0.05}]
    optimizer, base_options = BASES[base]
    opt = kind(groups, optimizer, lr=0.1, backend=backend, **options, **base_options)
    step_by_hand(opt, *[[g, g] for g in passes])
    assert [p.tolist(), q.tolist()] == [x.tolist() for x in before]
    assert opt.skipped_steps == 1
    assert opt.state_dict()["state"] == {}
    for group in opt.param_groups:
        group.update({radius: 0.05 for radius in ("rho", "rho_min") if radius in group})
    step_by_hand(opt, *[[1.0, 1.0]] * 3)
    assert opt.skipped_steps == 1
    assert p.tolist() != before[0].tolist()


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.BSAM])
def test_float32_and_float64_decide_together(backend, kind):
    """Either both step or none: c, or a step length, that float64 could hold is beyond float32."""
    p, q = weight(0.5), weight(0.5, dtype=torch.float64)
    opt = kind([p, q], lr=0.1, backend=backend, rho=1e39 if kind is bsam_fused.SAM else 0.05)
    step_by_hand(opt, [1.0, 1.0], [1.0, 1.0], [1e-40, 1e-40])
    assert (p.item(), q.item(), opt.skipped_steps) == (0.5, 0.5, 1)
    alone = kind([q], lr=0.1, backend=backend, rho=1e39 if kind is bsam_fused.SAM else 0.05)
    step_by_hand(alone, [1.0], [1.0], [1e-40])
    assert alone.skipped_steps == 0


def test_the_largest_gradients_step_where_d_is_finite(backend):
    """Their norm is beyond float32, no element of d is: as torch.optim's step."""
    p, q = (torch.nn.Parameter(torch.full((100,), 0.5)) for _ in range(2))
    opt, plain = bsam_fused.SAM([p], lr=1e-38, backend=backend), torch.optim.SGD([q], lr=1e-38)
    step_by_hand(opt, [3e38], [3e38])
    q.grad = torch.full_like(q, 3e38)
    plain.step()
    assert opt.skipped_steps == 0
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.ASAM])
def test_where_w_max_is_beyond_the_dtype_an_element_stays(backend, kind, dtype):
    """The others are perturbed; T = 1 for both: ASAM's |w| is the same in both elements."""
    most = torch.finfo(dtype).max
    w = 0.9 * most
    p = weight(w, w, dtype=dtype)
    opt = kind([p], lr=0.1, backend=backend, rho=0.5 * most if kind is bsam_fused.SAM else 0.5, rounding="nearest")
    start = p.detach().clone()
    p.grad = torch.tensor([1.0, -1.0], dtype=dtype)
    opt.ascend()
    assert p[0] == start[0]
    assert p[1] < 0.75 * start[1]
    opt.restore()
    assert torch.equal(p, start)


def test_a_gradient_scaler_hears_that_w_max_is_out_of_reach(backend):
    """It backs off, as for an inf in a pass that it does not see: `failed` looks at what the ascent itself found."""
    p = weight(0.5)
    opt = bsam_fused.SAM([p], lr=0.1, rho=1e40, backend=backend)
    scaler = torch.amp.GradScaler(p.device.type, init_scale=4.0)
    for call in (opt.ascend, lambda: scaler.step(opt)):
        scaler.scale(p.sum()).backward()
        call()
    scaler.update()
    assert (p.item(), scaler.get_scale(), opt.skipped_steps) == (0.5, 2.0, 1)


def test_a_loss_scale_whose_inverse_overflows_skips(backend):
    p = weight(0.5)
    opt = bsam_fused.SAM([p], lr=0.1, backend=backend)
    p.grad = torch.ones_like(p)
    opt.ascend()
    p.grad = torch.ones_like(p)
    opt.grad_scale, opt.found_inf = torch.tensor(1e-40), torch.tensor(0.0)
    opt.step()
    assert (p.item(), opt.skipped_steps) == (0.5, 1)


@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 1.0}, {"perturb": False}], ids=str)
@pytest.mark.parametrize("g", [1e36, 1e34])
def test_a_kept_gradient_that_overflows_as_the_loss_is_unscaled(backend, options, g):
    """BSAM: (g + g_max) / scale is beyond float32, or not, with a scale of 2⁻¹⁰; c g_min is about 1 either way."""
    p, q = weight(0.5), weight(0.5)
    opt = bsam_fused.BSAM([{"params": [p], **options}, {"params": [q]}], lr=1e-38, backend=backend)
    scaler = torch.amp.GradScaler(p.device.type, init_scale=2.0**-10)
    scaler.scale(p.sum())  # it knows its scale from then on
    for call, grads in zip([opt.ascend, opt.descend, lambda: scaler.step(opt)], [(g, 1.0), (1.0, 1.0), (1.0, 1.0)]):
        p.grad, q.grad = torch.full_like(p, grads[0]), torch.full_like(q, grads[1])
        call()
    assert opt.skipped_steps == (g == 1e36)
    if g == 1e36:
        assert (p.item(), q.item()) == (0.5, 0.5)
    else:
        torch.testing.assert_close(p, torch.full_like(p, 0.5 - 1e-38 * 1024 * g))


@pytest.mark.parametrize("before", [{"perturb": False}, {"adaptive": True}], ids=str)
@pytest.mark.parametrize("kind", [bsam_fused.WSAM, bsam_fused.BSAM])
def test_options_that_are_changed_within_a_step_hide_no_overflow(backend, kind, before):
    """Whether ‖T g‖ is ‖g‖, by which overflow would be seen, is as in the ascent that summed it."""
    p, q = weight(1e-6), weight(1e-6)
    opt = kind([{"params": [p]}, {"params": [q], "rho": 1e-3, **before}], lr=0.1, backend=backend)
    first, *further = calls(opt)
    p.grad, q.grad = torch.ones_like(p), torch.full_like(q, 3e38)
    first()
    opt.param_groups[1].update({name: not value for name, value in before.items()})
    for call, g in zip(further, [8e37, 1.0][-len(further) :]):
        p.grad, q.grad = torch.ones_like(p), torch.full_like(q, g)
        call()
    assert (p.tolist(), q.tolist(), opt.skipped_steps) == (weight(1e-6).tolist(), weight(1e-6).tolist(), 1)


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.BSAM])
def test_a_direction_beyond_float16_does_not_reach_a_base_that_is_not_fused(backend, kind):
    """d is computed in float32, where it is finite: g + g_max − c g_min, or g_max / scale."""
    p = weight(0.5, 0.5, dtype=torch.float16)
    opt = kind([p], OwnSGD, lr=0.1, backend=backend)
    passes = [[(3e4, 0.0)], [(3e4, 0.0)], [(-1.0, 0.0)]] if kind is bsam_fused.BSAM else [[(1.0, 1.0)], [(6e4, 0.0)]]
    *early, last = zip(calls(opt), passes)
    for call, (g,) in [*early, last]:
        p.grad = torch.tensor(g, dtype=p.dtype)
        if call == opt.step and kind is bsam_fused.SAM:
            opt.grad_scale, opt.found_inf = torch.tensor(0.5), torch.tensor(0.0)
        call()
    assert (p.tolist(), opt.skipped_steps, opt.state_dict()["state"]) == ([0.5, 0.5], 1, {})


def trained(kind, backend, dtype, device):
    """The bits of a few steps, and of the count of steps: more than a 16-bit float can count."""
    torch.manual_seed(0)
    p, q = (torch.nn.Parameter(torch.randn(n, dtype=torch.float32, device="cpu").to(device, dtype)) for n in (5, 9))
    opt = kind([p, q], torch.optim.AdamW, lr=0.1, backend=backend, max_grad_norm=0.5)
    for t in range(3):
        for call in calls(opt):
            for x in (p, q):
                x.grad = (x.detach() * (t + 1)).clone()
            call()
        for state in opt.state.values():
            state["step"].fill_(1000.0 + t)
    return p.tolist() + q.tolist() + [float(state["step"]) for state in opt.state.values()] + opt.norms.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_dtype_and_device_change_nothing(backend, kind, dtype):
    device = torch.get_default_device()
    expected = trained(kind, backend, dtype, device)
    for default in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            assert trained(kind, backend, dtype, device) == expected
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert trained(kind, backend, dtype, device) == expected
