"""What people run beside the optimizer, EMA, LR schedulers and torch.compile, does what it does with the plain base."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bsam_fused import BSAM, SAM
from bsam_fused.report import loops

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {SAM: loops.PlainSAM, BSAM: loops.PlainBSAM}
every_kind = pytest.mark.parametrize("kind", KINDS)
STEPS, PEAK, RHO = 12, 0.4, 0.3
SCHEDULERS = {
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, PEAK, total_steps=STEPS + 1),
    "warm-up, cosine": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, STEPS - 4)], [4]
    ),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1, threshold=0.3),
}


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(n=STEPS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 6, generator=generator, dtype=torch.float64) for _ in range(n)]


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def passes(net, opt, calls, x):
    """A step by hand; the loss at w."""
    losses = []
    for call in calls:
        losses.append(net(x).square().mean())
        losses[-1].backward()
        getattr(opt, call)()
    opt.zero_grad()
    return losses[0].item()


@every_kind
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(kind, backend, base, scheduler):
    """Against the papers' loops around the plain base, which the scheduler moves: lr, momentum or betas, and ρ_min."""
    net, other = network(), network()
    options = {"lr": PEAK, **({"momentum": 0.9} if base is torch.optim.SGD else {"eps": 1e-3})}
    opt = kind(net.parameters(), base, rho=RHO, backend=backend, **options)
    plain_base = base(other.parameters(), **options)
    plain = KINDS[kind](other.parameters(), plain_base, *[RHO] * (len(opt._calls) - 1))
    schedules = SCHEDULERS[scheduler](opt), SCHEDULERS[scheduler](plain_base)
    rates = set()
    for x in batches():
        losses = passes(net, opt, opt._calls, x), passes(other, plain, opt._calls, x)
        for schedule, loss in zip(schedules, losses):
            schedule.step(*[loss] if scheduler == "plateau" else [])
        rates.add(opt.param_groups[0]["lr"])
        for key in ("lr", "momentum", "betas"):
            assert opt.param_groups[0].get(key) == plain_base.param_groups[0].get(key)
    assert len(rates) >= 3
    for p, q in zip(net.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@every_kind
def test_an_average_of_weights_is_of_w(kind):
    """Taken after the step, or within one, in ``unperturbed()``."""
    net = network()
    opt = kind(net.parameters(), lr=0.2, momentum=0.9, rho=RHO, model=net)
    after, within = (AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True) for _ in range(2))
    ws = []

    def closure(x):
        with opt.unperturbed():
            seen.append(weights(net))
            if len(seen) == len(opt._calls):
                within.update_parameters(net)
        loss = net(x).square().mean()
        loss.backward()
        return loss

    for x in batches(5):
        seen = []
        ws.append(weights(net))
        opt.step(partial(closure, x))
        after.update_parameters(net)
        assert all(torch.equal(p, q) for look in seen for p, q in zip(look, ws[-1]))
    for average, seen in ((within, ws), (after, [*ws[1:], weights(net)])):
        expected = seen[0]
        for w in seen[1:]:
            expected = [0.8 * e + 0.2 * p for e, p in zip(expected, w)]
        for p, e in zip(average.parameters(), expected):
            torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-13)


@every_kind
@pytest.mark.parametrize("what", ["model", "closure"])
def test_compiled_code_is_compiled_once(kind, what):
    """The first step sees running statistics move, and stay; no later step compiles, whatever lr, ρ and the data are.

    Whether the code generated from the graphs is right is Inductor's; the recipe runs it.
    """
    torch._dynamo.reset()
    counters.clear()
    nets = network().float(), network().float()
    compiled = torch.compile(nets[0], backend="aot_eager") if what == "model" else nets[0]
    kinds = [kind(net.parameters(), lr=0.1, momentum=0.9, rho=0.05, model=net) for net in nets]

    def work(net, x):
        loss = net(x).square().mean()
        loss.backward()
        return loss

    works = torch.compile(work, backend="aot_eager") if what == "closure" else work, work
    compilations = []
    for t, x in enumerate(batches(5)):
        losses = [opt.step(partial(run, net, x.float())) for opt, run, net in zip(kinds, works, (compiled, nets[1]))]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        for opt in kinds:
            opt.param_groups[0].update(lr=0.1 / (t + 2), rho=0.05 / (t + 2))
        compilations.append(counters["stats"]["unique_graphs"])
    assert compilations[0] >= 1
    assert compilations[1:] == [compilations[1]] * 4
    for p, q in zip(*(net.state_dict().values() for net in nets)):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# ---- what torch wraps step() in


@pytest.fixture
def no_labels(monkeypatch):
    """Fails a step that is labelled for profilers."""
    label = torch.autograd.profiler.record_function

    def refuse(name, *rest):
        assert not name.startswith("Optimizer.step#")
        return label(name, *rest)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", refuse)


def one_step(kind, **options):
    p = nn.Parameter(torch.ones(3))
    opt = kind([p], lr=0.1, **options)

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    return opt, closure


@pytest.mark.usefixtures("no_labels")
@pytest.mark.parametrize("kind", [SAM, BSAM])
def test_step_has_no_label_where_nobody_watches(kind):
    opt, closure = one_step(kind)
    opt.step(closure)


@pytest.mark.parametrize("kind", [SAM, BSAM])
def test_a_profiler_sees_the_step(kind):
    opt, closure = one_step(kind)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        opt.step(closure)
    labels = [event.name for event in profiler.events() if event.name.startswith("Optimizer.step#")]
    assert labels == [f"Optimizer.step#{kind.__name__}.step"]


@pytest.mark.parametrize("everywhere", [False, True], ids=["of this optimizer", "of all"])
@pytest.mark.parametrize("kind", [SAM, BSAM])
def test_step_hooks_are_called_once(kind, everywhere):
    """Before and after the whole step, and a pre-hook's arguments are used, as torch has it."""
    opt, closure = one_step(kind)
    called = []

    def before(optimizer, args, kwargs):
        called.append("before")
        _, closure = args
        return (optimizer, lambda: called.append("pass") or closure()), kwargs

    def after(*_):
        called.append("after")

    if everywhere:
        handles = [
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        ]
    else:
        handles = [opt.register_step_pre_hook(before), opt.register_step_post_hook(after)]
    try:
        opt.step(closure)
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["before", *["pass"] * (2 if kind is SAM else 3), "after"]
