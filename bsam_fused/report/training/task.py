"""What a task is: data from a seed, a network, and the recipe that all optimizers share. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bsam_fused.report.training.methods import BASE, Base


class Part(NamedTuple):
    """Inputs and what is to be said of them: a label each, or one for each of its places."""

    x: Tensor
    y: Tensor


class Data(NamedTuple):
    """What is learned; what a radius may be chosen by, its labels as noisy; and what nothing is chosen by."""

    training: Part
    validation: Part
    test: Part


@dataclass(frozen=True)
class Task:
    """Data and a network, each made from a seed, and the recipe: the learning rate falls to 0 by a cosine."""

    data: Callable[[int], Data]
    network: Callable[[], nn.Module]
    base: Base
    epochs: int
    batch_size: int

    def called(self, method: str) -> str:
        """Return what a method is called in words: the base optimizer alone by its class."""
        return self.base.build.__name__ if method == BASE else method


def noisy(y: Tensor, replaced: float, generator: torch.Generator) -> Tensor:
    """Return labels (n,) of ten classes, a share of them replaced by random ones: a tenth of those happens to be right.

    Args:
        y: the true ones.
        replaced: the share, in [0, 1].
        generator: draws which, and by what.
    """
    which = torch.randperm(len(y), generator=generator)[: round(replaced * len(y))]
    return y.index_copy(0, which, torch.randint(10, (len(which),), generator=generator))
