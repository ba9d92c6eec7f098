"""torch.amp.GradScaler: what it leaves on an optimizer, and how an overflow in an earlier pass reaches it.

``GradScaler.step(optimizer)`` reads ``optimizer._step_supports_amp_scaling``, looks for inf and NaN in the gradients
that there are, sets ``grad_scale`` and ``found_inf`` and calls ``optimizer.step()``. Those gradients are the last
pass's: that an earlier pass overflowed is told by making one of their elements NaN.

``GradScaler.unscale_(optimizer)`` tells the optimizer nothing, but reads its ``param_groups``: the reader is known by
its call. An overflow of an earlier pass is told then, and which pass's gradients were unscaled is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsam_fused import distributed


class Scaled(NamedTuple):
    """What GradScaler says of this step's gradients."""

    scale: Tensor | None
    """What the loss was multiplied by; None: the last gradients are unscaled."""
    found_inf: Tensor | None
    """More than 0 if the last gradients are not finite; None: there is no scaler."""


def told(optimizer: Any) -> Scaled:
    """Return what GradScaler left on ``optimizer``; where the step raises, `forget` it.

    Raises:
        ValueError: it is not one number.
    """
    return Scaled(*(_number(name, vars(optimizer).get(name)) for name in ("grad_scale", "found_inf")))


def _number(name: str, value: Any) -> Tensor | None:
    """Return a number as a tensor without dimensions: ShardedGradScaler's are of shape (1,), others Python's."""
    if value is None:
        return None
    value = distributed.local(value)
    number = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    if number.numel() != 1:
        raise ValueError(f"{name} is of shape {tuple(number.shape)}: a GradScaler sets one number for all gradients")
    return number.reshape(())


def forget(optimizer: Any) -> None:
    """Take away what GradScaler left, as it does only after a step that went well.

    It would multiply the next scale by this one.
    """
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)


def is_unscaling(reader: FrameType) -> bool:
    """Return whether the call that reads ``param_groups`` is GradScaler's, within ``unscale_``."""
    if reader.f_code.co_name != "_unscale_grads_":
        return False
    caller = reader.f_back
    return caller is not None and caller.f_code.co_name == "unscale_"


def refuse_closure(scaled: Scaled) -> None:
    """Raise RuntimeError for a closure where there is a scaler."""
    if scaled.found_inf is not None:
        raise RuntimeError(
            "GradScaler.step() with a closure: the scaler can neither scale its losses nor see its gradients. Call the "
            "phases by hand: scaler.scale(loss).backward() before each, and scaler.step(optimizer) as the last"
        )


def refuse_unscaled(scaled: Scaled, name: str, *, mixes: bool, too_early: bool) -> None:
    """Raise RuntimeError where the gradients of some passes are unscaled, and the direction needs the others.

    Args:
        scaled: what GradScaler says.
        name: the optimizer's class.
        mixes: whether the direction mixes the gradients of all passes; else it is the last one.
        too_early: whether those of an earlier pass than the last were unscaled.
    """
    if scaled.found_inf is None or scaled.scale is not None:
        return
    if mixes:
        raise RuntimeError(
            f"{name} after GradScaler.unscale_(): it unscaled the gradients of the last pass only, but the "
            "direction mixes those of all passes. Leave out unscale_(), and clip with max_grad_norm=; restore() gives "
            "up this step"
        )
    if too_early:
        raise RuntimeError(
            f"GradScaler.unscale_() before the last backward of {name}'s step: the gradients that make the update came "
            "later, and are still scaled. Call it right before scaler.step(), or leave it out, and clip with "
            "max_grad_norm=; restore() gives up this step"
        )


def refuse_scaled(what: str, why: str) -> None:
    """Raise RuntimeError for ``what`` goes by the lengths of gradients before it is told what they were scaled by."""
    raise RuntimeError(
        f"{what} with GradScaler: {why}, which are scaled, by what is told in the last pass only. Train in bfloat16, "
        f"or without {what}; restore() gives up this step"
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
