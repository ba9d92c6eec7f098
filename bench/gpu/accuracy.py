"""ResNet-18 on all of CIFAR-10: accuracy and time of captured steps under bfloat16 autocast, added to a run's record.

python -m bench.gpu.accuracy --record FILE.json [--seconds N] [--epochs N]

A seed of every training, then the next one as far as the time goes, so that what is there is paired. No radius is tuned
here: each has the one that the SAM paper (arXiv 2010.01412) has for CIFAR-10.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from bench.deadline import Deadline
from bench.gpu.device import current
from bench.gpu.record import Record
from bench.gpu.stages import NOT_FOUND
from bsam_fused.graphs import GraphedStep
from bsam_fused.report.models import BUILT_IN, Refused
from bsam_fused.report.training import after, cifar
from bsam_fused.report.training.methods import METHODS, Base, Method
from bsam_fused.report.training.task import Part
from bsam_fused.schedules import LatePhase

BASE = Base(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4})
RHO = 0.05
BATCH = 256
EPOCHS = 6
SHIFT = 4
"""Pixels by which a training image is moved at the most, in both directions; every other one is mirrored."""
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of CIFAR-10's channels, in [0, 1]."""
SGD = Method(METHODS["SAM"].build, 1, partial(LatePhase, start=1.0))
"""The same captured step, of which none perturbs: the base optimizer's own."""


class Training(NamedTuple):
    """A method, and how many times `EPOCHS` it has."""

    method: Method
    times: int = 1


TRAININGS = {
    "SGD": Training(SGD),
    **{name: Training(METHODS[name]) for name in ("SAM", "BSAM", "BSAM extrapolated", "BSAM, last 25 %")},
    "SGD, three times as long": Training(SGD, 3),
}


class Images(NamedTuple):
    """Images on the device."""

    x: Tensor
    """uint8 (n, 3, 32, 32), those to train on with zeros around: (n, 3, 40, 40)."""
    y: Tensor
    """Labels (n,), int64."""

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches, moved and mirrored at random; what does not fill one is left out."""
        generator = torch.Generator(self.y.device).manual_seed(seed)
        draw = partial(torch.randint, generator=generator, device=self.y.device)
        order = torch.randperm(len(self.y), generator=generator, device=self.y.device)
        pixels = torch.arange(32, device=self.y.device)
        for which in order[: len(order) // BATCH * BATCH].split(BATCH):
            down, right, mirrored = (draw(high, (BATCH, 1)) for high in (2 * SHIFT + 1, 2 * SHIFT + 1, 2))
            rows = down + pixels
            columns = right + torch.where(mirrored == 1, 31 - pixels, pixels)
            channels = torch.arange(3, device=self.y.device)[None, :, None, None]
            moved = self.x[which[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
            yield normalized(moved), self.y[which]


def normalized(x: Tensor) -> Tensor:
    """Return uint8 images (n, 3, 32, 32) as float32 of mean 0 and deviation 1, channels last."""
    mean, deviation = (x.new_tensor(it, dtype=torch.float32)[:, None, None] for it in (MEAN, DEVIATION))
    return ((x / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


class Autocast(nn.Module):
    """A network that computes in bfloat16, of weights in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, float32."""
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            logits: Tensor = self.network(x)
        return logits.float()


@dataclass(frozen=True)
class Row:
    """What a training gave."""

    training: str
    seed: int
    epochs: int
    accuracy_percent: float
    """Of the test images."""
    training_loss: float
    """At w, the mean of the last epoch."""
    passes: float
    """Over the training data, forward and backward."""
    seconds: float
    """Of all epochs; without the first capture, and without testing."""


def train(name: str, seed: int, epochs: int, training: Images, testing: Part) -> Row:
    """Train a network, and test it."""
    (method, times), device = TRAININGS[name], training.y.device
    torch.manual_seed(seed)
    network = Autocast(BUILT_IN[current().network("resnet18", BATCH)[0]].build().to(device))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = method.build(network, BASE, RHO)
    steps = times * epochs * (len(training.y) // BATCH)
    stepped: list[Any] = [CosineAnnealingLR(optimizer, steps)]
    stepped += [method.policy(optimizer, steps)] if method.policy else []
    step = GraphedStep(network, functional.cross_entropy, optimizer, next(training.batches(seed)))
    print(f"captured {name}, seed {seed}", flush=True)  # so that one who is stopped has said how far it came
    begin = time.perf_counter()
    for epoch in range(times * epochs):
        losses = []
        for batch in training.batches(1000 * seed + epoch):
            losses.append(step(*batch))
            for each in stepped:
                each.step()
    loss = float(torch.stack(losses).mean())  # waits for the device
    seconds = time.perf_counter() - begin
    accuracy = after.accuracy_percent(network, testing)
    return Row(name, seed, times * epochs, accuracy, loss, method.passes * times * epochs, seconds)


def images(device: torch.device) -> tuple[Images, Part]:
    """Return what is trained on and what is tested on, on the device.

    Raises:
        Refused: CIFAR-10 is not there.
    """
    (x, y), (test_x, test_y) = (_decoded(cifar.images(cifar.place(), part)) for part in ("train", "test"))
    padded = functional.pad(x.to(device), (SHIFT,) * 4)
    return Images(padded, y.to(device)), Part(normalized(test_x.to(device)), test_y.to(device))


def _decoded(found: cifar.Images) -> tuple[Tensor, Tensor]:
    """Return uint8 (n, 3, 32, 32) and labels; threads wait for each other, and take twice as long on two cores."""
    decoded = np.stack([*map(found.one, range(len(found.y)))])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous(), found.y


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 127 where there is no CIFAR-10."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    parser.add_argument(
        "--seconds",
        type=float,
        default=150,
        help="begin none that would end later, as the last one went; default: %(default)s",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    record, deadline = Record(options.record), Deadline(options.seconds)
    try:
        training, testing = images(torch.device(current().worker[0]))
    except Refused as refused:
        print(refused)
        return NOT_FOUND
    print(f"images decoded, {deadline.left:.0f} s left", flush=True)
    seconds_a_pass = 0.0
    for seed in itertools.count():
        for name, (method, times) in TRAININGS.items():
            if deadline.left < method.passes * times * options.epochs * seconds_a_pass:
                return 0
            row = train(name, seed, options.epochs, training, testing)
            seconds_a_pass = row.seconds / row.passes
            record.content["accuracy"][f"{name}, seed {seed}"] = asdict(row)
            record.save()
            gave = f"{row.accuracy_percent:.2f} %, {row.passes:.0f} epochs of passes, {row.seconds:.1f} s"
            print(f"{name}, seed {seed}: {gave}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
