"""Pictures of what was measured, with matplotlib: each draws on given axes, or on a new figure's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bsam_fused.optim.sharpness import Sharpness
from bsam_fused.sharpness.extras import load
from bsam_fused.sharpness.radius import Suggestion

Series = Mapping[str, Any]
"""What to draw, a line each, by the name that the legend gives it."""
PANELS = {"MaxS": "max_sharpness", "MinS": "min_sharpness", "BilS": "bilateral_sharpness"}


def plot_spectrum(spectra: Series, axes: Any = None) -> Any:
    """Plot the largest eigenvalues against their rank, the axis logarithmic where all are positive.

    Args:
        spectra: by name, what `hessian_eigenvalues` returned.
        axes: matplotlib axes; None: a new figure's.

    Returns:
        The axes; ``axes.figure.savefig(path)`` writes the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed, with the command that installs it.
    """
    axes = _new_axes() if axes is None else axes
    for name, eigenvalues in spectra.items():
        axes.plot(range(1, len(eigenvalues) + 1), eigenvalues, marker=".", label=name)
    positive = all((eigenvalues > 0).all() for eigenvalues in spectra.values())
    axes.set(xlabel="rank", ylabel="eigenvalue of the Hessian", yscale="log" if positive else "linear")
    return _finished(axes)


def plot_loss_along(steps: Sequence[float], losses: Series, axes: Any = None) -> Any:
    """Plot the loss along a direction.

    Args:
        steps: the multiples that `loss_along` had.
        losses: by name, what it returned.
        axes: as `plot_spectrum` has it.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: as `plot_spectrum` has it.
    """
    axes = _new_axes() if axes is None else axes
    for name, values in losses.items():
        axes.plot(steps, values, label=name)
    axes.set(xlabel="a", ylabel="L(w + a d)")
    return _finished(axes)


def plot_landscape(
    steps: tuple[Sequence[float], Sequence[float]], losses: Tensor, axes: Any = None, levels: int | Sequence[float] = 20
) -> Any:
    """Plot the loss on a plane, by contours; the weights themselves are marked.

    Args:
        steps: the multiples that `loss_on_plane` had.
        losses: what it returned.
        axes: as `plot_spectrum` has it.
        levels: about how many contours, or the losses that they are at, rising.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: as `plot_spectrum` has it.
    """
    axes = _new_axes() if axes is None else axes
    filled = axes.contourf(*steps, losses, levels=levels)
    axes.figure.colorbar(filled, ax=axes, label="L(w + a d₁ + b d₂)")
    axes.plot(0, 0, "+", color="white")
    axes.set(xlabel="a", ylabel="b")
    return axes


def plot_conflict(x: Sequence[float], cosines: Series, axes: Any = None, xlabel: str = "ρ_min") -> Any:
    """Plot the gradient conflict against ρ_min, or over training.

    Args:
        x: the radii, or steps or epochs.
        cosines: by name, what `gradient_conflict` returned for each of them.
        axes: as `plot_spectrum` has it.
        xlabel: what ``x`` is.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: as `plot_spectrum` has it.
    """
    axes = _new_axes() if axes is None else axes
    for name, values in cosines.items():
        axes.plot(x, values, marker=".", label=name)
    axes.axhline(0, color="gray", linewidth=0.8)  # below, the gradients conflict
    axes.set(xlabel=xlabel, ylabel="cos(g, g_min)")
    return _finished(axes)


def plot_sharpness(x: Sequence[float], measured: Mapping[str, Sequence[Sharpness]], axes: Any = None) -> Any:
    """Plot MaxS, MinS and BilS over training, a panel each.

    Args:
        x: steps or epochs.
        measured: by name, what `measure` returned at each of them.
        axes: three matplotlib axes; None: a new figure's.

    Returns:
        The three axes.

    Raises:
        ModuleNotFoundError: as `plot_spectrum` has it.
    """
    axes = _new_axes(len(PANELS)) if axes is None else axes
    for panel, (title, sharpness) in zip(axes, PANELS.items(), strict=True):
        for name, measurements in measured.items():
            panel.plot(x, [getattr(each, sharpness) for each in measurements], marker=".", label=name)
        panel.set(title=title, xlabel="epoch")
        _finished(panel)
    return axes


def plot_rises(suggestion: Suggestion, axes: Any = None) -> Any:
    """Plot how far the loss rises against ρ, both logarithmic; the criterion and the suggested ρ are marked.

    Args:
        suggestion: what `suggest_radius` returned. Rises that are not positive or not finite are left out.
        axes: as `plot_spectrum` has it.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: as `plot_spectrum` has it.
    """
    axes = _new_axes() if axes is None else axes
    axes.axhline(suggestion.sought, color="gray", linestyle="--", label=f"{100 * suggestion.share:.3g} % of L(w)")
    axes.axvline(suggestion.rho, color="gray", linestyle=":", label=f"ρ = {suggestion.rho:.2g}")
    axes.plot(suggestion.radii, suggestion.rises, marker=".", label="rise")
    axes.set(xlabel="ρ", ylabel="L(w + ρ g/‖g‖) − L(w)")
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="mask")
    return _finished(axes)


def _new_axes(columns: int = 1) -> Any:
    figure = load("matplotlib.figure").Figure(figsize=(1 + 4 * columns, 3.5), layout="constrained")
    return figure.subplots(1, columns)


def _finished(axes: Any) -> Any:
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return axes
