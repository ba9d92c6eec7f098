"""CIFAR-10, from files that are there already: 1,500 images, and a residual network that fits them, wrong labels too.

Image classification as the papers have it, small enough for a CPU: a run of SGD takes half a minute of one core.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bsam_fused.report import models
from bsam_fused.report.training.methods import Base
from bsam_fused.report.training.task import Data, Part, Task, noisy
from bsam_fused.sharpness import extras

VARIABLE = "BSAM_FUSED_CIFAR10"
"""The environment variable that says where CIFAR-10 lies."""
BESIDE = Path(__file__).parents[4] / "shared" / "data" / "cifar10_jpeg.npz"
"""Where it is looked for without: beside the checkout."""
VALIDATION, TEST = 500, 1000
"""How many images are chosen by, and tested on."""


class Images(NamedTuple):
    """CIFAR-10's images of training or of testing, decoded when they are asked for."""

    one: Callable[[int], Any]
    """From a number to an array (32, 32, 3) of uint8."""
    y: Tensor
    """Labels (n,), int64."""

    def part(self, which: Tensor) -> Part:
        """Return those of these numbers: x (n, 3, 32, 32) in [0, 1], float32."""
        x = torch.from_numpy(np.stack([self.one(i) for i in which.tolist()]))
        return Part(x.permute(0, 3, 1, 2).contiguous() / 255, self.y[which])


def drawn(seed: int, *, training: int, replaced: float) -> Data:
    """Return images to train on and `VALIDATION` to choose by, of whose labels a share is random; `TEST` fixed ones.

    Args:
        seed: of what is trained on and what is chosen by, no image in both, and of the labels that are replaced.
        training: how many are trained on.
        replaced: the share of labels, in [0, 1].

    Raises:
        Refused: CIFAR-10 is not there.
        ModuleNotFoundError: it is there as JPEG, and Pillow is not.
    """
    path = place()
    found = images(path, "train")
    generator = torch.Generator().manual_seed(seed)
    which = torch.randperm(len(found.y), generator=generator)[: training + VALIDATION]
    x, y = found.part(which)
    y = noisy(y, replaced, generator)
    return Data(Part(x[:training], y[:training]), Part(x[training:], y[training:]), _tested_on(path))


def task(replaced: float) -> Task:
    """Return the task of 1,500 images. SGD ends with every one named as it is labelled, whatever the label.

    Args:
        replaced: the share of labels that are random, in [0, 1].
    """
    base = Base(torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "weight_decay": 5e-4})
    return Task(partial(drawn, training=1500, replaced=replaced), _network, base, epochs=24, batch_size=50)


def _network() -> nn.Sequential:
    """Return a ResNet of two blocks, 64 and 128 wide, over 8 x 8 and 4 x 4 places: the mean of 2 x 2 pixels is seen."""
    stem = [nn.AvgPool2d(2), models.convolution(3, 64, 3, 2), nn.BatchNorm2d(64), nn.ReLU()]
    return models.resnet(stem, [1, 1], expansion=1, classes=10)


@cache
def _tested_on(path: Path) -> Part:
    """Return the images that are tested on, drawn once for all, with their true labels."""
    found = images(path, "test")
    return found.part(torch.randperm(len(found.y), generator=torch.Generator().manual_seed(0))[:TEST])


# ---- files


def place() -> Path:
    """Return where CIFAR-10 is looked for."""
    return Path(os.environ.get(VARIABLE) or BESIDE)


@cache
def images(path: Path, part: Literal["train", "test"]) -> Images:
    """Return a part of CIFAR-10 from a file of JPEGs, or from the folder of pickles that torchvision unpacks.

    Raises:
        Refused: it is not there.
        ModuleNotFoundError: it is there as JPEG, and Pillow is not.
    """
    if path.is_dir():
        return _pickled([path / f"data_batch_{i}" for i in range(1, 6)] if part == "train" else [path / "test_batch"])
    if path.is_file():
        return _jpegs(path, part)
    raise models.Refused(
        f"CIFAR-10 is not at {path}: set {VARIABLE} to cifar10_jpeg.npz, or to torchvision's folder cifar-10-batches-py"
    )


def _pickled(files: list[Path]) -> Images:
    batches = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
    channels_first = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    y = torch.tensor([label for batch in batches for label in batch[b"labels"]])
    return Images(channels_first.transpose(0, 2, 3, 1).__getitem__, y)


def _jpegs(path: Path, part: Literal["train", "test"]) -> Images:
    pillow = extras.load("PIL.Image", "evidence")
    with np.load(path) as archive:
        data, lengths, y = (archive[f"{part}_{what}"] for what in ("bytes", "lengths", "labels"))
    ends = lengths.cumsum(dtype=np.int64)

    def one(i: int) -> Any:
        return np.asarray(pillow.open(io.BytesIO(data[ends[i] - lengths[i] : ends[i]])).convert("RGB"))

    return Images(one, torch.from_numpy(y).long())
