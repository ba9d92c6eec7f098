"""torch.amp.GradScaler: what it leaves on an optimizer, and how an overflow in an earlier pass reaches it.

``GradScaler.step(optimizer)`` reads ``optimizer._step_supports_amp_scaling``, looks for inf and NaN in the gradients
that there are, sets ``grad_scale`` and ``found_inf`` and calls ``optimizer.step()``. Those gradients are the last
pass's: that an earlier pass overflowed is told by making one of their elements NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from bsam_fused import distributed


class Scaled(NamedTuple):
    """What GradScaler says of this step's gradients."""

    scale: Tensor | None
    """What the loss was multiplied by; None: the last gradients are unscaled."""
    found_inf: Tensor | float | None
    """More than 0 if the last gradients are not finite; None: there is no scaler."""


@contextmanager
def told(optimizer: Any) -> Iterator[Scaled]:
    """Read what GradScaler left on ``optimizer``; where the step raises, take it away.

    GradScaler itself does that only after a step that went well; it would multiply the next scale by this one.
    """
    try:
        yield Scaled(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))
    except BaseException:
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)
        raise


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
    """Make an element of one gradient NaN where ``bad`` (bool, 0-dim), without asking the device."""
    for param in params:
        grad = distributed.local(param.grad)
        if grad is not None and grad.numel():
            grad.detach()[(0,) * grad.dim()].masked_fill_(bad.to(grad.device), math.nan)
            return
