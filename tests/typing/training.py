"""A user's script, for mypy --strict and pyright (`make types`); nobody runs it. What must be flagged: mistakes.py."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from typing_extensions import assert_type

import bsam_fused
from bsam_fused import ASAM, BSAM, SAM, Sharpness, SharpnessAware, batchnorm, losses, schedules, sharpness
from bsam_fused.graphs import GraphedStep

Batch = tuple[Tensor, Tensor]


def by_closure(model: nn.Module, loader: DataLoader[Batch]) -> float:
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
    total = 0.0
    for x, y in loader:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert_type(loss, Tensor)
        total += loss.item()
    return total


def what_step_returns(optimizer: SharpnessAware, sam: SAM, asam: ASAM, bsam: BSAM) -> None:
    def tensor() -> Tensor:
        return torch.ones(())

    def number() -> float:
        return 1.0

    def pair() -> tuple[int, str]:
        return 1, "one"

    def nothing() -> None: ...

    assert_type(optimizer.step(tensor), Tensor)
    assert_type(sam.step(number), float)
    assert_type(bsam.step(pair), tuple[int, str])
    assert_type(asam.step(nothing, ascent_closure=tensor), Tensor)
    assert_type(sam.step(tensor, ascent_closure=None), Tensor)
    for plain in (optimizer, sam, asam, bsam):
        plain.step()
    maybe: Callable[[], float] | None = number if torch.cuda.is_available() else None
    if maybe is not None:
        assert_type(bsam.step(maybe), float)


def by_hand(model: nn.Module, loader: Iterable[Batch]) -> None:
    optimizer = BSAM(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 5e-4},
            {"params": [p for p in model.parameters() if p.dim() < 2], "rho": 0.1, "adaptive": True},
        ],
        torch.optim.AdamW,
        lr=1e-3,
        rho_min=0.02,
        rho_min_decay="none",
        update_from="w",
        rounding="nearest",
        sync="every",
        backend="torch",
        max_grad_norm=1.0,
        model=model,
    )
    scaler = torch.amp.GradScaler()
    calls: list[Callable[[], float | None]] = [optimizer.ascend, optimizer.descend, lambda: scaler.step(optimizer)]
    for x, y in loader:
        for call in calls:
            with torch.autocast("cpu"), optimizer.no_sync():
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            call()
        scaler.update()
        optimizer.zero_grad()
        with optimizer.unperturbed():
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")
    optimizer.restore()
    optimizer.first_step(zero_grad=True)
    optimizer.second_step(zero_grad=True)
    optimizer.third_step(zero_grad=True)
    skipped: int = optimizer.skipped_steps
    norms: Tensor = optimizer.norms
    backends: dict[str, str] = optimizer.backends
    print(skipped, norms.tolist(), backends, bsam_fused.__version__)


def ways_to_build(model: nn.Module) -> list[SharpnessAware]:
    base = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    return [
        SAM(model.parameters(), base, rho=0.1),
        SAM(model.named_parameters(), lr=0.1, master_weights=True, seed=1, norm_eps=1e-8),
        ASAM([nn.Parameter(torch.ones(1))], torch.optim.RMSprop, eta=0.01),
        BSAM(nn.ParameterList([torch.ones(1)]), backend="auto", sync="last"),
    ]


def scheduled(model: nn.Module, closure: Callable[[], Tensor], ascent_closure: Callable[[], Tensor]) -> None:
    optimizer = SAM(model.parameters(), lr=0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    late = schedules.LatePhase(optimizer, 100, start=0.5, early=False, every=2)
    radius: schedules.RadiusSchedule = schedules.SequentialRadius(
        [schedules.ConstantRadius(optimizer, radius="rho"), schedules.CosineRadius(optimizer, 50, end=[0.01])], [50]
    )
    schedules.LambdaRadius(optimizer, lambda t: 0.9**t, radius="rho")
    schedules.ProportionalRadius(optimizer, end=0.01, lr_end=0.0)
    schedules.ExponentialRadius(optimizer, 0.99)
    for _ in range(100):
        optimizer.step(closure, ascent_closure=ascent_closure)
        cosine.step()
        late.step()
        radius.step()
    saved: dict[str, Any] = late.state_dict()
    radius.load_state_dict(radius.state_dict())
    print(saved, radius.get_last_radius()[0] + 1.0)


def bisam(logits: Tensor, target: Tensor) -> Tensor:
    module = losses.BiSAMLogLoss(mu=1.0, reduction="sum")
    assert_type(losses.bisam_tanh_loss(logits, target, alpha=0.1, reduction="none"), Tensor)
    by_module: Tensor = module(logits, target)
    return losses.bisam_log_loss(logits, target, reduction="mean", ignore_index=-1) + by_module


def graphed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    step = GraphedStep(model, F.cross_entropy, BSAM(model.parameters(), lr=0.1), [x, y])
    loss = step(x, y)
    assert_type(loss, Tensor)
    return loss


def measured(model: nn.Module, loader: DataLoader[Batch]) -> Sharpness:
    with batchnorm.frozen_running_stats(model):
        model(torch.ones(1))
    found = sharpness.measure(model, F.cross_entropy, loader, rho=0.05, rho_min=None)
    eigenvalues = sharpness.hessian_eigenvalues(model, F.cross_entropy, loader, k=2, progress=print)
    trace = sharpness.hessian_trace(model, F.cross_entropy, loader)
    direction = sharpness.random_direction(model, seed=1)
    along = sharpness.loss_along(model, F.cross_entropy, loader, direction, [0.0, 0.1])
    cosines = sharpness.gradient_conflict(model, F.cross_entropy, loader, [0.01, 0.1])
    sharpness.plot_conflict([0.01, 0.1], {"SAM": cosines})
    sharpness.plot_spectrum({"SAM": eigenvalues})
    print(trace.value + trace.standard_error, along[0].item(), found.bilateral_sharpness)
    return found
