"""Sharpness-aware optimizers whose own work runs in a handful of fused kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from bsam_fused._version import __version__

if TYPE_CHECKING:
    from bsam_fused import batchnorm, graphs, losses, schedules, sharpness
    from bsam_fused.optim.base import SharpnessAware
    from bsam_fused.optim.bsam import BSAM
    from bsam_fused.optim.friendly import FriendlySAM
    from bsam_fused.optim.gsam import GSAM
    from bsam_fused.optim.looksam import LookSAM
    from bsam_fused.optim.mixed import MixedSAM, PassSums
    from bsam_fused.optim.sam import ASAM, SAM
    from bsam_fused.optim.sharpness import Sharpness
    from bsam_fused.optim.wsam import WSAM

__all__ = [
    "ASAM",
    "BSAM",
    "GSAM",
    "SAM",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "MixedSAM",
    "PassSums",
    "Sharpness",
    "SharpnessAware",
    "__version__",
    "batchnorm",
    "graphs",
    "losses",
    "schedules",
    "sharpness",
]

_HOMES = {
    "ASAM": "sam",
    "BSAM": "bsam",
    "GSAM": "gsam",
    "SAM": "sam",
    "WSAM": "wsam",
    "FriendlySAM": "friendly",
    "LookSAM": "looksam",
    "MixedSAM": "mixed",
    "PassSums": "mixed",
    "Sharpness": "sharpness",
    "SharpnessAware": "base",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import what is first asked for: torch takes seconds, and neither `--help` nor a build without it needs it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _HOMES:
            found = getattr(importlib.import_module(f"{__name__}.optim.{_HOMES[name]}"), name)
        else:
            found = importlib.import_module(f"{__name__}.{name}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return __all__
