"""Whether a radius can be read off how the loss rises along the ascent: judged by the runs, a task left out in turn.

python -m bench.evidence.criterion [--task NAME]...   measures the rises, of networks by the base optimizer alone
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Literal, get_args

import torch

from bench.evidence.protocol import PLANS, TUNING_SEEDS
from bench.evidence.results import Found, accuracy, mean
from bench.evidence.rows import FOLDER
from bsam_fused.report.machine import this_machine
from bsam_fused.report.training.methods import BASE, training_loss
from bsam_fused.report.training.runs import Run, trained
from bsam_fused.report.training.tasks import TASKS
from bsam_fused.sharpness.radius import LADDER, loss_rises, radius_at

RISES = FOLDER / "rises.jsonl"
When = Literal["at the beginning", "after a tenth", "at the end"]
Kind = Literal["share of the loss", "nats", "one ρ for all"]
"""What the rise is to be: a share of the loss at w, or so many nats; the last looks at no rise, and is to be beaten."""
VALUES = tuple(10 ** (i / 8) for i in range(-24, 17))
"""That are tried of each."""
NEXT = 2.0
"""Times a radius: what is called next to it. Radii are tested two and a half times apart."""


@dataclass(frozen=True)
class Rises:
    """How far the loss of a batch rises, the mean over a task's training batches."""

    task: str
    seed: int
    when: When
    """Of training by the base optimizer; a tenth of its epochs is a whole training of so many."""
    loss: float
    radii: tuple[float, ...]
    rises: tuple[float, ...]
    command: str
    cpu: str
    torch: str
    commit: str | None


def measured(task: str, seed: int, when: When) -> Rises:
    """Train, and measure."""
    epochs = {
        "at the beginning": 0,
        "after a tenth": max(1, TASKS[task].epochs // 10),
        "at the end": TASKS[task].epochs,
    }
    network, data, *_ = trained(Run(task, BASE, None, seed, epochs[when], "validation"))
    size = TASKS[task].batch_size
    batches = list(zip(data.training.x.split(size), data.training.y.split(size), strict=True))
    loss, rises = loss_rises(network, training_loss, batches, LADDER)
    here, command = this_machine(), shlex.join(["python", "-m", "bench.evidence.criterion", "--task", task])
    return Rises(task, seed, when, loss, LADDER, tuple(rises), command, here.cpu, here.torch, here.git_commit)


def written() -> list[Rises]:
    """Return what was measured."""
    lines = RISES.read_text(encoding="utf-8").splitlines() if RISES.exists() else []
    return [Rises(**json.loads(line)) for line in lines]


def of(task: str, when: When, rises: Iterable[Rises]) -> list[Rises]:
    """Return those of a task's networks at a time of training, one a seed."""
    return [it for it in rises if (it.task, it.when) == (task, when)]


def radius(rises: Iterable[Rises], kind: Literal["share of the loss", "nats"], value: float) -> float:
    """Return the radius with that rise, the geometric mean over seeds."""
    sought = [(it, it.loss if kind == "share of the loss" else 1.0) for it in rises]
    found = [radius_at(it.radii, it.rises, loss, value).rho for it, loss in sought]
    return math.exp(fmean(map(math.log, found)))


# ---- judged


@dataclass(frozen=True)
class Case:
    """A task on which SAM gains: how far the loss rises, and what each of its ladder's radii gained."""

    task: str
    rises: list[Rises]
    gains: dict[float, float]
    """ρ -> points of percent over the base optimizer, on the test split."""
    tuned: float

    def radius(self, kind: Kind, value: float) -> float:
        """Return ρ of a criterion."""
        return value if kind == "one ρ for all" else radius(self.rises, kind, value)

    def reached(self, kind: Kind, value: float) -> float:
        """Return the share of the tuned gain that is had at the radius next to the criterion's, of those tested.

        Nothing is known, and 0 returned, of a radius more than `NEXT` times beyond them.
        """
        rho = self.radius(kind, value)
        nearest = min(self.gains, key=lambda one: abs(math.log(one / rho)))
        return self.gains[nearest] / self.gains[self.tuned] if 1 / NEXT <= rho / nearest <= NEXT else 0.0


@dataclass(frozen=True)
class Judged:
    """A criterion, at one time of training: what it reached on tasks that were left out when it was fitted."""

    kind: Kind
    when: When
    reached: dict[str, float]
    """Task -> the share of the tuned gain."""
    fitted: float
    """To all tasks: the share of the loss, the rise in nats, or the radius."""

    @property
    def holds(self) -> bool:
        """Whether it reached half of the tuned gain on all tasks but one."""
        return sum(share < 0.5 for share in self.reached.values()) <= 1


def cases(found: Sequence[Found], rises: Sequence[Rises], when: When) -> list[Case]:
    """Return the tasks on which SAM's gain, at the radius that was tuned, exceeds twice its standard error."""
    result = []
    for each in found:
        of_task = of(each.task, when, rises)
        gain = each.gain("SAM", BASE)
        if of_task and gain.value > 2 * gain.error:
            base = each.mean(BASE).value
            gains = {rho: mean([accuracy(row) for row in rows]).value - base for rho, rows in each.of_sam().items()}
            tuned = each.tuned["SAM"]
            assert tuned is not None
            result.append(Case(each.task, of_task, gains, tuned))
    return result


def judge(found: Sequence[Found], rises: Sequence[Rises]) -> list[Judged]:
    """Return the judgement of each criterion at each time of training; nothing where fewer than three tasks tell."""
    judged = []
    for when in get_args(When):
        told = cases(found, rises, when)
        for kind in get_args(Kind) if len(told) >= 3 else ():
            reached = {
                it.task: it.reached(kind, fitted([each for each in told if each is not it], kind)) for it in told
            }
            judged.append(Judged(kind, when, reached, fitted(told, kind)))
    return [it for it in judged if it.kind != "one ρ for all" or it.when == "at the end"]


def fitted(told: Sequence[Case], kind: Kind) -> float:
    """Return the value of `VALUES` with the largest mean share of the tuned gains, in the middle of those alike."""
    means = [fmean(min(case.reached(kind, value), 1.0) for case in told) for value in VALUES]
    best = [value for value, reached in zip(VALUES, means, strict=True) if reached >= max(means) - 1e-9]
    return best[len(best) // 2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing; returns the exit status, 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.criterion")
    parser.add_argument("--task", nargs="+", choices=list(PLANS), default=list(PLANS), help="(default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = written()
    there = {(it.task, it.seed, it.when) for it in rows}
    for each in ((task, seed, when) for task in options.task for seed in TUNING_SEEDS for when in get_args(When)):
        if each not in there:
            rows.append(measured(*each))
            _write(rows)
    return 0


def _write(rows: Iterable[Rises]) -> None:
    """Write all rows anew, or leave the file as it was."""
    draft = RISES.with_suffix(".draft")
    draft.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    draft.replace(RISES)


if __name__ == "__main__":
    sys.exit(main())
