"""Makes the report: trains on noisy labels, times steps, sweeps over sizes, checks that fused learns alike, writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bsam_fused.ops import dispatch
from bsam_fused.report import benefit, ctrl_c, learning, models, rows, sweep, terminal, timing, write
from bsam_fused.report.clock import clock_of, copy_bandwidth
from bsam_fused.report.implementations import BASES
from bsam_fused.report.machine import this_machine
from bsam_fused.report.models import Refused, Workload
from bsam_fused.report.results import Report
from bsam_fused.report.training import tasks
from bsam_fused.report.training.runs import Row

COPIES = 15


@dataclass(frozen=True)
class Options:
    """What to measure; `bsam-fused report --help` says it to users."""

    model: str = "digits"
    optimizers: tuple[str, ...] = ("sam", "bsam")
    base: str = "sgd"
    device: str = "cpu"
    batch_size: int | None = None
    dtype: str = "float32"
    compile: bool = False
    graph: bool = False
    steps: int = 20
    epochs: int | None = None
    """Of the training on noisy labels, with the model "digits"; None: the task's."""
    seeds: int = 3
    """Of each optimizer there."""


@dataclass
class Draft:
    """A report as far as it has come. Args: options: what to measure.

    Raises:
        Refused: an option that cannot be had, by name.
    """

    options: Options
    workload: Workload = field(init=False)
    training: timing.Training = field(init=False)
    trained: list[Row] = field(default_factory=list)
    copy: float | None = None
    points: list[sweep.Point] = field(default_factory=list)
    learning: learning.Learning | None = None

    def __post_init__(self) -> None:
        options = self.options
        if options.graph and options.device != "cuda":
            raise Refused(f"--graph captures CUDA graphs: it needs --device cuda, not {options.device}")
        device = models.device(options.device)
        if options.model == "digits":
            _choose_backend()  # that they are learned by
        dtype = getattr(torch, options.dtype)
        self.clock = clock_of(device)
        self.workload = models.workload(options.model, options.batch_size, device, dtype)
        if options.compile:
            self.workload = timing.compiled(self.workload)
        ctrl_c.look()
        self.workload.a_pass()  # its own error comes before all measuring
        self.workload.model.zero_grad()
        self.shapes = [tuple(p.shape) for p in self.workload.model.parameters() if p.requires_grad]

    def run(self, progress: Progress) -> None:
        """Measure everything.

        Args:
            progress: shows how far it is.
        """
        if self.options.model == "digits":
            self._train(progress)
        self.time(progress)
        self._sweep(progress)
        if self.options.model == "digits":
            self._learn(progress)
        self.training.count_launches()

    def _train(self, progress: Progress) -> None:
        """Train on noisy labels, a run a core."""
        runs = benefit.runs(self.options.seeds, self.options.epochs)
        task = progress.add_task("training runs", total=len(runs))
        for row in benefit.train(runs):
            self.trained.append(row)
            progress.advance(task)

    def time(self, progress: Progress) -> None:
        """Time training steps alone."""
        options, base = self.options, BASES[self.options.base]
        task = progress.add_task("training steps", total=None)
        self.training = timing.Training(
            self.workload, options.optimizers, options.base, base, self.clock, graph=options.graph
        )
        progress.update(task, total=timing.WARM_UP + options.steps)
        _all(self.training.run(options.steps), progress, task)

    def _sweep(self, progress: Progress) -> None:
        options, base = self.options, BASES[self.options.base]
        self.copy = copy_bandwidth(self.clock, COPIES) / 1e9
        sizes = len(sweep.sizes(self.shapes)) * len(self.training.timed[1:])
        task = progress.add_task("growing sizes", total=sizes)
        dtype = getattr(torch, options.dtype)
        for point in sweep.sweep(self.shapes, options.optimizers, base, self.clock, dtype):
            self.points.append(point)
            progress.advance(task)

    def _learn(self, progress: Progress) -> None:
        epochs = min(self.options.epochs or learning.Recipe.epochs, learning.Recipe.epochs)
        recipe = replace(learning.Recipe(), epochs=epochs)
        data, runs = tasks.digits(), learning.prepare(learning.STUDENTS, recipe)
        task = progress.add_task("learning digits, float64", total=learning.steps(data, recipe))
        _all(learning.train(runs, data, recipe), progress, task)
        self.learning = learning.summary(runs, data, recipe)

    def report(self, *, partial: bool = False) -> Report:
        """Return what there is; ``partial``: not all of it."""
        timed = self.training.timed if hasattr(self, "training") else []
        return Report(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            machine=this_machine(),
            device=self.options.device,
            model=self.options.model,
            parameters=sum(map(_elements, self.shapes)),
            tensors=len(self.shapes),
            batch=self.workload.batch,
            dtype=self.options.dtype,
            compiled=self.options.compile,
            base=self.options.base,
            base_pass_ms=rows.pass_ms(timed[0]) if timed else 0.0,
            rows=rows.rows(timed),
            absent=self.training.absent if timed else {},
            copy_gb_per_s=self.copy,
            points=self.points,
            benefit=benefit.summary(self.trained) if self.trained else None,
            learning=self.learning,
            partial=partial,
        )


def make(out: Path, options: Options) -> bool:
    """Measure, print the table, and write the page and the figures.

    Args:
        out: a directory, for index.html and report.json.
        options: what to measure.

    Returns:
        Whether fused and plain training gave the same losses, where that was looked at.

    Raises:
        KeyboardInterrupt: the user interrupted it; what was measured until then is written, and says so.
        Refused: before anything is measured: an option that cannot be had, by name; ``out`` cannot be written to, or
            holds others' files. After all that is shown: it can no longer be written to.
    """
    draft, interrupted = Draft(options), False
    replaced = write.prepare(out)
    ctrl_c.defer()
    try:
        with Progress(console=Console(stderr=True), refresh_per_second=2) as progress:
            progress.console.print("Ctrl-C ends the measuring and writes what there is; a second one ends at once.")
            draft.run(progress)
    except KeyboardInterrupt:
        interrupted = True
    report = draft.report(partial=interrupted)
    console = Console(markup=False, emoji=False)
    try:
        terminal.show(report, console)
    finally:  # neither a full disk nor a closed pipe takes both
        write.files(report, out)
    terminal.say(console, [*([replaced] if replaced else []), write.written(out)])
    if interrupted:
        raise KeyboardInterrupt
    return report.agree


def _choose_backend() -> None:
    try:
        dispatch.choose("auto", torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        raise Refused(str(error)) from error


def _all(steps: Iterator[Any], progress: Progress, task: Any) -> None:
    for _ in steps:
        progress.advance(task)
        ctrl_c.look()


def _elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
