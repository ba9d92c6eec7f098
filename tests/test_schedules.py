"""Late phase and radius schedules: the papers' formulas, torch's manners, exact resume."""

import copy
import math

import pytest
import reference
import torch
from torch import nn

import bsam_fused
from bsam_fused.schedules import (
    ConstantRadius,
    CosineRadius,
    ExponentialRadius,
    LambdaRadius,
    LatePhase,
    LinearRadius,
    ProportionalRadius,
    SequentialRadius,
)

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def closure_of(net, opt, t, calls):
    home, drawn = next(net.parameters()).device, {"generator": torch.Generator("cpu").manual_seed(t), "device": "cpu"}
    x, y = torch.randn(16, 4, **drawn).to(home), torch.randint(3, (16,), **drawn).to(home)

    def closure():
        calls.append(t)
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def train(net, opt, *schedules, steps, begin=0):
    """Return how many passes each step took."""
    calls = []
    for t in range(begin, begin + steps):
        opt.step(closure_of(net, opt, t, calls))
        for schedule in schedules:
            schedule.step()
    return [calls.count(t) for t in range(begin, begin + steps)]


# ---- late phase


@pytest.mark.parametrize("kind", KINDS)
def test_passes_of_each_step(kind):
    """The base's one pass before the switch, then the optimizer's own; early is the complement, every k-th thinned."""
    full = len(kind._calls)
    for options, expected in [
        ({"start": 0.7}, [1] * 7 + [full] * 3),
        ({"start": 0.3, "early": True}, [full] * 3 + [1] * 7),
        ({"start": 0.0, "every": 3}, [full, 1, 1] * 3 + [full]),
        ({"start": 0.5, "every": 2}, [1] * 5 + [full, 1, full, 1, full]),
        ({"start": 0.5, "every": 4, "early": True}, [full, 1, 1, 1, full] + [1] * 5),
        ({"start": 0.0}, [full] * 10),
        ({"start": 1.0}, [1] * 10),
        ({}, [1] * 9 + [full]),
    ]:
        net = network()
        opt = kind(net.parameters(), lr=0.1)
        assert train(net, opt, LatePhase(opt, 10, **options), steps=10) == expected, options
    assert train(net, opt, steps=2) == [full, full]  # the late phase lasts


def test_switch_is_at_the_nearest_step():
    """0.29 · 100 is 28.999… in floating point."""
    opt = bsam_fused.SAM(network().parameters(), lr=0.1)
    late = LatePhase(opt, 100, start=0.29)
    active = []
    for _ in range(30):
        active.append(opt.active)
        late.step()
    assert active.index(True) == 29


def test_inactive_steps_are_the_base_optimizers(backend):
    """Weights, momentum and losses are those of torch.optim.SGD to float32's rounding; only state is held."""
    nets = [network() for _ in range(2)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    opt = bsam_fused.SAM(nets[0].parameters(), backend=backend, **options)
    plain = torch.optim.SGD(nets[1].parameters(), **options)
    late = LatePhase(opt, 20, start=0.9)
    for t in range(18):
        losses = [o.step(closure_of(net, o, t, [])) for net, o in zip(nets, (opt, plain)) if not o.zero_grad()]
        late.step()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert opt.active
    for p, q in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        ours, theirs = opt.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    (flat,) = opt._flats
    assert flat.extra_bytes == ours.untyped_storage().nbytes()


@pytest.mark.parametrize("resume_at", [3, 8], ids=["before the switch", "after it"])
def test_late_phase_resumes(resume_at):
    whole = network()
    opt = bsam_fused.BSAM(whole.parameters(), lr=0.1, momentum=0.9)
    late = LatePhase(opt, 12, start=0.5, every=2)
    passes = train(whole, opt, late, steps=resume_at)
    saved = copy.deepcopy((whole.state_dict(), opt.state_dict(), late.state_dict()))
    passes += train(whole, opt, late, steps=12 - resume_at, begin=resume_at)

    resumed = network()
    opt = bsam_fused.BSAM(resumed.parameters(), lr=0.1, momentum=0.9)
    late = LatePhase(opt, 1)
    for part, state in zip((resumed, opt, late), saved):
        part.load_state_dict(state)
    assert train(resumed, opt, late, steps=12 - resume_at, begin=resume_at) == passes[resume_at:]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))


def test_late_phase_selects_a_flatter_minimum():
    """The paper's toy landscape, ½ tanh²(v tanh u): its minima v = 0 are flatter the smaller |u| is.

    Gradient descent stays where it converged; the late SAM moves along the valley to smaller |u|.
    """
    ends = {}
    for start in (1.0, 0.5):
        w = nn.Parameter(torch.tensor([1.5, 0.5], dtype=torch.float64))
        opt = bsam_fused.SAM([w], lr=0.5, rho=0.3)
        late = LatePhase(opt, 400, start=start)

        def closure(w=w):
            loss = (w[1] * w[0].tanh()).tanh().square() / 2
            loss.backward()
            return loss

        for _ in range(400):
            opt.step(closure)
            late.step()
        ends[start] = w.detach().tolist()
    assert abs(ends[1.0][0]) > 1.4
    assert abs(ends[0.5][0]) < 0.8


# ---- radii


def two_groups(kind=bsam_fused.BSAM, **options):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    return kind([{"params": [a]}, {"params": [b], "rho": 0.4}], **{"lr": 0.1, "rho": 0.2, **options})


RADII = {  # the schedule, and ρ_t of the group that began with ρ, as the papers and torch.optim have it
    "constant": (lambda opt, radius: ConstantRadius(opt, radius=radius), lambda rho, t: rho),
    "linear": (
        lambda opt, radius: LinearRadius(opt, 8, radius=radius, end=0.1),
        lambda rho, t: 0.1 + (rho - 0.1) * (8 - min(t, 8)) / 8,
    ),
    "cosine": (
        lambda opt, radius: CosineRadius(opt, 8, radius=radius, end=0.1),
        lambda rho, t: 0.1 + (rho - 0.1) * math.cos(math.pi * min(t, 8) / 16) ** 2,
    ),
    "exponential": (lambda opt, radius: ExponentialRadius(opt, 0.9, radius=radius), lambda rho, t: rho * 0.9**t),
    "function": (lambda opt, radius: LambdaRadius(opt, lambda t: t % 3, radius=radius), lambda rho, t: rho * (t % 3)),
    "sequence": (
        lambda opt, radius: SequentialRadius(
            [LambdaRadius(opt, lambda t: t / 3, radius=radius), LinearRadius(opt, 4, radius=radius, end=0.1)], [3]
        ),
        lambda rho, t: rho * t / 3 if t < 3 else 0.1 + (rho - 0.1) * (7 - min(t, 7)) / 4,
    ),
}
every_schedule = pytest.mark.parametrize(("build", "formula"), RADII.values(), ids=RADII)


def perturbations(opt):
    """Take a step, and return how far each group went to w_max, and to w_min: the radii that it really took.

    The gradient is the same everywhere, 1, so each of the two groups has 1/√2 of the global norm.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in params])
        sum(p.sum() for p in params).backward()

    opt.step(closure)
    return [[math.sqrt(2) * (moved - w).norm().item() for w, moved in zip(seen[0], at)] for at in seen[1:]]


@every_schedule
@pytest.mark.parametrize("radius", ["rho", "rho_min"])
def test_radii_as_the_optimizer_takes_them(build, formula, radius):
    """A step's own perturbations have the radii of the formula, in each group; the other radius stays."""
    opt = two_groups(rho_min_decay="none")
    schedule = build(opt, radius)
    for t in range(11):
        expected = [formula(rho, t) for rho in (0.2, 0.4)]
        assert schedule.get_last_radius() == pytest.approx(expected, rel=1e-12)
        found = dict(zip(("rho", "rho_min"), perturbations(opt)))
        assert found.pop(radius) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert found.popitem()[1] == pytest.approx([0.2, 0.4], rel=1e-5)
        schedule.step()


def test_a_radius_may_have_its_schedule_and_the_other_its_own():
    opt = two_groups()
    rho, rho_min = ExponentialRadius(opt, 0.5), LinearRadius(opt, 4, radius="rho_min")
    for schedule in (rho, rho_min, rho):
        schedule.step()
    assert [group["rho"] for group in opt.param_groups] == [0.05, 0.1]
    assert [group["rho_min"] for group in opt.param_groups] == [0.2 * 0.75, 0.4 * 0.75]


def test_options_of_each_group():
    opt = two_groups()
    for schedule, expected in [
        (ExponentialRadius(opt, [0.5, 0.1]), [0.1, 0.04]),
        (LambdaRadius(opt, [lambda t: 1 + t, lambda t: 3 * t]), [0.4, 1.2]),
        (LinearRadius(opt, 2, end=[0.1, 0.0]), [0.15, 0.2]),
    ]:
        schedule.step()
        assert schedule.get_last_radius() == pytest.approx(expected)
    with pytest.raises(ValueError, match="gamma has 3 values, but there are 2 param groups"):
        ExponentialRadius(opt, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="1 functions, but there are 2"):
        LambdaRadius(opt, [abs])


@pytest.mark.parametrize("radius", ["rho", "rho_min"])
@pytest.mark.parametrize("scheduler", ["cosine", "onecycle", "none"])
def test_proportional_radius(radius, scheduler):
    """BSAM eq. 12, as the tests' reference has it, with ρ_end and lr_end."""
    opt = two_groups()
    lrs = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 8, eta_min=0.01),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(opt, 0.5, total_steps=8, cycle_momentum=False),
        "none": lambda: None,
    }[scheduler]()
    schedule = ProportionalRadius(opt, radius=radius, end=0.05, lr_end=0.01)
    for t in range(7):
        expected = [
            reference.rho_min(
                {
                    "rho_min_decay": "lr",
                    "rho_min": rho,
                    "rho_min_end": 0.05,
                    "rho_min_lr_end": 0.01,
                    "lr": group["lr"],
                    "lr_max": 0.5 if scheduler == "onecycle" else 0.1,
                }
            )
            for rho, group in zip((0.2, 0.4), opt.param_groups)
        ]
        assert schedule.get_last_radius() == pytest.approx([max(rho, 0) for rho in expected], rel=1e-12)
        perturbations(opt)
        if lrs:
            lrs.step()
        elif t == 3:
            opt.param_groups[0]["lr"] = 0.05
        schedule.step()
    assert schedule.get_last_radius()[0] != pytest.approx(0.2)


def test_a_schedule_of_rho_min_replaces_the_decay():
    opt = two_groups()
    for group in opt.param_groups:
        group["lr"] = 0.05
    assert perturbations(opt)[1] == pytest.approx([0.1, 0.2], rel=1e-5)
    ConstantRadius(opt)
    assert perturbations(opt)[1] == pytest.approx([0.1, 0.2], rel=1e-5)  # ρ's schedule leaves it alone
    ConstantRadius(opt, radius="rho_min")
    assert perturbations(opt)[1] == pytest.approx([0.2, 0.4], rel=1e-5)


@every_schedule
@pytest.mark.parametrize("resume_at", [0, 2, 5])
def test_schedules_resume(build, formula, resume_at):
    """In a new process, with the optimizer's state dict loaded or without: the schedule has all it needs."""
    opt = two_groups()
    schedule = build(opt, "rho")
    for _ in range(resume_at):
        schedule.step()
    saved = copy.deepcopy((opt.state_dict(), schedule.state_dict()))
    for load_optimizer in (True, False):
        resumed = two_groups()
        again = build(resumed, "rho")
        if load_optimizer:
            resumed.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
        for t in range(resume_at, resume_at + 4):
            assert again.get_last_radius() == pytest.approx([formula(rho, t) for rho in (0.2, 0.4)], rel=1e-12)
            again.step()


def test_a_schedule_made_after_loading_begins_where_the_first_did():
    """As torch's have it: initial_rho is in the groups."""
    opt = two_groups()
    schedule = LinearRadius(opt, 8)
    for _ in range(4):
        schedule.step()
    resumed = two_groups(rho=0.9)
    resumed.load_state_dict(opt.state_dict())
    LinearRadius(resumed, 8)
    assert [group["rho"] for group in resumed.param_groups] == [0.2, 0.4]


def test_radii_that_are_tensors_stay_so():
    """As lr under capture: filled in place."""
    opt = two_groups()
    held = opt.param_groups[0]["rho"] = torch.tensor(0.2, dtype=torch.float64)
    schedule = ExponentialRadius(opt, 0.5)
    schedule.step()
    assert opt.param_groups[0]["rho"] is held
    assert held.item() == pytest.approx(0.1)


def test_a_base_with_a_rho_of_its_own():
    opt = bsam_fused.SAM([nn.Parameter(torch.ones(2))], torch.optim.Adadelta, rho=0.2)
    decay = opt.param_groups[0]["rho"]
    ExponentialRadius(opt, 0.5).step()
    assert opt.param_groups[0]["rho"] == decay
    assert opt.param_groups[0]["sharpness_rho"] == 0.1


# ---- bad input


def sam():
    return bsam_fused.SAM([nn.Parameter(torch.ones(2))], lr=0.1, rho=0.2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LatePhase(sam(), 10, start=1.1), ValueError, r"start=1\.1"),
        (lambda: LatePhase(sam(), 10, start=-0.1), ValueError, r"start=-0\.1"),
        (lambda: LatePhase(sam(), 10, start=math.nan), ValueError, "start=nan"),
        (lambda: LatePhase(sam(), 0), ValueError, "total_steps=0"),
        (lambda: LatePhase(sam(), 10.5), ValueError, r"total_steps=10\.5"),
        (lambda: LatePhase(sam(), 10, every=0), ValueError, "every=0"),
        (lambda: LatePhase(torch.optim.SGD([nn.Parameter(torch.ones(1))]), 5), TypeError, "LatePhase of SGD"),
        (lambda: ConstantRadius(torch.optim.SGD([nn.Parameter(torch.ones(1))])), TypeError, "ConstantRadius of SGD"),
        (lambda: ConstantRadius(sam(), radius="rho_min"), ValueError, "SAM has no such radius"),
        (lambda: ConstantRadius(sam(), radius="lr"), ValueError, "radius='lr'"),
        (lambda: LinearRadius(sam(), 0), ValueError, "total_steps=0"),
        (lambda: CosineRadius(sam(), 5, end=-0.1), ValueError, r"end=-0\.1"),
        (lambda: ExponentialRadius(sam(), -0.5), ValueError, r"gamma=-0\.5"),
        (lambda: ProportionalRadius(sam(), lr_end=math.inf), ValueError, "lr_end=inf"),
        (lambda: LambdaRadius(sam(), lambda t: -1.0), ValueError, r"rho=-0\.2 at step 0 of LambdaRadius in group 0"),
        (lambda: SequentialRadius([], []), ValueError, "milestones"),
        (lambda: SequentialRadius([ConstantRadius(sam())] * 2, [3, 4]), ValueError, "milestones"),
        (lambda: SequentialRadius([ConstantRadius(sam())] * 2, [0]), ValueError, "milestones"),
        (lambda: SequentialRadius([ConstantRadius(sam()), ConstantRadius(sam())], [3]), ValueError, "different"),
    ],
)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("value", [-0.01, math.nan, math.inf])
def test_a_radius_that_goes_wrong_changes_nothing(value):
    """Neither the groups, of which the first is still fine, nor the count, nor the weights."""
    opt = two_groups()
    schedule = LambdaRadius(opt, [lambda t: 1 + t, lambda t: value if t == 2 else 1.0])
    before = [p.detach().clone() for group in opt.param_groups for p in group["params"]]
    schedule.step()
    with pytest.raises(ValueError, match="at step 2 of LambdaRadius in group 1: must be a finite number"):
        schedule.step()
    assert schedule.get_last_radius() == [0.4, 0.4]
    assert schedule.last_step == 1
    assert all(torch.equal(p, w) for p, w in zip((p for g in opt.param_groups for p in g["params"]), before))


def test_a_group_added_later_has_no_schedule():
    opt = sam()
    schedule = ConstantRadius(opt)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="2 param groups, but the schedule was made for 1"):
        schedule.step()
