"""Choosing the radius ρ: how far the ascent of a SAM step raises the loss of its batch, and what ρ that speaks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from bsam_fused import checks
from bsam_fused.sharpness.mean_loss import LossFunction, dot, measured
from bsam_fused.sharpness.neighbourhood import EPS

LADDER = tuple(0.005 * 10 ** (i / 4) for i in range(13))
"""Radii that are tried: 0.005 to 5, four a decade."""
SHARE = 0.04
"""Of L(w), of a network before it is trained: the rise that the suggested radius brings (docs/results.md)."""


class Suggestion(NamedTuple):
    """A radius, and what it was read off."""

    rho: float
    end: Literal["smallest", "largest"] | None
    """Which end of the ladder ``rho`` is, as the criterion is not met on it; None: it lies within."""
    radii: tuple[float, ...]
    """The ladder."""
    rises: tuple[float, ...]
    """For each of them, how far the loss rises; inf where it is then not finite."""
    loss: float
    """L(w)."""
    share: float
    """The criterion: the rise sought, as a share of L(w)."""

    @property
    def sought(self) -> float:
        """The rise that the criterion asks for."""
        return self.share * self.loss


def loss_rises(
    model: nn.Module, loss_fn: LossFunction, loader: Iterable[Any], radii: Sequence[float] = LADDER
) -> tuple[float, list[float]]:
    """Return L(w), and for each ρ how far the ascent of a SAM step raises the loss of its own batch.

    The means over the loader's batches B, each counting alike as each makes a step, of L_B(w) and of
    L_B(w + ρ g_B/‖g_B‖) − L_B(w); L_B is the batch's loss in evaluation mode, g_B = ∇L_B(w) (SAM eq. 2,
    arXiv 2010.01412). A pass over the loader for the gradients, and one for each radius. All passes of a batch see the
    same random numbers. The model is left as it was, bit for bit.

    Args:
        model: whose trainable parameters are w.
        loss_fn: from the model's output and y to the mean loss of the batch, such as F.cross_entropy.
        loader: iterable of batches (x, y), gone over once; x and y are moved to the model's device.
        radii: ρ > 0, rising, in units of ‖w‖.

    Returns:
        The loss, and a rise for each radius: inf where the loss is then not finite.

    Raises:
        ValueError: radii that are none, not positive, or do not rise; a loader that is empty; a loss that is no scalar.
        FloatingPointError: a loss or gradient at w that is not finite.
    """
    radii = _ladder(radii)
    with torch.random.fork_rng(devices=[]):
        found = [_of_a_batch(model, loss_fn, batch, radii) for batch in loader]
    if not found:
        raise ValueError("the loader is empty")
    losses, rises = zip(*found, strict=True)
    return fmean(losses), [fmean(of_a_radius) for of_a_radius in zip(*rises, strict=True)]


def radius_at(radii: Sequence[float], rises: Sequence[float], loss: float, share: float = SHARE) -> Suggestion:
    """Return the radius up to which the loss rises by no more than a share of itself.

    Between the last radius of the ladder before the rise exceeds ``share`` · L(w) for the first time and the next, it
    is read off the straight line of log rise over log ρ, on which rises that go as a power of ρ lie. A rise that is not
    positive has no logarithm: the radius is then the smaller one.

    Args:
        radii: ρ > 0, rising.
        rises: for each of them, the rise that `loss_rises` has measured.
        loss: L(w) > 0.
        share: the rise sought over L(w), > 0.

    Returns:
        `Suggestion`. Where the smallest radius exceeds the rise sought, or the largest does not, ``rho`` is that one,
        and ``end`` says so.

    Raises:
        ValueError: radii as `loss_rises` has it, not as many rises, or a loss or share that is not positive.
    """
    radii, rises = _ladder(radii), tuple(rises)
    if len(rises) != len(radii):
        raise ValueError(f"{len(rises)} rises of {len(radii)} radii: pass one for each")
    sought = checks.positive("share", share) * checks.positive("loss", loss, ", for a rise to be a share of it")
    over = next((i for i, rise in enumerate(rises) if rise > sought), len(radii))
    if over == 0:
        return Suggestion(radii[0], "smallest", radii, rises, loss, share)
    if over == len(radii):
        return Suggestion(radii[-1], "largest", radii, rises, loss, share)
    (smaller, larger), (low, high) = radii[over - 1 : over + 1], rises[over - 1 : over + 1]
    on_the_way = math.log(sought / low) / math.log(high / low) if low > 0 else 0.0
    return Suggestion(smaller * (larger / smaller) ** on_the_way, None, radii, rises, loss, share)


def suggest_radius(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Iterable[Any],
    *,
    radii: Sequence[float] = LADDER,
    share: float = SHARE,
) -> Suggestion:
    """Return the radius whose ascent raises the loss of a batch by a share of itself: `radius_at` of `loss_rises`.

    A place to begin a search at, no more: on six of eight tasks it was within a factor of four of the radius that was
    tuned, on a transformer sixteen times as large, in fine-tuning a fiftieth (docs/results.md). The model is left as it
    was, bit for bit.

    Args:
        model: as `loss_rises` has it, before it is trained: ``share`` was fitted there, and holds for no trained one.
        loss_fn: as `loss_rises` has it.
        loader: as `loss_rises` has it, its batches as large as in training: a smaller one's loss rises faster.
        radii: as `loss_rises` has it.
        share: as `radius_at` has it.

    Returns:
        As `radius_at`.

    Raises:
        ValueError, FloatingPointError: as `loss_rises` and `radius_at`.
    """
    loss, rises = loss_rises(model, loss_fn, loader, radii)
    return radius_at(radii, rises, loss, share)


def _ladder(radii: Sequence[float]) -> tuple[float, ...]:
    """Return them, checked."""
    ladder = tuple(checks.positive("radii", rho) for rho in radii)
    if not ladder:
        raise ValueError("radii=(): pass at least one, such as (0.05,)")
    if any(larger <= smaller for smaller, larger in pairwise(ladder)):
        raise ValueError(f"radii={ladder}: must rise")
    return ladder


def _of_a_batch(
    model: nn.Module, loss_fn: LossFunction, batch: Any, radii: Sequence[float]
) -> tuple[float, list[float]]:
    with measured(model, loss_fn, [batch]) as loss:
        at_w, g = loss.gradient()
        norm = math.sqrt(dot(g, g)) + EPS
        losses = []
        for rho in radii:
            loss.place((rho / norm, g))
            try:
                losses.append(loss.value(f"w + {rho:g} g/‖g‖"))
            except FloatingPointError:  # far out it may overflow: more than any rise sought
                losses.append(math.inf)
    return at_w, [at_rho - at_w for at_rho in losses]
