"""torch.amp.GradScaler: what it leaves on an optimizer, and how an overflow in an earlier pass reaches it.

``GradScaler.step(optimizer)`` reads ``optimizer._step_supports_amp_scaling``, looks for inf and NaN in the gradients
that there are, sets ``grad_scale`` and ``found_inf`` and calls ``optimizer.step()``. Those gradients are the last
pass's: that an earlier pass overflowed is told by making one of their elements NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from bsam_fused import distributed


class Scaled(NamedTuple):
    """What GradScaler says of this step's gradients."""

    scale: Tensor | None
    """What the loss was multiplied by; None: the last gradients are unscaled."""
    found_inf: Tensor | float | None
    """More than 0 if the last gradients are not finite; None: there is no scaler."""


def told(optimizer: Any) -> Scaled:
    """Return what GradScaler left on ``optimizer``; where the step raises, `forget` it."""
    return Scaled(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))


def forget(optimizer: Any) -> None:
    """Take away what GradScaler left, as it does only after a step that went well.

    It would multiply the next scale by this one.
    """
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)


def refuse_closure(scaled: Scaled) -> None:
    """Raise RuntimeError for a closure where there is a scaler."""
    if scaled.found_inf is not None:
        raise RuntimeError(
            "GradScaler.step() with a closure: the scaler can neither scale its losses nor see its gradients. Call the "
            "phases by hand: scaler.scale(loss).backward() before each, and scaler.step(optimizer) as the last"
        )


def refuse_unscaled(scaled: Scaled, name: str) -> None:
    """Raise RuntimeError where the last gradients are unscaled, for a direction that mixes those of all passes."""
    if scaled.found_inf is not None and scaled.scale is None:
        raise RuntimeError(
            f"{name} after GradScaler.unscale_(): it unscaled the gradients of the last pass only, but the "
            "direction mixes those of all passes. Leave out unscale_(), and clip with max_grad_norm=; restore() gives "
            "up this step"
        )


def mark(params: Iterable[Tensor], bad: Tensor) -> None:
    """Make an element of the smallest gradient NaN where ``bad`` (bool, 0-dim), without asking the device.

    In a tensor of its own: the memory may be somebody else's.
    """
    given = [p for p in params if p.grad is not None and distributed.local(p.grad).numel()]
    if given:
        param = min(given, key=Tensor.numel)
        param.grad = param.grad.detach().clone()  # type: ignore[union-attr]
        grad = distributed.local(param.grad)
        grad[(0,) * grad.dim()].masked_fill_(bad.to(grad.device), math.nan)
