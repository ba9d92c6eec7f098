"""What the examples share: a small network on scikit-learn's digits, its training, and where a picture is saved."""

import argparse
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from bsam_fused import BSAM, SAM
from bsam_fused.report.learning import network
from bsam_fused.report.training.tasks import digits

DATA = digits(torch.float32)
BATCH = 64
STEPS = len(DATA.y) // BATCH
"""Steps an epoch; the incomplete batch is left out."""
EPOCHS = 30
LOADER = [(DATA.x, DATA.y)]
"""All training images, to measure on."""
QUARTER = [(DATA.x[::4], DATA.y[::4])]
"""Every fourth, for what takes hundreds of passes."""
LOSS = nn.CrossEntropyLoss(label_smoothing=0.1)
"""Smoothed as in the BSAM authors' code; without, curvature dies away with the loss, whatever the optimizer."""
BASE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
RHO = 0.1
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), **BASE),
    "SAM": lambda net: SAM(net.parameters(), rho=RHO, **BASE),
    "BSAM": lambda net: BSAM(net.parameters(), rho=RHO, **BASE),
}
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]

torch.set_num_threads(1)  # the network is small: threads would wait for each other


def train(
    net: nn.Module, optimizer: Any, epochs: int, *schedules: Any, attack: Attack | None = None, seed: int = 0
) -> Iterator[int]:
    """Train, and yield after each step how many there have been.

    Args:
        net: the network.
        optimizer: SGD, or any of this package's.
        epochs: how long.
        *schedules: stepped after each step.
        attack: makes the images to train on from the network, images and labels.
        seed: of the order of the images.
    """
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for i, batch in enumerate(torch.randperm(len(DATA.y), generator=shuffle).split(BATCH)[:STEPS]):
            x, y = DATA.x[batch], DATA.y[batch]
            if attack:
                x = attack(net, x, y)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = LOSS(net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            for schedule in schedules:
                schedule.step()
            yield epoch * STEPS + i + 1


def trained(name: str, epochs: int = EPOCHS, seed: int = 0) -> nn.Module:
    """Return a network trained by one of `OPTIMIZERS`, the learning rate falling to 0 by a cosine."""
    net = network(seed)
    optimizer = OPTIMIZERS[name](net)
    for _ in train(net, optimizer, epochs, CosineAnnealingLR(optimizer, epochs * STEPS), seed=seed):
        pass
    return net


@torch.no_grad()
def error(net: nn.Module, x: Tensor = DATA.x_test) -> float:
    """Return the share of test images named wrongly, in percent."""
    return 100 * (net(x).argmax(1) != DATA.y_test).double().mean().item()


def panels(columns: int, width: float = 4.0) -> tuple[Figure, Any]:
    """Return a figure, and its axes in a row."""
    figure = Figure(figsize=(width * columns, 3.4), layout="constrained")
    return figure, figure.subplots(1, columns)


def picture(script: str, about: str) -> Path:
    """Return where a script's picture goes, by --out; ends where it would replace a file that git tracks.

    Args:
        script: its file; the picture has its name.
        about: its docstring, shown by --help.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="for the picture (default: here)")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(script).with_suffix(".png").name
    if _tracked(path):
        parser.error(f"{path} is tracked by git: choose another folder by --out")
    return path


def _tracked(path: Path) -> bool:
    command = ["git", "ls-files", "--error-unmatch", path.name]
    try:
        return subprocess.run(command, cwd=path.parent, capture_output=True).returncode == 0
    except FileNotFoundError:  # no git
        return False


def save(figure: Figure, path: Path) -> None:
    """Write a picture."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"Written: {path}")
