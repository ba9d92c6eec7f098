"""Sharpness-aware optimizers whose own work runs in a handful of fused kernels."""

from bsam_fused._version import __version__
from bsam_fused.optim.base import Sharpness, SharpnessAware
from bsam_fused.optim.bsam import BSAM
from bsam_fused.optim.sam import ASAM, SAM

__all__ = ["ASAM", "BSAM", "SAM", "Sharpness", "SharpnessAware", "__version__"]
