"""Stochastic rounding of 16-bit parameters: right in the mean, the same bits on every backend, nothing else touched."""

import copy
import functools
import math

import pytest
import torch
from members import calls
from samples import strided
from torch import nn

import bsam_fused
from bsam_fused.ops import rounding

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
SIGMAS = 4.5  # of a mean that is drawn once: the seeds are fixed


def walk(opt, params, slope):
    for k, call in enumerate(opt._calls):
        for p in params:
            p.grad = slope(p, k)
        getattr(opt, call)()


def ones(p, k):
    return torch.ones_like(p)


# Values of float32, with the neighbours that they lie between.
VALUES = {
    torch.bfloat16: [
        *[1 + share / 128 for share in (0.0, 0.1, 0.5, 0.9)],
        *[-(3 + share / 64) for share in (0.25, 0.75)],
        1e-40,  # subnormal
        *[2.0**-133 * share for share in (0.3, 1.7)],
        3.3895e38,  # more than the largest number: nearest from there on
        3.4e38,  # infinite to nearest
    ],
    torch.float16: [
        *[1 + share / 1024 for share in (0.0, 0.1, 0.5, 0.9)],
        *[-(3 + share / 512) for share in (0.25, 0.75)],
        *[2.0**-24 * share for share in (0.3, 1.7, 1023.5)],
        65505.0,  # more than the largest number: nearest from there on
        65519.9,
        65520.0,  # infinite to nearest
        1e-12,
    ],
}


@each_dtype
def test_every_value_becomes_a_neighbour_in_the_right_share(backend, dtype):
    """Weights of 0 and slopes of −1: the update rounds the learning rate itself, a group each."""
    numel, largest = 4096, torch.finfo(dtype).max
    groups = [{"params": [nn.Parameter(torch.zeros(numel, dtype=dtype))], "lr": abs(x)} for x in VALUES[dtype]]
    params = [group["params"][0] for group in groups]
    opt = bsam_fused.SAM(groups, lr=1.0, rho=0.0, backend=backend)
    slopes = {p: -math.copysign(1.0, x) for p, x in zip(params, VALUES[dtype])}
    walk(opt, params, lambda p, k: torch.full_like(p, slopes[p]))
    for p, value in zip(params, VALUES[dtype]):
        x = torch.tensor(value, dtype=torch.float32, device="cpu")
        got, nearest = p.detach().cpu(), x.to(dtype)
        if abs(x) >= largest or nearest == x:
            assert (got == nearest).all(), value
            continue
        towards = torch.tensor(math.inf if nearest < x else -math.inf, dtype=dtype, device="cpu")
        other = torch.nextafter(nearest, towards)
        share = ((x.double() - nearest.double()) / (other.double() - nearest.double())).item()
        assert ((got == nearest) | (got == other)).all(), value
        mean = (got == other).double().mean().item()
        assert abs(mean - share) <= SIGMAS * math.sqrt(share * (1 - share) / numel) + 1e-4, value


def test_no_number_is_not_rounded():
    x = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    for dtype in (torch.bfloat16, torch.float16):
        for word in (0, 2**32 - 1):
            result = rounding.rounded(x, dtype, torch.full((4,), word, dtype=torch.int64))
            assert torch.equal(result.view(torch.int16)[1:], x.to(dtype).view(torch.int16)[1:])
            assert result[0].isnan()


LOOKSAM = functools.partial(bsam_fused.LookSAM, k=2, alpha=0.5)
FRIENDLY = functools.partial(bsam_fused.FriendlySAM, sigma=0.5, lmbda=1 - 2.0**-14)


@pytest.mark.parametrize(
    "kind", [bsam_fused.SAM, bsam_fused.BSAM, LOOKSAM, FRIENDLY], ids=["SAM", "BSAM", "LookSAM", "FriendlySAM"]
)
@each_dtype
def test_the_same_bits_on_every_backend(backend, kind, dtype):
    """Where the arithmetic before it is exact: slopes of ±1, their norm a power of two, and so are all options."""
    torch.manual_seed(2)
    sizes = [1000, 3 * 55, 16384 - 1000 - 165 - sum(p.numel() for p in strided())]
    start = [*(torch.randn(n).to(dtype) for n in sizes), *(p.detach() for p in strided(dtype))]
    assert sum(w.numel() for w in start) == 4**7
    runs = []
    for name in (backend, "torch"):
        params = [nn.Parameter(w.clone(memory_format=torch.preserve_format)) for w in start[:-2]]
        gaps = start[-2].new_zeros(6, 8)[:, ::2].copy_(start[-2])
        params += [nn.Parameter(gaps), nn.Parameter(start[-1].clone())]
        options = {"lr": 2.0**-9, "momentum": 0.5, "rho": 0.25, "norm_eps": 0.0, "seed": 7}
        opt = kind([{"params": params[:2]}, {"params": params[2:]}], backend=name, **options)
        seen = []
        for t in range(3):
            for k, call in enumerate(calls(opt)):
                for i, p in enumerate(params):
                    generator = torch.Generator("cpu").manual_seed(100 * t + 10 * k + i)
                    signs = torch.randint(0, 2, p.shape, generator=generator, device="cpu") * 2 - 1
                    p.grad = torch.empty_like(p).copy_(signs)
                getattr(opt, call)()
                seen += [p.detach().clone() for p in params]
        runs.append(seen + [value.clone() for p in params for _, value in sorted(opt.state[p].items())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_draws_have_nothing_to_do_with_each_other():
    """Of elements beside each other, of operands, steps, parameters and seeds: no correlation in a million."""
    i = torch.arange(2**20, device="cpu")

    def draws(seed=0, place=(0, 0), step=0, operand=0):
        key = rounding.tensor_key(seed, *place)
        bits = rounding.random_bits(key, torch.tensor(step, device="cpu"), operand, i)
        return bits.double() / 2**32 - 0.5

    first = draws()
    others = [first.roll(1), first.roll(2), first.roll(256)]
    others += [draws(seed=1), draws(place=(1, 0)), draws(place=(0, 1)), draws(step=1), draws(operand=1)]
    assert abs(first.mean()) < SIGMAS / math.sqrt(12 * len(i))
    assert first.var().item() == pytest.approx(1 / 12, rel=0.01)
    for other in others:
        assert abs((first * other).mean() * 12) < SIGMAS / math.sqrt(len(i))


def kaiming(shapes, dtype):
    return [nn.Parameter(nn.init.kaiming_normal_(torch.empty(shape)).to(dtype)) for shape in shapes]


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_applied_perturbation_is_the_true_one_in_projection(backend, adaptive):
    """1 ± 0.01 of it, up and down; nearest rounding, on the same weights, loses half.

    As on the 11 M weights of a ResNet-18 at ρ = 0.05: ρ is scaled so that an element's share of it is the same. The
    noise of the projection is then near 2/√N = 0.002.
    """
    shapes = [(256, 256, 3, 3), (512, 1024)]
    numel = sum(math.prod(shape) for shape in shapes)
    rho = (2.0 if adaptive else 0.05) * math.sqrt(numel / 11.2e6)
    for name in ("stochastic", "nearest"):
        torch.manual_seed(3)
        params = kaiming(shapes, torch.bfloat16)
        w = [p.detach().clone() for p in params]
        opt = bsam_fused.BSAM(params, lr=0.1, rho=rho, adaptive=adaptive, rounding=name, backend=backend)
        g = [torch.randn(p.shape).to(p.dtype) for p in params]
        t = [x.double().abs() if adaptive else torch.ones_like(x, dtype=torch.float64) for x in w]
        norm = math.sqrt(sum((a * b.double()).square().sum().item() for a, b in zip(t, g)))
        upwards = torch.cat([(rho * a * a * b.double() / norm).flatten() for a, b in zip(t, g)])
        for call, sign in (("ascend", 1.0), ("descend", -1.0)):
            for p, slope in zip(params, g):
                p.grad = slope.clone()
            getattr(opt, call)()
            applied = torch.cat([(p.detach().double() - x.double()).flatten() for p, x in zip(params, w)])
            share = sign * (applied @ upwards / (upwards @ upwards)).item()
            assert share == pytest.approx(1.0, abs=0.01) if name == "stochastic" else share < 0.9, (name, call)


def test_adams_second_moment_does_not_stall(backend):
    """0.1 % of the way to 1 each step: from 1/2 on, an eighth of the spacing of bfloat16, and less."""
    p = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    opt = bsam_fused.SAM([p], torch.optim.AdamW, lr=0.0625, betas=(0.9, 0.999), rho=0.0, backend=backend)
    walk(opt, [p], ones)
    second_moment = opt.state[p]["exp_avg_sq"].fill_(0.5)
    steps = 60
    for _ in range(steps):
        walk(opt, [p], ones)
    assert second_moment.double().mean().item() == pytest.approx(1 - 0.5 * 0.999**steps, abs=0.001)


@every_kind
@each_dtype
def test_what_a_seed_is(backend, kind, dtype):
    def run(seed, steps=2):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(3000).to(dtype))
        opt = kind([p], lr=1e-3, momentum=0.9, seed=seed, backend=backend)
        g = torch.randn(3000).to(dtype)
        for _ in range(steps):
            walk(opt, [p], lambda p, k: g * (k + 1))
        return p.detach()

    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))


@pytest.mark.pairwise
@every_kind
@each_dtype
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_skipped_step_draws_but_changes_nothing(backend, kind, dtype, base):
    """The next step has bits of its own, on every backend alike, and after copying too."""
    p = nn.Parameter(torch.randn(3000).to(dtype))
    opt = kind([p], base, lr=1e-3, backend=backend)
    walk(opt, [p], ones)
    before = p.detach().clone(), copy.deepcopy(opt.state_dict())
    last = len(opt._calls) - 1
    walk(opt, [p], lambda p, k: torch.full_like(p, math.nan if k == last else 1.0))
    assert torch.equal(p, before[0])
    state = opt.state_dict()
    for key, value in before[1]["state"].get(0, {}).items():
        assert torch.equal(value, state["state"][0][key])
    assert [d["param_groups"][0]["rounded_steps"] for d in (before[1], state)] == [1, 2]
    assert copy.deepcopy(opt).state_dict()["param_groups"][0]["rounded_steps"] == 2


@every_kind
@each_dtype
def test_what_is_not_moved_is_not_rounded(backend, kind, dtype):
    p = nn.Parameter((torch.randn(5000) * torch.logspace(-8, 4, 5000)).to(dtype))
    before = p.detach().clone()
    opt = kind([p], lr=0.0, momentum=0.9, rho=0.0, backend=backend)
    for call in opt._calls:
        p.grad = torch.randn_like(p)
        getattr(opt, call)()
        assert torch.equal(p, before)


def test_wider_parameters_are_not_rounded(backend):
    """To the bit, and no count of theirs is in a state dict."""
    runs = []
    for options in ({"seed": 3}, {"rounding": "nearest"}):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3000)), nn.Parameter(torch.randn(3000).double())]
        opt = bsam_fused.BSAM(params, torch.optim.AdamW, lr=0.01, backend=backend, **options)
        walk(opt, params, ones)
        runs.append([p.detach() for p in params])
        assert opt.state_dict()["param_groups"][0]["rounded_steps"] is None
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_count_goes_with_the_state_dict_only(backend):
    """It is no option: the plain base does not mind it, and ours loads one without."""
    p = nn.Parameter(torch.randn(100).bfloat16())
    opt = bsam_fused.SAM([p], lr=0.1, momentum=0.9, backend=backend)
    walk(opt, [p], ones)
    plain = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    plain.load_state_dict(opt.state_dict())
    opt.load_state_dict(torch.optim.SGD([p], lr=0.1, momentum=0.9).state_dict())
    assert opt.state_dict()["param_groups"][0]["rounded_steps"] == 1
    assert opt.param_groups[0]["rounded_steps"] is None
    assert bsam_fused.SAM([p], plain).param_groups[0]["rounded_steps"] is None


@pytest.mark.parametrize("options", [{"rounding": "up"}, {"seed": -1}, {"seed": 2**32}, {"seed": 0.5}])
def test_a_wrong_option_is_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bsam_fused.BSAM([nn.Parameter(torch.ones(2))], lr=0.1, **options)
