"""Sharpness-aware optimizers whose own work runs in a handful of fused kernels."""

from bsam_fused import batchnorm, graphs, losses, schedules, sharpness
from bsam_fused._version import __version__
from bsam_fused.optim.base import SharpnessAware
from bsam_fused.optim.bsam import BSAM
from bsam_fused.optim.sam import ASAM, SAM
from bsam_fused.optim.sharpness import Sharpness

__all__ = [
    "ASAM",
    "BSAM",
    "SAM",
    "Sharpness",
    "SharpnessAware",
    "__version__",
    "batchnorm",
    "graphs",
    "losses",
    "schedules",
    "sharpness",
]
