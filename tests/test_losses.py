"""BiSAM's losses: the paper's formula and bounds, the recorded trajectory, and what F.cross_entropy's users expect."""

import math
import time

import pytest
import reference
import torch
import torch.nn.functional as F
from golden_net import Recording

import bsam_fused
from bsam_fused.losses import BiSAMLogLoss, BiSAMTanhLoss, bisam_log_loss, bisam_tanh_loss

LOSSES = {"log": (bisam_log_loss, reference.phi_log), "tanh": (bisam_tanh_loss, reference.phi_tanh)}
every_loss = pytest.mark.parametrize(("loss", "phi"), LOSSES.values(), ids=LOSSES)


def by_loop(logits, target, mu, phi):
    return [reference.bisam_q(f.tolist(), y, mu, phi) for f, y in zip(logits, target.tolist())]


# ---- the paper


@every_loss
@pytest.mark.parametrize("mu", [0.5, 1.0, 10.0])
def test_formula(loss, phi, mu):
    logits, target = 3 * torch.randn(17, 6, dtype=torch.float64), torch.randint(6, (17,))
    q = torch.tensor(by_loop(logits, target, mu, phi), dtype=torch.float64)
    for reduction, expected in (("none", q), ("mean", q.mean()), ("sum", q.sum())):
        torch.testing.assert_close(loss(logits, target, mu=mu, reduction=reduction), expected, rtol=1e-12, atol=1e-12)


def test_defaults_are_the_authors():
    logits, target = torch.randn(9, 4, dtype=torch.float64), torch.randint(4, (9,))
    assert bisam_log_loss(logits, target).item() == pytest.approx(
        sum(by_loop(logits, target, 1.0, reference.phi_log)) / 9, rel=1e-12
    )
    assert bisam_tanh_loss(logits, target).item() == pytest.approx(
        sum(by_loop(logits, target, 10.0, reference.phi_tanh)) / 9, rel=1e-12
    )
    assert bisam_tanh_loss(logits, target, alpha=2.0).item() == pytest.approx(
        sum(by_loop(logits, target, 10.0, lambda x: reference.phi_tanh(x, 2.0))) / 9, rel=1e-12
    )


@every_loss
def test_phi_is_below_the_step(loss, phi):
    """φ(x) ≤ 1 where x > 0, ≤ 0 elsewhere, φ(0) = 0; φ read off Q for two classes, where Q = 1/μ log(1 + exp(μ φ))."""
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    logits, target = torch.stack([torch.zeros_like(x), x], 1), torch.zeros(len(x), dtype=torch.long)
    found = torch.expm1(loss(logits, target, mu=1.0, reduction="none")).log()
    assert (found <= (x > 0).double() + 1e-12).all()
    assert found[30_000].item() == pytest.approx(0, abs=1e-12)
    assert (found.diff() > -1e-12).all()  # it rises with the margin by which the wrong class wins
    assert found[-1] > 0.99
    expected = torch.tensor([phi(v) for v in x[::97].tolist()], dtype=torch.float64)
    torch.testing.assert_close(found[::97].exp(), expected.exp(), rtol=1e-12, atol=1e-12)


@every_loss
@pytest.mark.parametrize("mu", [0.3, 1.0, 10.0, 300.0])
def test_lower_bound_of_the_error_rate(loss, phi, mu):
    """Q − log(K)/μ ≤ the 0-1 loss, example by example; and Q itself is above it for large μ and logits: not vacuous."""
    for scale in (0.1, 1.0, 10.0, 1000.0):
        logits, target = scale * torch.randn(2000, 7, dtype=torch.float64), torch.randint(7, (2000,))
        q = loss(logits, target, mu=mu, reduction="none")
        wrong = (logits.argmax(1) != target).double()
        assert (q - math.log(7) / mu <= wrong + 1e-12).all()
    if mu == 300.0:
        assert (q - wrong).abs().mean() < 0.01


@every_loss
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4)])
def test_gradcheck(loss, phi, shape):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, shape[:1] + shape[2:])
    target.view(-1)[1] = -100
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(lambda f, r=reduction: loss(f, target, reduction=r), logits)
    assert torch.autograd.gradgradcheck(lambda f: loss(f, target), logits)


@pytest.mark.parametrize("style", ["closures", "by hand"])
@pytest.mark.parametrize("mu", [1.0, 2.0], ids=["mu", "another mu"])
def test_recorded_trajectory(style, mu, backend):
    """From the authors' code: Q at w (times μ), cross-entropy at w_max, and the weights after twelve steps.

    Another μ leads elsewhere, far beyond the tolerance.
    """
    rec = Recording("bisam_log_sgd_f64")
    net = rec.network()
    opt = rec.optimizer(net.parameters(), backend=backend)
    far = mu != rec.meta["mu"]
    for t, (x, y, _) in enumerate(rec.batches()):
        at_max = []

        def ascent(x=x, y=y):
            q = bisam_log_loss(net(x), y, mu=mu)
            q.backward()
            return q

        def closure(x=x, y=y, at_max=at_max):
            at_max.append(F.cross_entropy(net(x), y))
            at_max[-1].backward()
            return at_max[-1]

        if style == "closures":
            q = opt.step(closure, ascent_closure=ascent)
        else:
            q = ascent()
            opt.ascend()
            closure()
            opt.step()
            opt.zero_grad()
        if not far:
            assert mu * q.item() == pytest.approx(rec.arrays["traj.perturbation_loss"][t].item(), rel=1e-9)
            assert at_max[0].item() == pytest.approx(rec.arrays["traj.loss_max"][t].item(), rel=1e-9)
    distance = max((p - rec.final()[n]).abs().max().item() for n, p in net.named_parameters())
    assert distance > 1e-4 if far else distance < 1e-9


# ---- as F.cross_entropy has it


@every_loss
def test_more_dimensions_are_more_examples(loss, phi):
    logits, target = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    flat, flat_target = logits.movedim(1, -1).reshape(-1, 5), target.reshape(-1)
    torch.testing.assert_close(loss(logits, target), loss(flat, flat_target))
    every = loss(logits, target, reduction="none")
    torch.testing.assert_close(every.reshape(-1), loss(flat, flat_target, reduction="none"))
    one = torch.stack([loss(f, y) for f, y in zip(flat, flat_target)])
    torch.testing.assert_close(every.reshape(-1), one)


@every_loss
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_targets_count_for_nothing(loss, phi, ignore_index):
    """Not in the mean, and not even with NaN logits; their gradient is zero."""
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 3, 1, 0, 3])
    kept = loss(logits[2:], target[2:])
    target[:2] = ignore_index
    logits[0] = math.nan
    logits.requires_grad_()
    found = loss(logits, target, ignore_index=ignore_index)
    torch.testing.assert_close(found, kept)
    found.backward()
    assert logits.grad[:2].eq(0).all()
    assert logits.grad[2:].ne(0).any()
    assert loss(logits, target, reduction="none", ignore_index=ignore_index)[:2].eq(0).all()
    nothing = torch.full((6,), ignore_index)
    assert loss(logits, nothing, ignore_index=ignore_index).isnan()  # as F.cross_entropy
    assert loss(logits, nothing, reduction="sum", ignore_index=ignore_index) == 0


@every_loss
def test_logits_are_never_written_to(loss, phi):
    logits, target = torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,))
    before, version = logits.detach().clone(), logits._version
    loss(logits, target).backward()
    assert logits._version == version
    assert torch.equal(logits, before)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(loss, phi, dtype):
    """As close to float64 as one rounding of Q is, at logits as large as the dtype has."""
    largest = torch.finfo(dtype).max
    logits = torch.cat([torch.randn(50, 9), 100 * torch.randn(50, 9), largest * torch.randn(50, 9).clamp(-1, 1)])
    logits, target = logits.to(dtype).requires_grad_(), torch.randint(9, (150,))
    found = loss(logits, target, reduction="none")
    assert found.dtype == dtype
    expected = loss(logits.detach().double(), target, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    loss(logits, target).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.ne(0).any()


@every_loss
def test_extreme_logits(loss, phi):
    logits = torch.tensor([[3e38, -3e38], [-3e38, 3e38], [0.0, 0.0]], requires_grad=True)
    q = loss(logits, torch.zeros(3, dtype=torch.long), reduction="none")
    q.sum().backward()
    assert q.isfinite().all()
    assert logits.grad.isfinite().all()


@every_loss
def test_fast(loss, phi):
    """The authors' loop takes 1.5 s for these logits. One thread, so that other processes count for little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logits, target = torch.randn(1024, 100, requires_grad=True), torch.randint(100, (1024,))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        loss(logits, target).backward()
        times.append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    assert min(times) < 0.010


def test_modules():
    logits, target = torch.randn(4, 3, 5), torch.randint(3, (4, 5))
    target[0] = 1
    options = {"reduction": "sum", "ignore_index": 1}
    torch.testing.assert_close(
        BiSAMLogLoss(mu=2.0, **options)(logits, target), bisam_log_loss(logits, target, mu=2.0, **options)
    )
    torch.testing.assert_close(
        BiSAMTanhLoss(mu=2.0, alpha=0.3, **options)(logits, target),
        bisam_tanh_loss(logits, target, mu=2.0, alpha=0.3, **options),
    )
    torch.testing.assert_close(BiSAMLogLoss()(logits, target), bisam_log_loss(logits, target))
    torch.testing.assert_close(BiSAMTanhLoss()(logits, target), bisam_tanh_loss(logits, target))


# ---- bad input

LOGITS, TARGET = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)


@every_loss
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS, torch.tensor([0, 1, 3, 0])), IndexError, "target 3 is out of range: there are 3 classes"),
        ((LOGITS, torch.tensor([0, -1, 0, 0])), IndexError, "target -1"),
        ((LOGITS, TARGET[:3]), ValueError, r"\(4, 3\) and target \(3,\)"),
        ((LOGITS, TARGET.unsqueeze(1)), ValueError, "shape"),
        ((torch.tensor(0.0), torch.tensor(0)), ValueError, "shape"),
        ((LOGITS, LOGITS), TypeError, "integers"),
        ((LOGITS.long(), TARGET), TypeError, "floating point"),
        ((LOGITS, TARGET, 0.0), ValueError, r"mu=0\.0"),
        ((LOGITS, TARGET, math.inf), ValueError, "mu=inf"),
    ],
)
def test_bad_input(loss, phi, arguments, error, message):
    with pytest.raises(error, match=message):
        loss(*arguments)


def test_bad_options():
    for loss in (bisam_log_loss, bisam_tanh_loss):
        with pytest.raises(ValueError, match="reduction='average'"):
            loss(LOGITS, TARGET, reduction="average")
    with pytest.raises(ValueError, match=r"alpha=-1\.0"):
        bisam_tanh_loss(LOGITS, TARGET, alpha=-1.0)


def test_a_target_out_of_range_leaves_the_model_alone():
    net = torch.nn.Linear(2, 3)
    before = [p.detach().clone() for p in net.parameters()]
    opt = bsam_fused.SAM(net.parameters(), lr=0.1)

    def ascent():
        loss = bisam_log_loss(net(torch.ones(2, 2)), torch.tensor([0, 3]))
        loss.backward()
        return loss

    with pytest.raises(IndexError):
        opt.step(lambda: None, ascent_closure=ascent)
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), before))
