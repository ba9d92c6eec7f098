"""What happened in a step, as numbers for a logger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from bsam_fused.ops.contract import Radius
from bsam_fused.optim.sharpness import Sharpness

_NORMS = ("norm_g", "norm_g_max", "norm_g_min")
_RADII = ("rho", "rho_min")
_LOSSES = ("loss", "loss_max", "loss_min", "max_sharpness", "min_sharpness", "bilateral_sharpness")


def read(optimizer: Any) -> dict[str, float]:
    """Return what `SharpnessAware.metrics` has; whatever lies on devices comes in one transfer."""
    optimizer._notice()
    flats = optimizer._flats
    norms = flats.squared_norms.sqrt() if flats.slots else ()
    values = {name: norms[slot] for name, slot in zip(_NORMS, flats.slots, strict=False)}
    values.update(_losses(optimizer.sharpness))
    for name, radii in zip(_RADII, optimizer._all_radii(), strict=False):
        in_effect = [_in_effect(radius, values.get("norm_g")) for radius in radii]
        left_out = optimizer._exempt()
        values.update(_by_group(name, (None if out else x for x, out in zip(in_effect, left_out, strict=False))))
    values.update(_by_group("lr", (group.get("lr") for group in optimizer.param_groups)))
    *numbers, steps, skipped = _floats([*values.values(), *flats.counts])
    flats.hear(int(steps), int(skipped))
    return {**dict(zip(values, numbers, strict=True)), "skipped_steps": skipped}


def _losses(sharpness: Sharpness | None) -> dict[str, Any]:
    """Return the losses of a closure step, and what they say; but for losses that are no single number."""
    values = {name: getattr(sharpness, name) for name in _LOSSES} if sharpness else {}
    return {
        name: value
        for name, value in values.items()
        if value is not None and not (isinstance(value, Tensor) and value.numel() != 1)
    }


def _in_effect(radius: Radius, norm: Tensor | None) -> Any:
    """Return a radius as its loss budget has cut it in a step whose ‖T g‖ was ``norm``."""
    length = abs(radius.radius)
    if norm is None or radius.budget == math.inf:
        return length
    return torch.where(length * norm > radius.budget, radius.budget / norm, length)


def _by_group(name: str, values: Iterable[Any]) -> dict[str, Any]:
    """Return a value a param group, each under its index if there are several; none where a group has none."""
    listed = list(values)
    names = [name] if len(listed) == 1 else [f"{name}/{i}" for i in range(len(listed))]
    return {key: value for key, value in zip(names, listed, strict=True) if value is not None}


def _floats(values: Sequence[Any]) -> list[float]:
    """Return numbers, and tensors of one element, as floats; waits for a GPU once, and only where one has some."""
    away = [value for value in values if isinstance(value, Tensor) and not value.is_cpu]
    told = iter(())
    if away:
        home = away[0].device
        wide = torch.float32 if home.type == "mps" else torch.float64
        told = iter(torch.stack([value.detach().to(home, wide).reshape(()) for value in away]).tolist())
    return [next(told) if isinstance(value, Tensor) and not value.is_cpu else _number(value) for value in values]


def _number(value: Any) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)
