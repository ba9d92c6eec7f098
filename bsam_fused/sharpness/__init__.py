"""Measuring flatness: MaxS, MinS, BilS, gradient conflict, the Hessian, landscapes, what radius suits; and pictures.

Everything is of L, the mean loss over a data loader with the model in evaluation mode, and leaves the model bit for
bit as it was. SciPy (spectrum) and matplotlib (pictures) come with ``pip install 'bsam_fused[sharpness]'``.
"""

from bsam_fused.optim.sharpness import Sharpness
from bsam_fused.sharpness.hessian import TraceEstimate, hessian_eigenvalues, hessian_trace
from bsam_fused.sharpness.landscape import direction_to, loss_along, loss_on_plane, random_direction
from bsam_fused.sharpness.neighbourhood import gradient_conflict, measure
from bsam_fused.sharpness.plots import (
    plot_conflict,
    plot_landscape,
    plot_loss_along,
    plot_rises,
    plot_sharpness,
    plot_spectrum,
)
from bsam_fused.sharpness.radius import Suggestion, loss_rises, radius_at, suggest_radius

__all__ = [
    "Sharpness",
    "Suggestion",
    "TraceEstimate",
    "direction_to",
    "gradient_conflict",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_along",
    "loss_on_plane",
    "loss_rises",
    "measure",
    "plot_conflict",
    "plot_landscape",
    "plot_loss_along",
    "plot_rises",
    "plot_sharpness",
    "plot_spectrum",
    "radius_at",
    "random_direction",
    "suggest_radius",
]
