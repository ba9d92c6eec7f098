"""How the loss changes within ρ of the weights, along the gradient: MaxS, MinS, BilS, and where gradients conflict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from bsam_fused import checks
from bsam_fused.optim.sharpness import Sharpness
from bsam_fused.sharpness.mean_loss import LossFunction, dot, measured

EPS = 1e-12
"""Added to ‖g‖, as the optimizers' norm_eps."""


def measure(
    model: nn.Module, loss_fn: LossFunction, loader: Iterable[Any], rho: float = 0.05, rho_min: float | None = None
) -> Sharpness:
    """Return the losses at w, w_max = w + ρ g/‖g‖ and w_min = w − ρ_min g/‖g‖, and what they say; g = ∇L(w).

    MaxS = L(w_max) − L(w), MinS = L(w) − L(w_min), BilS = MaxS + MinS (BSAM, arXiv 2409.13173), L the mean over the
    whole loader in evaluation mode. Three passes over it. The model is left as it was, bit for bit.

    Args:
        model: whose trainable parameters are w.
        loss_fn: from the model's output and y to the mean loss of the batch, such as F.cross_entropy.
        loader: iterable of batches (x, y), as often as asked; x and y are moved to the model's device.
        rho: ρ ≥ 0.
        rho_min: ρ_min ≥ 0; None: ρ.

    Returns:
        `Sharpness` of floats.

    Raises:
        ValueError: a radius that is negative or not finite, or a loader that is empty.
        TypeError: a loader that is an iterator.
        FloatingPointError: a loss or gradient that is not finite.
    """
    checks.non_negative("rho", rho)
    checks.non_negative("rho_min", rho_min if rho_min is not None else rho)
    with measured(model, loss_fn, loader) as loss:
        at_w, g = loss.gradient()
        norm = math.sqrt(dot(g, g)) + EPS
        loss.place((rho / norm, g))
        at_max = loss.value("w_max")
        loss.place((-(rho if rho_min is None else rho_min) / norm, g))
        return Sharpness(at_w, at_max, loss.value("w_min"))


def gradient_conflict(
    model: nn.Module, loss_fn: LossFunction, loader: Iterable[Any], rho_mins: Sequence[float]
) -> list[float]:
    """Return cos(g, g_min) for each ρ_min: g = ∇L(w), g_min = ∇L(w_min), w_min = w − ρ_min g/‖g‖.

    1 where the loss falls at w_min as it does at w; below 0 the two gradients conflict: w_min lies beyond the bottom of
    the valley (BSAM, arXiv 2409.13173, whose ρ_min therefore decays). A pass for g and one for each ρ_min. The model is
    left as it was, bit for bit.

    Args:
        model: as `measure` has it.
        loss_fn: as `measure` has it.
        loader: as `measure` has it.
        rho_mins: the radii ρ_min ≥ 0.

    Returns:
        A cosine in [−1, 1] for each.

    Raises:
        ValueError, TypeError, FloatingPointError: as `measure`; FloatingPointError also where a gradient is zero, and
            has no direction.
    """
    for rho_min in rho_mins:
        checks.non_negative("rho_mins", rho_min)
    cosines = []
    with measured(model, loss_fn, loader) as loss:
        _, g = loss.gradient()
        norm = math.sqrt(dot(g, g))
        for rho_min in rho_mins:
            loss.place((-rho_min / (norm + EPS), g))
            _, g_min = loss.gradient("w_min")
            norms = norm * math.sqrt(dot(g_min, g_min))
            if norms == 0:
                raise FloatingPointError(f"a gradient is zero, at w or at w_min with ρ_min = {rho_min}")
            cosines.append(dot(g, g_min) / norms)
    return cosines
