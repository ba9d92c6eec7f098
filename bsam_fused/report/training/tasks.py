"""What is trained: data, a network, and the recipe that all optimizers share, by name. Nothing is downloaded."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from bsam_fused.report import models
from bsam_fused.report.training import characters, cifar, transfer
from bsam_fused.report.training.methods import Base
from bsam_fused.report.training.task import Data, Part, Task, noisy


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


def noisy_digits(seed: int, *, replaced: float) -> Data:
    """Return 1,000 digits to train on and 348 to choose by, of whose labels a share is random; 449 to test on.

    Args:
        seed: of what is trained on and what is chosen by, and of the labels that are replaced.
        replaced: the share of them, in [0, 1].
    """
    all_of = digits(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    training, validation = torch.randperm(len(all_of.y), generator=generator).tensor_split([1000])
    y = noisy(all_of.y, replaced, generator)
    return Data(
        Part(all_of.x[training], y[training]),
        Part(all_of.x[validation], y[validation]),
        Part(all_of.x_test, all_of.y_test),
    )


def _digits_task(replaced: float) -> Task:
    base = Base(torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4})
    return Task(partial(noisy_digits, replaced=replaced), models.digits_network, base, epochs=40, batch_size=64)


TASKS = {
    "digits": _digits_task(0.0),
    "digits, 20 % noise": _digits_task(0.2),
    "digits, 40 % noise": _digits_task(0.4),
    "digits, 60 % noise": _digits_task(0.6),
    "CIFAR-10": cifar.task(0.0),
    "CIFAR-10, 40 % noise": cifar.task(0.4),
    "characters": characters.task(),
    "transfer": transfer.task(),
}
