"""What is stepped after the optimizer, as torch's learning-rate schedulers are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch


class Stepped(ABC):
    """What belongs to an optimizer and counts its steps; all but the optimizer is in the state dict."""

    _unsaved: ClassVar[frozenset[str]] = frozenset({"optimizer"})

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(optimizer, "active"):
            raise TypeError(
                f"{type(self).__name__} of {type(optimizer).__name__}: pass a sharpness-aware optimizer, such as SAM"
            )
        if hasattr(getattr(optimizer, "optimizer", None), "active"):
            raise TypeError(
                f"{type(self).__name__} of {type(optimizer).__name__}, a wrapper that keeps attributes to itself: pass "
                "the optimizer in it, its .optimizer"
            )
        self.optimizer: Any = optimizer
        self.last_step = 0

    @abstractmethod
    def _apply(self, t: int) -> None:
        """Set up the optimizer's step after the first ``t``."""

    def step(self) -> None:
        """Count a step of the optimizer, and set up its next one."""
        self._apply(self.last_step + 1)
        self.last_step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer, and functions."""
        return {name: value for name, value in self.__dict__.items() if name not in self._unsaved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, and set the optimizer up as it was then."""
        self.__dict__.update(state_dict)
        self._apply(self.last_step)
