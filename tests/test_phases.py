"""The public face: closures and phases by hand, what they return and remember, schedulers, learning rates."""

from contextlib import nullcontext

import pytest
import torch
from samples import assign, gradients, parameters
from torch import nn

import bsam_fused
from bsam_fused.ops import dispatch, torch_flat
from bsam_fused.optim.bsam import decayed_radius

KINDS = [bsam_fused.SAM, bsam_fused.ASAM, bsam_fused.BSAM]
every_kind = pytest.mark.parametrize("kind", KINDS)


def quadratic(w):
    return (w.square() * torch.arange(1.0, 1 + w.numel())).sum() / 2


@every_kind
@pytest.mark.parametrize("own_zero_grad", [True, False])
def test_closure_step(backend, kind, own_zero_grad):
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    opt = kind([w], lr=0.01, rho=0.1, backend=backend)
    seen, losses = [], []
    w.grad = torch.full_like(w, 100.0)  # left over; must not count

    def closure():
        assert torch.is_grad_enabled()
        if own_zero_grad:
            opt.zero_grad()
        seen.append(w.detach().clone())
        loss = quadratic(w)
        loss.backward()
        losses.append(loss)
        return loss

    with torch.no_grad():
        returned = opt.step(closure)
    assert returned is losses[0]
    assert len(losses) == len(opt._calls)
    assert not torch.equal(w, seen[0])
    s = opt.sharpness
    assert s.loss.item() == quadratic(seen[0]).item()
    assert s.max_sharpness.item() == pytest.approx((losses[1] - losses[0]).item())
    assert s.max_sharpness > 0
    assert not s.loss_max.requires_grad
    if kind is bsam_fused.BSAM:
        assert s.min_sharpness.item() == pytest.approx((losses[0] - losses[2]).item())
        assert s.min_sharpness > 0
        assert s.bilateral_sharpness.item() == pytest.approx((losses[1] - losses[2]).item())
    else:
        assert s.min_sharpness is s.bilateral_sharpness is s.loss_min is None
    expected = [torch.autograd.grad(quadratic(x), x)[0] for x in (v.clone().requires_grad_() for v in seen)]
    if kind is not bsam_fused.ASAM:
        for slot, g in enumerate(expected):
            assert opt.norms[slot].item() == pytest.approx(g.norm().item(), rel=1e-6)


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.ASAM])
def test_ascent_closure(backend, kind):
    """Another loss for the ascent: the perturbation follows it, the update does not see it."""
    w = nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = kind([w], lr=0.5, rho=0.1, backend=backend)
    calls = []

    def ascent():
        calls.append("ascent")
        loss = 3 * w[0]
        loss.backward()
        return loss

    def closure():
        calls.append("closure")
        w_max = w.detach().clone()
        loss = w[1] * 2.0
        loss.backward()
        assert w_max[0] > 1.0
        assert w_max[1] == -2.0
        return loss

    assert opt.step(closure, ascent_closure=ascent).item() == 3.0
    assert calls == ["ascent", "closure"]
    assert opt.sharpness is None
    assert w.tolist() == [1.0, -3.0]


@every_kind
def test_inactive_calls_the_closure_once(backend, kind):
    w = nn.Parameter(torch.ones(3))
    opt = kind([w], lr=0.1, backend=backend)
    opt.active = False
    calls = []

    def closure():
        calls.append(1)
        loss = w.sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 3.0
    assert calls == [1]
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.9))
    assert opt.sharpness is None


@every_kind
def test_closures_that_return_floats_or_nothing(backend, kind):
    w = nn.Parameter(torch.ones(3))
    opt = kind([w], lr=0.1, backend=backend)

    def closure(value):
        w.sum().backward()
        return value

    assert opt.step(lambda: closure(2.0)) == 2.0
    assert opt.sharpness.max_sharpness == 0.0
    assert opt.step(lambda: closure(None)) is None
    assert opt.sharpness is None
    opt.step(lambda: closure(float("nan")))
    assert opt.skipped_steps == 1


@every_kind
def test_unperturbed(backend, kind):
    """In any phase the weights are w inside and perturbed again outside; what is written inside is kept as w."""
    params = parameters("odd")
    w = [p.detach().clone() for p in params]
    opt = kind(params, lr=0.1, rho=1.0, backend=backend)
    with opt.unperturbed():
        assert all(torch.equal(p, x) for p, x in zip(params, w))
    for t, call in enumerate(opt._calls[:-1]):
        assign(params, gradients(params, t))
        getattr(opt, call)()
        moved = [p.detach().clone() for p in params]
        with opt.unperturbed(), opt.unperturbed():
            assert all(torch.equal(p, x) for p, x in zip(params, w))
        assert all(torch.equal(p, x) for p, x in zip(params, moved))
        assert not torch.equal(params[0], w[0])

    def raise_inside():
        with opt.unperturbed():
            params[0].data.add_(1.0)
            raise KeyError

    with pytest.raises(KeyError):
        raise_inside()
    opt.restore()
    assert torch.equal(params[0], w[0] + 1.0)
    assert torch.equal(params[1], w[1])


@every_kind
def test_phases_clear_gradients_and_step_leaves_the_last(backend, kind):
    """By hand no zero_grad is needed within a step; after it .grad is there, as with torch's optimizers."""
    w = nn.Parameter(torch.ones(3))
    opt = kind([w], lr=0.1, backend=backend)
    for call in opt._calls:
        quadratic(w).backward()
        getattr(opt, call)()
        assert (w.grad is None) == (call != "step")


@every_kind
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheduler", ["cosine", "onecycle", "lambda"])
def test_lr_schedulers_work_on_the_optimizer(backend, kind, scheduler):
    w = nn.Parameter(torch.ones(3))
    opt = kind([w], lr=0.1, momentum=0.9, backend=backend)
    schedule = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
        "onecycle": lambda: torch.optim.lr_scheduler.OneCycleLR(opt, 0.4, total_steps=10),
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t),
    }[scheduler]()
    rates = []

    def closure():
        loss = quadratic(w)
        loss.backward()
        return loss

    for _ in range(5):
        opt.step(closure)
        schedule.step()
        rates.append(opt.base_optimizer.param_groups[0]["lr"])
    assert len(set(rates)) == 5
    assert rates[-1] == opt.param_groups[0]["lr"] == schedule.get_last_lr()[0]


@pytest.mark.parametrize(
    ("lr", "expected"),
    [(0.1, 0.4), (0.055, 0.3 / 2 + 0.1), (0.01, 0.1)],
)
def test_radius_decay(lr, expected):
    """Eq. 12 at lr_max, halfway between, and at lr_end."""
    assert decayed_radius(0.4, lr, 0.1, rho_min_end=0.1, lr_end=0.01) == pytest.approx(expected)


def test_radius_without_decay():
    assert decayed_radius(0.4, 0.1, 0.1, lr_end=0.1) == 0.4
    opt = bsam_fused.BSAM([nn.Parameter(torch.ones(2))], lr=0.1, rho_min=0.3, rho_min_decay="none")
    opt.param_groups[0]["lr"] = 0.01
    assert opt._radii("rho_min", -1.0)[0].radius == -0.3


@pytest.mark.parametrize(
    ("keys", "lr_max"), [({}, 0.2), ({"initial_lr": 0.4}, 0.4), ({"initial_lr": 0.4, "max_lr": 0.8}, 0.8)]
)
def test_what_the_largest_learning_rate_is(keys, lr_max):
    """max_lr, else initial_lr, else lr at construction; and it survives a resume at a lower lr.

    A larger lr counts when it was that of a step; ρ_min is then whole, and never more.
    """
    opt = bsam_fused.BSAM([nn.Parameter(torch.ones(2))], lr=0.2, rho=0.1, rho_min=0.6)
    opt.param_groups[0].update(keys)
    opt.param_groups[0]["lr"] = 0.05
    assert opt._radii("rho_min", -1.0)[0].radius == pytest.approx(-0.6 * 0.05 / lr_max)
    resumed = bsam_fused.BSAM([nn.Parameter(torch.ones(2))], lr=0.05, rho_min=0.6)
    resumed.load_state_dict(opt.state_dict())
    assert resumed._radii("rho_min", -1.0)[0].radius == pytest.approx(-0.6 * 0.05 / lr_max)
    for optimizer in (opt, resumed):
        optimizer.param_groups[0]["lr"] = 2.0
        assert optimizer._all_radii()[-1][0].radius == -0.6
    resumed = bsam_fused.BSAM([nn.Parameter(torch.ones(2))], lr=0.05, rho_min=0.6)
    resumed.load_state_dict(opt.state_dict())
    resumed.param_groups[0]["lr"] = 0.05
    assert resumed._radii("rho_min", -1.0)[0].radius == pytest.approx(-0.6 * 0.05 / 2.0)


def test_the_largest_learning_rate_of_a_late_phase_is_that_of_its_plain_steps():
    p = nn.Parameter(torch.ones(2))
    opt = bsam_fused.BSAM([p], lr=0.01, rho_min=0.6)
    opt.active = False
    for lr in (0.01, 0.2, 0.05):
        opt.param_groups[0]["lr"] = lr
        p.grad = torch.ones(2)
        opt.step()
    assert opt._radii("rho_min", -1.0)[0].radius == pytest.approx(-0.6 * 0.05 / 0.2)


def test_layer_decay_leaves_every_group_its_whole_rho_min_at_the_peak():
    """As timm's schedulers have it: every group's lr is the schedule's times its lr_scale, in warm-up, too."""
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr_scale": scale} for scale in (0.1, 0.5, 1.0)]
    opt = bsam_fused.BSAM(groups, lr=1e-3, rho_min=0.6)
    for lr, share in [(1e-4, 0.1), (1e-3, 1.0), (5e-4, 0.5), (2e-3, 1.0), (1e-3, 0.5), (0.0, 0.0)]:
        for group in opt.param_groups:
            group["lr"] = lr * group["lr_scale"]
        assert [r.radius for r in opt._all_radii()[-1]] == pytest.approx([-0.6 * share] * 3)


@pytest.mark.parametrize(("rho_min_end", "expected"), [(0.0, 0.6), (0.9, 0.6)])
def test_rho_min_stays_between_its_ends(rho_min_end, expected):
    """A learning-rate finder rises to 10⁶ times the first lr, and a schedule may end below lr_end."""
    opt = bsam_fused.BSAM(
        [nn.Parameter(torch.ones(2))], lr=1e-6, rho_min=0.6, rho_min_end=rho_min_end, rho_min_lr_end=1e-7
    )
    for lr in (1e-6, 1e-3, 1.0):
        opt.param_groups[0]["lr"] = lr
        assert -opt._all_radii()[-1][0].radius == pytest.approx(expected)
    opt.param_groups[0]["lr"] = 1e-8
    assert -opt._radii("rho_min", -1.0)[0].radius == rho_min_end


def test_rho_min_defaults_to_rho():
    opt = bsam_fused.BSAM([{"params": [nn.Parameter(torch.ones(2))], "rho": 0.3}], lr=0.1, rho=0.2)
    assert opt.param_groups[0]["rho_min"] == 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_maximize_turns_the_perturbations(backend, kind):
    """The worst case of a maximised objective is where it is lower."""
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    opt = kind([w], lr=0.01, rho=0.1, maximize=True, backend=backend)

    def closure():
        loss = w.sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.sharpness.loss_max < opt.sharpness.loss
    if kind is bsam_fused.BSAM:
        assert opt.sharpness.loss_min > opt.sharpness.loss
    assert w.sum() > 3.0


@every_kind
def test_memory(backend, kind):
    """N for SAM, 2 N for BSAM beside the base's state, padding aside."""
    params = [nn.Parameter(torch.randn(n)) for n in (100_000, 50_000, 3_000)]
    opt = kind(params, lr=0.1, momentum=0.9, backend=backend)
    peak, bytes_of_n = 0, 4 * 153_000
    for _ in range(2):
        for t, call in enumerate(opt._calls):
            assign(params, gradients(params, t))
            getattr(opt, call)()
            peak = max(peak, sum(flat.extra_bytes for flat in opt._flats))
    copies = 2 if kind is bsam_fused.BSAM else 1
    assert bytes_of_n * (copies + 1) <= peak <= 1.001 * bytes_of_n * (copies + 1)


@pytest.mark.parametrize("kind", [bsam_fused.SAM, bsam_fused.BSAM])
def test_memory_as_the_allocator_sees_it(kind):
    """Bytes allocated by a whole step of the cpp backend: `saved`, and nothing else that is not freed or taken."""
    params = [nn.Parameter(torch.randn(n)) for n in (300_000, 100_000)]
    opt = kind(params, lr=0.1, backend="cpp")
    allocated = 0
    for t, call in enumerate(opt._calls):
        assign(params, gradients(params, t))
        with torch.profiler.profile(profile_memory=True) as profile:
            getattr(opt, call)()
        allocated += sum(
            max(0, event.self_device_memory_usage, event.self_cpu_memory_usage) for event in profile.key_averages()
        )
    assert 4 * 400_000 <= allocated <= 1.02 * 4 * 400_000


@pytest.mark.parametrize("adaptive", [False, True])
def test_same_bits_whatever_the_threads(adaptive):
    """Sums are cut by the tensors, not by the threads; ten runs, one and two threads in turn."""
    results = []
    threads = torch.get_num_threads()
    try:
        for run in range(10):
            torch.set_num_threads(1 + run % 2)
            torch.manual_seed(2)
            params = [nn.Parameter(torch.randn(n)) for n in (70_000, 17, 40_001)]
            opt = bsam_fused.BSAM(params, torch.optim.AdamW, lr=0.1, adaptive=adaptive, backend="cpp")
            for t, call in enumerate(opt._calls):
                assign(params, gradients(params, t))
                getattr(opt, call)()
            results.append(torch.cat([p.detach() for p in params] + [opt.norms.float()]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@every_kind
def test_large_model_writes_around_the_cache(kind):
    """Above 16 MB stores stream; unaligned parameters among them must not."""
    memory = torch.randn(5_000_001)
    torch.manual_seed(0)
    params = [nn.Parameter(memory[1:4_500_000]), nn.Parameter(memory[4_500_003:])]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    opts = [
        kind(params, lr=0.1, momentum=0.9, backend="cpp"),
        kind(copies, lr=0.1, momentum=0.9, backend="torch"),
    ]
    for t, call in enumerate(opts[0]._calls):
        grads = gradients(params, t)
        for opt, ps in zip(opts, (params, copies)):
            assign(ps, grads)
            getattr(opt, call)()
        for p, q in zip(params, copies):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_no_phase_reads_a_device_value_on_the_host(base, monkeypatch):
    """The torch backend must not call .item() with a fused base: on a GPU each would wait for the device.

    So what runs there runs here on CPU tensors, which otherwise the lists of torch_lists.py do; state that begins is
    looked through on a CPU, where that waits for nobody, so the second step counts.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Reads.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
            return func(*args, **(kwargs or {}))

    monkeypatch.setitem(dispatch._FACTORIES, "torch", torch_flat.TorchFlatParams)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    params = parameters("odd")
    opt = bsam_fused.BSAM(params, base, lr=0.1, backend="torch")
    for t, call in enumerate([*opt._calls, *opt._calls]):
        assign(params, gradients(params, t))
        with Reads() if t >= len(opt._calls) else nullcontext():
            getattr(opt, call)()
        assert Reads.count == 0
