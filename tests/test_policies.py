"""Which steps take the extra passes: by their number, at random, by their gradients; and what a resume makes of it."""

import copy
import math
import pickle

import pytest
import torch
from test_checkpoints import from_file, to_file
from torch import nn

from bsam_fused import ASAM, BSAM, SAM, LookSAM
from bsam_fused.schedules import EveryKth, LargeGradients, LatePhase, RandomSteps, policies

T = 24
CURVATURE = torch.tensor([1.0, 4.0, 0.5, 2.0, 9.0], dtype=torch.float64, device="cpu")
POLICIES = {
    "late": lambda opt: LatePhase(opt, T, start=0.4, every=2),
    "every third": lambda opt: EveryKth(opt, 3, scale_radius=True),
    "at random": lambda opt: RandomSteps(opt, 0.4, seed=5),
    "large gradients": lambda opt: LargeGradients(opt, T),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def gradient(w, t):
    """Of a noisy quadratic loss, noisier in some steps, so that ‖g‖ goes up and down."""
    noise = torch.randn(w.shape, generator=torch.Generator("cpu").manual_seed(t), dtype=torch.float64, device="cpu")
    return CURVATURE * w + noise * (3.0 if t % 5 == 2 else 0.5)


class Run:
    """An optimizer of one parameter, its policy, and how many passes each step took."""

    def __init__(self, kind, policy, backend="auto", **options):
        self.w = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        self.opt = kind([self.w], lr=0.05, momentum=0.9, rho=0.1, backend=backend, **options)
        self.policy = policy(self.opt)
        self.passes = []

    def backward(self, t):
        self.w.grad = gradient(self.w.detach().cpu(), t).to(self.w)

    def by_closure(self, t):
        calls = []

        def closure():
            calls.append(t)
            self.backward(t)

        self.opt.step(closure)
        return len(calls)

    def by_hand(self, t):
        self.backward(t)
        passes = self.opt.passes
        for call in self.opt._calls[: passes - 1]:
            getattr(self.opt, call)()
            self.backward(t)
        self.opt.step()
        return passes

    def train(self, steps, style="by_closure"):
        for t in steps:
            self.passes.append(getattr(self, style)(t))
            self.policy.step()
        return self

    def parts(self):
        return {"opt": self.opt, "policy": self.policy}


# ---- by their number, and at random


@pytest.mark.parametrize("kind", [SAM, BSAM])
def test_every_kth(kind):
    """1 + 1/k passes a step for SAM."""
    full = len(kind._calls)
    assert Run(kind, lambda opt: EveryKth(opt, 4)).train(range(8)).passes == [full, 1, 1, 1] * 2
    assert Run(kind, lambda opt: EveryKth(opt, 1)).train(range(3)).passes == [full] * 3


@pytest.mark.parametrize("kind", [SAM, ASAM, BSAM])
def test_every_kth_goes_k_times_as_far(backend, kind):
    """On request; the groups' own radii, which schedules set, stay what they are."""
    ends = []
    for scale, rho in ((True, 0.1), (False, 0.3)):
        run = Run(kind, lambda opt: EveryKth(opt, 3, scale_radius=scale), backend, norm_eps=0.0)  # noqa: B023
        for group in run.opt.param_groups:
            group["rho"] = rho
            if kind is BSAM:
                group["rho_min"] = rho
        ends.append(run.train(range(4)).w.detach())
        assert run.opt.param_groups[0]["rho"] == rho
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)
    plain = Run(kind, lambda opt: EveryKth(opt, 3), backend, norm_eps=0.0).train(range(4)).w
    assert (plain - ends[0]).abs().max() > 1e-4


def test_random_steps_are_drawn_from_seed_and_number():
    """As often as asked for, within four standard deviations, whatever was drawn in the neighbouring steps and seeds.

    Nobody's generator moves, nor is asked.
    """
    drawn = {}
    for seed in range(4):
        policy = Run(SAM, lambda opt: RandomSteps(opt, 0.3, seed=seed)).policy  # noqa: B023
        torch.manual_seed(seed)
        drawn[seed] = torch.tensor([policy.perturbs(t) for t in range(2000)]).double()
        assert drawn[seed].mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 2000))
        pairs = torch.corrcoef(torch.stack([drawn[seed][1:], drawn[seed][:-1], drawn[0][1:]]))
        assert pairs[0, 1].abs() < 4 / math.sqrt(2000)
        assert seed == 0 or pairs[0, 2].abs() < 4 / math.sqrt(2000)
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(seed).get_state())
    first = [t for t in range(16) if drawn[0][t]]
    assert first == [4, 7, 9, 11]  # in every release, or a resume would draw otherwise
    for probability, expected in ((0.0, [1] * 4), (1.0, [2] * 4)):
        assert Run(SAM, lambda opt: RandomSteps(opt, probability)).train(range(4)).passes == expected  # noqa: B023


def test_late_looksam():
    """Its own every k-th step within the phase: the steps before do not count."""
    run = Run(LookSAM, lambda opt: LatePhase(opt, 10, start=0.3), k=3).train(range(10), "by_hand")
    assert run.passes == [1, 1, 1, 2, 1, 1, 2, 1, 1, 2]


# ---- by their gradients


def ae_sam(steps, *, lag=0, rho=0.1, lr=0.05, momentum=0.9, decay=0.9, lambda_1=-1.0, lambda_2=1.0):
    """The paper's algorithm in float64, written out; the passes of each step, and w. ``lag``: on a GPU."""
    w, buffer = torch.linspace(-1, 1, 5, dtype=torch.float64, device="cpu"), None
    mu = variance = 0.0
    norms, passes = [], []
    for t in range(steps):
        g = gradient(w, t)
        norms.append(g.square().sum().item())
        perturbs = True
        if t >= lag:
            n = norms[t - lag]
            mu = decay * mu + (1 - decay) * n
            variance = decay * variance + (1 - decay) * (n - mu) ** 2
            c = t / steps * lambda_1 + (1 - t / steps) * lambda_2
            perturbs = n >= mu + c * variance**0.5
        if perturbs:
            g = gradient(w + rho * g / g.norm(), t)
        passes.append(1 + perturbs)
        buffer = g if buffer is None else momentum * buffer + g
        w = w - lr * buffer
    return passes, w


@pytest.mark.pairwise
@pytest.mark.parametrize("style", ["by_closure", "by_hand"])
@pytest.mark.parametrize("options", [{}, {"decay": 0.5, "lambda_1": -0.3, "lambda_2": 2.0}], ids=["default", "other"])
def test_ae_sam(backend, style, options):
    run = Run(SAM, lambda opt: LargeGradients(opt, T, **options), backend).train(range(T), style)
    passes, w = ae_sam(T, lag=2 if run.w.is_cuda else 0, **options)
    assert run.passes == passes
    assert {*passes} == {1, 2}
    torch.testing.assert_close(run.w.detach().cpu(), w, rtol=1e-10, atol=1e-10)


def test_few_perturb_early_and_many_late():
    passes = Run(SAM, lambda opt: LargeGradients(opt, 200)).train(range(200)).passes
    assert sum(passes[:70]) < sum(passes[-70:]) - 15


class OnGpu(float):
    """‖g‖² as a GPU has it, for the host."""

    is_cuda = True


def test_on_a_gpu_by_the_norm_of_two_steps_before(monkeypatch):
    """Which the host has heard of by then; the first two take all passes. A stand-in, for there is no GPU here."""
    monkeypatch.setattr(policies, "_Arriving", float)
    policy = Run(SAM, lambda opt: LargeGradients(opt, T)).policy
    decided = []
    norms = [gradient(torch.zeros(5), t).square().sum().item() for t in range(T)]
    for t, n in enumerate(norms):
        policy.optimizer.decide(OnGpu(1e9))  # of a step that was given up
        decided.append(policy.optimizer.decide(OnGpu(n)))
        policy.step()
        if t == 9:  # both that are under way go through the file
            saved = to_file(policy.state_dict())
            policy = LargeGradients(policy.optimizer, 1)
            policy.load_state_dict(from_file(saved))
    at_once = Run(SAM, lambda opt: LargeGradients(opt, T)).policy
    expected = [True, True]
    for t, n in enumerate(norms[:-2]):
        at_once.last_step = t + 2  # c is that of the step which decides
        expected.append(at_once._decide(torch.tensor(n)))
        at_once.mean, at_once.variance, _ = at_once._next
    assert decided == expected
    assert {*decided[2:]} == {True, False}


def test_a_step_that_is_given_up_leaves_the_means():
    """Decided again, by the gradient of now: so is a batch that was left without restore()."""
    run, twin = (Run(SAM, POLICIES["large gradients"]).train(range(6)) for _ in range(2))
    means = run.policy.mean, run.policy.variance
    for scale in (0.0, 100.0, 0.0):
        run.w.grad = torch.full_like(run.w, scale)
        assert run.opt.passes == (2 if scale else 1)
    run.w.grad = torch.full_like(run.w, 100.0)
    assert run.opt.passes == 2
    run.opt.ascend()
    run.opt.restore()
    assert (run.policy.mean, run.policy.variance) == means
    for one in (run, twin):
        one.train(range(6, 12), "by_hand")
    assert run.passes == twin.passes
    assert torch.equal(run.w, twin.w)


def test_a_decision_by_hand_is_not_of_a_closure_step():
    run, twin = (Run(SAM, POLICIES["large gradients"]).train(range(6)) for _ in range(2))
    run.w.grad = torch.full_like(run.w, 100.0)
    assert run.opt.passes == 2  # and then the batch is left
    assert run.train(range(6, 12)).passes == twin.train(range(6, 12)).passes


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_a_gradient_that_is_not_finite_is_in_no_mean(value):
    """It takes all its passes, and is skipped; 1e200 is finite, but its squares are not."""
    run, twin = (Run(SAM, POLICIES["large gradients"]).train(range(6)) for _ in range(2))
    kept = run.w.detach().clone()
    run.w.grad = torch.full_like(run.w, value)
    assert run.opt.passes == 2
    run.opt.ascend()
    run.backward(0)
    run.opt.step()
    assert run.opt.skipped_steps == 1
    assert torch.equal(run.w, kept)
    run.policy.step()
    twin.policy.step()
    assert run.train(range(6, 12)).passes == twin.train(range(6, 12)).passes


def test_passes_by_hand():
    run = Run(SAM, POLICIES["large gradients"])
    with pytest.raises(RuntimeError, match=r"passes.*ask after its backward\(\)"):
        _ = run.opt.passes
    run.train(range(4))
    run.w.grad = torch.zeros_like(run.w)
    assert run.opt.passes == 1
    with pytest.raises(RuntimeError, match=r"ascend\(\) in a step of one pass, as optimizer.passes says"):
        run.opt.ascend()
    run.opt.step()
    run.w.grad = torch.full_like(run.w, 50.0)
    assert run.opt.passes == 2
    with pytest.raises(RuntimeError, match=r"step\(\) out of order"):
        run.opt.step()
    run.opt.ascend()
    assert run.opt.passes == 2  # of the step that is under way


def test_gradients_may_change_after_passes_was_asked():
    """By hand, as whoever clips does: the step is made with those of then, and by what was decided."""
    run = Run(SAM, POLICIES["large gradients"]).train(range(4))
    run.opt.param_groups[0]["momentum"] = 0.0
    run.w.grad = torch.zeros_like(run.w)
    assert run.opt.passes == 1
    before = run.w.detach().clone()
    run.w.grad.fill_(7.0)
    run.opt.step()
    torch.testing.assert_close(run.w.detach(), before - 0.05 * 7.0)
    assert run.opt.metrics()["norm_g"] == pytest.approx(7.0 * math.sqrt(5))


def test_looksams_plain_steps_ask_nobody():
    """Its k-th alone decide, and one that does not perturb is not counted: the next one is asked again."""
    asked = []
    run = Run(LookSAM, lambda opt: EveryKth(opt, 1), k=3)
    run.opt.decide = lambda n: asked.append(float(n)) or len(asked) != 2
    assert run.train(range(9)).passes == [2, 1, 1, 1, 2, 1, 1, 2, 1]
    assert len(asked) == 4


def test_what_cannot_decide_says_so():
    run = Run(SAM, POLICIES["large gradients"])
    with pytest.raises(TypeError, match="ascent_closure with decide"):
        run.opt.step(lambda: None, ascent_closure=lambda: None)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (0.0, 50.0):
        scaler.scale(torch.ones(()))
        run.w.grad = torch.full_like(run.w, value)
        if run.opt.passes > 1:
            run.opt.ascend()
            run.w.grad = torch.full_like(run.w, value)
        with pytest.raises(RuntimeError, match=r"decide with GradScaler.*restore\(\) gives up this step"):
            scaler.step(run.opt)
        run.opt.restore()
    run.opt.active = False
    run.w.grad = torch.ones_like(run.w)
    scaler.step(run.opt)  # nobody decides


# ---- resume, copies


@every_policy
@pytest.mark.parametrize("kind", [SAM, LookSAM])
@pytest.mark.parametrize("resume_at", [1, 10])
def test_policies_resume(policy, kind, resume_at):
    """Bit for bit, from plain data, in a policy that was built with other numbers."""
    whole = Run(kind, policy).train(range(resume_at))
    saved = to_file({name: part.state_dict() for name, part in whole.parts().items()})
    again = Run(kind, policy)
    again.w.data.copy_(whole.w.detach())
    for name, state in from_file(saved).items():
        again.parts()[name].load_state_dict(state)
    again.opt.active = True  # what the policy's state dict is to set
    again.policy.load_state_dict(from_file(saved)["policy"])
    whole.train(range(resume_at, T))
    again.train(range(resume_at, T))
    assert {*whole.passes} == {1, 2}
    assert again.passes == whole.passes[resume_at:]
    assert torch.equal(again.w, whole.w)


@every_policy
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_policies_are_copied_with_their_optimizer(policy, copied):
    """The copy's policy sets up the copy, and is asked by it."""
    run = Run(LookSAM, policy, k=2).train(range(9))
    twin = copied(run)
    assert twin.policy.optimizer is twin.opt
    if run.opt.decide is not None:
        assert twin.opt.decide.__self__ is twin.policy
    assert (twin.opt.active, twin.opt.radius_factor) == (run.opt.active, run.opt.radius_factor)
    for one in (run, twin):
        one.train(range(9, T))
    assert twin.passes == run.passes
    assert torch.equal(twin.w, run.w)


# ---- bad input


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda opt: EveryKth(opt, 0), ValueError, "k=0: must be an integer ≥ 1"),
        (lambda opt: EveryKth(opt, 2, scale_radius="yes"), ValueError, "scale_radius='yes'"),
        (lambda opt: RandomSteps(opt, 1.5), ValueError, r"probability=1.5: must be a number in \[0, 1\]"),
        (lambda opt: RandomSteps(opt, math.nan), ValueError, "probability=nan"),
        (lambda opt: RandomSteps(opt, "0.5"), ValueError, "probability='0.5'.*not a str"),
        (lambda opt: RandomSteps(opt, seed=-1), ValueError, "seed=-1"),
        (lambda opt: LargeGradients(opt, 0), ValueError, "total_steps=0"),
        (lambda opt: LargeGradients(opt, 5, lambda_1=math.inf), ValueError, "lambda_1=inf: must be a finite number"),
        (lambda opt: LargeGradients(opt, 5, lambda_2=True), ValueError, "lambda_2=True"),
        (lambda opt: LargeGradients(opt, 5, decay=1.0), ValueError, r"decay=1.0: must be a number in \[0, 1\)"),
        (lambda opt: LargeGradients(opt.base_optimizer, 5), TypeError, "LargeGradients of SGD"),
    ],
)
def test_bad_input(build, error, message):
    opt = SAM([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(error, match=message):
        build(opt)
    assert opt.decide is None
