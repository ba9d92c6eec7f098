"""`bsam-fused rho --sweep`: short training runs by SAM, a radius each, judged by examples that were held out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bsam_fused import SAM
from bsam_fused.report import ctrl_c
from bsam_fused.report.implementations import BASES
from bsam_fused.report.models import Refused, Workload, mapped
from bsam_fused.report.radius import Network, bsam
from bsam_fused.report.terminal import say

RADII = (None, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""What is tried; None: the base optimizer alone."""
LR = {"sgd": 0.05, "adamw": 1e-3}
MINIBATCH = 32
IGNORED = -100
"""The target that cross-entropy leaves out by default."""


@dataclass(frozen=True)
class Recipe:
    """What all runs do alike; None: `LR` of the base; `MINIBATCH`, or all that train where they are fewer."""

    base: str = "sgd"
    lr: float | None = None
    epochs: int = 10
    minibatch: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The base optimizer's."""
        return BASES[self.base].options | {"lr": self.lr or LR[self.base]}

    def optimizer(self, workload: Workload, rho: float | None) -> Any:
        """Return SAM over the base, or the base alone where there is no radius."""
        kind, params = BASES[self.base].kind, [p for p in workload.model.parameters() if p.requires_grad]
        if rho is None:
            return kind(params, **self.options)
        return SAM(params, kind, rho=rho, model=workload.model, **self.options)


class Parts(NamedTuple):
    """The examples that train, and those that judge."""

    training: Workload
    judging: Workload
    sizes: tuple[int, int]
    """How many they are."""


class Outcome(NamedTuple):
    """What a run gave on the examples that judge."""

    rho: float | None
    loss: float
    accuracy_percent: float | None
    """How many are named rightly, where the targets are classes."""


def suggest(network: Network, recipe: Recipe) -> None:
    """Train, and print what each radius gave and which was best.

    Args:
        network: what to train, and the examples.
        recipe: what all runs do alike.

    Raises:
        Refused: an option that cannot be had, by name, or examples that cannot be split.
    """
    parts = split(network.model, network.workload())
    minibatch = minibatch_of(recipe, parts)
    outcomes = []
    with Progress(console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task("short runs", total=len(RADII))
        for outcome in runs(parts, recipe, minibatch):
            outcomes.append(outcome)
            progress.advance(task)
    console = Console(markup=False, emoji=False)
    training, judging = parts.sizes
    how = f"{recipe.base}, lr {recipe.options['lr']:g}, {recipe.epochs} epochs in minibatches of {minibatch}"
    say(console, [f"{network.model}: {training} examples train, by {how}; {judging} judge."])
    console.print(_table(outcomes, recipe.base))
    say(console, [*in_words(outcomes, recipe.base, judging), *network.warning])


def split(name: str, workload: Workload) -> Parts:
    """Return the first three quarters of the examples, to train, and the last quarter, to judge.

    Args:
        name: of the network, for errors.
        workload: every tensor of its inputs and targets has the examples in its first dimension.

    Raises:
        Refused: there are fewer than four, or a tensor's first dimension is of something else.
    """
    examples = _examples(name, workload)
    if examples < 4:
        raise Refused(f"--sweep: {examples} examples are too few to split; --batch-size must be 4 or more")
    training = examples - examples // 4
    sizes = (training, examples - training)
    return Parts(workload.take(slice(training)), workload.take(slice(training, None)), sizes)


def _examples(name: str, workload: Workload) -> int:
    """Return how many there are, by the first dimension of every tensor."""
    inputs, targets = _first_dimensions(workload.inputs), _first_dimensions(workload.targets)
    if not inputs:
        raise Refused(f"--model {name}: its inputs hold no tensor, whose first dimension --sweep could split")
    for part, found in (("inputs", inputs), ("targets", targets)):
        if set(found) - {inputs[0]}:
            raise Refused(
                f"--model {name}: the first dimensions of its {part} are {found}, that of its first input {inputs[0]}; "
                "--sweep splits by it, so it must be the examples'"
            )
    return inputs[0]


def _first_dimensions(value: Any) -> list[int]:
    tensors: list[Tensor] = []
    mapped(value, tensors.append)
    return [len(tensor) if tensor.dim() else 0 for tensor in tensors]


def minibatch_of(recipe: Recipe, parts: Parts) -> int:
    """Return how many examples a step has.

    Raises:
        Refused: more than there are to train on.
    """
    training, _ = parts.sizes
    if recipe.minibatch and recipe.minibatch > training:
        raise Refused(f"--minibatch {recipe.minibatch}: only {training} examples train, three quarters of all")
    return recipe.minibatch or min(MINIBATCH, training)


def runs(parts: Parts, recipe: Recipe, minibatch: int) -> Iterator[Outcome]:
    """Yield what each of `RADII` gives, all by copies of the network, with the same minibatches.

    An incomplete minibatch is left out. The network itself is not trained.
    """
    for rho in RADII:
        model = copy.deepcopy(parts.training.model)  # a state dict need not hold everything
        training, judging = (part._replace(model=model) for part in (parts.training, parts.judging))
        _train(training, parts.sizes[0], recipe.optimizer(training, rho), recipe.epochs, minibatch)
        yield Outcome(rho, *_judged(judging))


def _train(training: Workload, examples: int, optimizer: Any, epochs: int, minibatch: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(epochs):
            for chosen in torch.randperm(examples).split(minibatch)[: examples // minibatch]:
                ctrl_c.look()
                _step(optimizer, training.take(chosen))
    optimizer.zero_grad()


def _step(optimizer: Any, batch: Workload) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return batch.a_pass()

    optimizer.step(closure)


@torch.no_grad()
def _judged(judging: Workload) -> tuple[float, float | None]:
    """Return the loss, and the accuracy in percent where there is one."""
    judging.model.eval()
    output = judging.model(judging.inputs)
    judging.model.train()
    return judging.loss(output, judging.targets).item(), _accuracy_percent(output, judging.targets)


def _accuracy_percent(output: Any, targets: Any) -> float | None:
    both = isinstance(output, Tensor) and isinstance(targets, Tensor)
    if not both or targets.dtype != torch.int64 or output.dim() != targets.dim() + 1:
        return None
    if output.shape[:1] + output.shape[2:] != targets.shape:  # as cross-entropy has it: classes are dimension 1
        return None
    counted = targets != IGNORED
    return 100 * (output.argmax(1) == targets)[counted].double().mean().item()


# ---- in words


def in_words(outcomes: Sequence[Outcome], base: str, judging: int) -> list[str]:
    """Return which was best, and how little that says.

    Args:
        outcomes: of all runs, the base optimizer alone first.
        base: its name.
        judging: how many examples judged.
    """
    finite = [outcome for outcome in outcomes if math.isfinite(outcome.loss)]
    if not finite:
        return ["No run ended with a finite loss: try a smaller --lr."]
    best = min(finite, key=lambda outcome: outcome.loss)
    found = (
        [f"Best by held-out loss: {base} alone; no radius helped."]
        if best.rho is None
        else [f"Best by held-out loss: ρ = {best.rho:g}.", bsam(best.rho)]
    )
    return [
        *found,
        f"Little follows from it: one short run a radius, judged by {judging} examples. What is best after few steps "
        "need not be best after many.",
    ]


def _table(outcomes: Sequence[Outcome], base: str) -> Table:
    accuracy = outcomes[0].accuracy_percent is not None
    table = Table("ρ", "held-out loss", *(["held-out accuracy"] if accuracy else []))
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for outcome in outcomes:
        radius = f"{base} alone" if outcome.rho is None else f"{outcome.rho:g}"
        table.add_row(radius, f"{outcome.loss:.4g}", *([f"{outcome.accuracy_percent:.1f} %"] if accuracy else []))
    return table
