"""What the losses of one step say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sharpness:
    """The losses of one closure step, and what they say. Tensors stay on their device until read.

    MaxS = L(w_max) − L(w), MinS = L(w) − L(w_min), BilS = MaxS + MinS (BSAM, arXiv 2409.13173). The ones that
    need w_min are None for optimizers that do not go there.

    Each pass's loss is of that pass: where dropout or augmentation draw anew, MaxS and MinS are differences of losses
    under other masks, mostly noise at a small ρ; ``same_randomness=True`` has all passes draw the same.
    """

    loss: Any
    loss_max: Any
    loss_min: Any = None

    @property
    def max_sharpness(self) -> Any:
        """MaxS = L(w_max) − L(w)."""
        return self.loss_max - self.loss

    @property
    def min_sharpness(self) -> Any:
        """MinS = L(w) − L(w_min)."""
        return None if self.loss_min is None else self.loss - self.loss_min

    @property
    def bilateral_sharpness(self) -> Any:
        """BilS = MaxS + MinS."""
        return None if self.loss_min is None else self.max_sharpness + self.min_sharpness
