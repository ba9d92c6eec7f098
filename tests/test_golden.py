"""Trajectories recorded from the algorithms' published implementations are walked again, step by step."""

import pytest
import torch
import torch.nn.functional as F
from golden_net import NAMES, Recording

RECORDED = [name for name in NAMES if not name.startswith("bisam")]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def by_closure(net, opt, x, y):
    def closure():
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    opt.step(closure)
    s = opt.sharpness
    return [loss for loss in (s.loss, s.loss_max, s.loss_min) if loss is not None]


def by_hand(net, opt, x, y):
    losses = []
    for call in opt._calls:
        losses.append(F.cross_entropy(net(x), y))
        losses[-1].backward()
        getattr(opt, call)()
    opt.zero_grad()
    return losses


def familiar(net, opt, x, y):
    """Under the names that SAM users know."""
    losses = []
    for call in ["first_step", "second_step", "third_step"][: len(opt._calls)]:
        losses.append(F.cross_entropy(net(x), y))
        losses[-1].backward()
        getattr(opt, call)(zero_grad=True)
    return losses


@pytest.mark.pairwise
@pytest.mark.parametrize("style", [by_closure, by_hand, familiar])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_trajectory(name, style, backend):
    rec = Recording(name)
    net = rec.network()
    opt = rec.optimizer(rec.groups(net), backend=backend)
    tol = TOLERANCE[rec.dtype]
    for t, (x, y, lr) in enumerate(rec.batches()):
        for group in opt.param_groups:
            group["lr"] = lr
        losses = style(net, opt, x, y)
        for kind, loss in zip(("loss", "loss_max", "loss_min"), losses, strict=False):
            assert loss.item() == pytest.approx(rec.arrays[f"traj.{kind}"][t].item(), rel=tol)
        for slot, kind in enumerate(["grad_norm", "grad_norm_max", "grad_norm_min"]):
            if f"traj.{kind}" in rec.arrays and not (slot == 0 and rec.meta.get("adaptive")):
                assert opt.norms[slot].item() == pytest.approx(rec.arrays[f"traj.{kind}"][t].item(), rel=tol)
    for n, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), rec.final()[n], rtol=tol, atol=tol * p.abs().mean().item())
    assert opt.skipped_steps == 0


def test_tolerances_see_a_wrong_formula():
    """The released code's update differs from the paper's by far more than the tolerance."""
    rec = Recording("bsam_sgd_cosine_f64")
    rec.meta["update_from"] = "w_min"
    net = rec.network()
    opt = rec.optimizer(rec.groups(net), backend="torch")
    for x, y, lr in rec.batches():
        opt.param_groups[0]["lr"] = lr
        by_hand(net, opt, x, y)
    assert (net.fc.weight - rec.final()["fc.weight"]).abs().max() > 1e-4
