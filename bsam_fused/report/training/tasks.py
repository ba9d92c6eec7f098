"""What is trained: data, a network, and the recipe that all optimizers share, by name. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from bsam_fused.report import models

REPLACED = 0.4
"""Of the training labels of "noisy_digits"."""


class Digits(NamedTuple):
    """Images (n, 1, 8, 8) in [0, 1] and their labels (n,), split for training and testing."""

    x: Tensor
    x_test: Tensor
    y: Tensor
    y_test: Tensor


def digits(dtype: torch.dtype = torch.float64, test_images: int = 449) -> Digits:
    """Return scikit-learn's 1797 handwritten digits, a fixed part of them, alike in every class, for testing."""
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(dtype).unsqueeze(1) / 16
    y = torch.from_numpy(bunch.target).long()
    train, test = train_test_split(torch.arange(len(y)), test_size=test_images, random_state=0, stratify=y)
    return Digits(x[train], x[test], y[train], y[test])


def noisy_digits(seed: int) -> Digits:
    """Return 1,000 digits to train on, 40 % of their labels replaced by random ones, and 797 with their own to test."""
    data = digits(torch.float32, test_images=797)
    generator = torch.Generator().manual_seed(seed)
    replaced = torch.randperm(len(data.y), generator=generator)[: round(REPLACED * len(data.y))]
    y = data.y.index_copy(0, replaced, torch.randint(10, (len(replaced),), generator=generator))
    return data._replace(y=y)


@dataclass(frozen=True)
class Task:
    """Data and a network, each made from a seed, and the recipe: SGD's learning rate falls to 0 by a cosine."""

    data: Callable[[int], Digits]
    network: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float

    @property
    def base(self) -> dict[str, Any]:
        """The options of the base optimizer, torch.optim.SGD."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


TASKS = {
    "noisy_digits": Task(
        noisy_digits, models.digits_network, epochs=40, batch_size=64, lr=0.05, momentum=0.9, weight_decay=5e-4
    ),
}
