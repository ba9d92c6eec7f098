"""The benchmarks of `make gpu`, or some of them, added to a run's record.

python -m bench.gpu.measure --record FILE.json [--operators BACKEND:DTYPE]... [--cases first|others|compiled|NAME]...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import one_operator, steps
from bench.cases import Case
from bench.deadline import Deadline
from bench.figures import Figure, judged, spread
from bench.gpu import cases, page
from bench.gpu.cases import CASES, H200_TARGETS, NO_TARGETS, OPERATOR_TARGETS, OPERATORS_ON, SUBJECT
from bench.gpu.device import condition, current
from bench.gpu.record import Record
from bench.gpu.stages import ROOT
from bsam_fused.report.clock import Clock
from bsam_fused.report.contestant import Shapes
from bsam_fused.report.implementations import reason

LEAST_SECONDS = 5.0
"""What must be left of the time for a benchmark to be begun."""
COUNT_SECONDS = 40.0
"""For a child process to count the launches of a case, at the most."""
WARM_UP = 3
"""Repetitions that are thrown away."""
SETS = {"first": cases.FIRST, "others": cases.OTHERS, "compiled": cases.COMPILED}
Counts = dict[str, dict[str, "int | None"]]
"""Implementation -> phase -> launches."""


def count_in_child(name: str, who: Sequence[str], seconds: float) -> Counts:
    """Return the launches of implementations of a case, counted by a process that times nothing.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: it could not.
    """
    command = [sys.executable, "-m", "bench.gpu.launches", name, *who]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=seconds, check=True)
    counts: Counts = json.loads(done.stdout.splitlines()[-1])
    return counts


class Benchmarks:
    """Runs benchmarks, keeps what they find in a record, and prints it.

    Args:
        record: where findings go.
        clock: what measures.
        deadline: by when all is done; what has not begun then is left out, and says so.
        subject: the implementation that the figures are about.
        count: counts launches.
    """

    def __init__(
        self,
        record: Record,
        clock: Clock,
        deadline: Deadline,
        subject: str = SUBJECT,
        count: Callable[[str, Sequence[str], float], Counts] = count_in_child,
    ) -> None:
        self.record, self.clock, self.deadline, self.subject, self._count = record, clock, deadline, subject, count
        self.well = True
        """Whether the subject could be measured in all that was begun, and no implementation has other weights."""

    def operators(self, title: str, shapes: Shapes, backend: str, dtype: torch.dtype = torch.float32) -> None:
        """Measure every operator of a backend on parameters of these shapes."""
        named = str(dtype).removeprefix("torch.")
        found = self._find(partial(self._operators, backend, shapes, dtype, named))
        key = f"{backend}, {named}, {title}"
        self._note("operators", key, found, well=backend != self.subject or "error" not in found)
        print(f"\n{page.operators({key: found})}", flush=True)

    def step(self, name: str, case: Case) -> None:
        """Measure a case, then have its launches counted."""
        found = self._find(partial(self._step, name, case))
        implementations = found.get("implementations", {self.subject: found})
        wrong = any(it.get("wrong") for it in implementations.values())
        self._note("steps", name, found, well=not wrong and "error" not in found and _is_there(implementations, self))
        if "implementations" in found:
            self._launches(name, case, found)
        print(f"\n{page.case(name, found)}", flush=True)

    def _launches(self, name: str, case: Case, found: dict[str, Any]) -> None:
        measured = [who for who, it in found["implementations"].items() if "why" not in it]
        measured = [who for who in measured if who != "compiled"]  # whose compiling takes longer than all else
        try:
            counts = self._count(name, measured, min(COUNT_SECONDS, max(1.0, self.deadline.left)))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            print(f"\nlaunches of {name} not counted: {reason(error)}", flush=True)
            return
        for who, by_phase in counts.items():
            found["implementations"][who]["launches"] = by_phase
        own = counts.get(self.subject, {}).values()
        if own and None not in own:
            found["figures"] += judged(case.targets, [Figure("launches", sum(n for n in own if n is not None))])
        self.record.save()

    def _operators(self, backend: str, shapes: Shapes, dtype: torch.dtype, named: str) -> dict[str, Any]:
        around, found = self._between(lambda copy: one_operator.measure(backend, shapes, self.clock, copy, dtype))
        copy = _copy(around) / 1e9
        shares = [Figure(name, 100 * it["gb_per_s"] / copy, "%") for name, it in found.items()]
        operators = {
            name: {"moves": it["moves"], "gpu_ms": spread(it["seconds"]), "gb_per_s": it["gb_per_s"]}
            for name, it in found.items()
        }
        targets = OPERATOR_TARGETS.get((backend, named), NO_TARGETS)
        return {"operators": operators, "figures": judged(targets, shares), **around}

    def _step(self, name: str, case: Case) -> dict[str, Any]:
        around, found = self._between(lambda _: steps.measure(case, self.clock, self.deadline, warm_up=WARM_UP))
        figures = _figures(case, found, self.subject, _copy(around))
        on_h200 = "H200" in self.record.content["about"]["device"]
        absolute = H200_TARGETS.get(name, NO_TARGETS) if on_h200 else NO_TARGETS
        return {**steps.report(case, found, figures, {**case.targets, **absolute}), **around}

    def _between(self, work: Callable[[float], Any]) -> tuple[dict[str, Any], Any]:
        """Return the device's condition before and after ``work`` (of the copy's bytes a second), and what it finds."""
        before = condition(self.clock)
        found = work(1e9 * before["copy_gb_per_s"])
        return {"before": before, "after": condition(self.clock)}, found

    def _find(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what ``work()`` does, or why it does not."""
        if self.deadline.left < LEAST_SECONDS:
            return {"why": "not begun: the time was up"}
        try:
            return work()
        except Exception as error:  # out of memory, say: the others may still run
            return {"why": reason(error), "error": True}

    def _note(self, section: str, name: str, found: dict[str, Any], *, well: bool) -> None:
        self.record.content[section][name] = found
        self.well &= well
        self.record.save()


def _is_there(implementations: dict[str, dict[str, Any]], run: Benchmarks) -> bool:
    """Return whether the subject was measured, or there was no time to."""
    return "why" not in implementations[run.subject] or implementations[run.subject]["why"].startswith("not begun")


def _copy(around: dict[str, Any]) -> float:
    """Return the copy's bytes a second, as it was before and after."""
    return 1e9 * mean(around[when]["copy_gb_per_s"] for when in ("before", "after"))


def _figures(case: Case, found: steps.Found, subject: str, copy: float) -> list[Figure]:
    """Return the numbers that matter of ``subject``, from medians; ``copy``: the copy's bytes a second."""
    measured = steps.measured_of(found)
    if subject not in measured:
        return []
    own = measured[subject]
    times = [Figure(f"{title} time", 1e6 * own.median(what), "µs") for title, what in _KINDS.items()]
    if "triton" in measured:
        times.append(Figure("host time, triton", 1e6 * measured["triton"].median("host"), "µs"))
    over = own.median("device") / steps.budget(case, copy)
    ratios = [
        figure
        for title, what in _KINDS.items()
        if what != "host"
        for figure in steps.ratios(found, subject, what, f"{title} time, ")
    ]
    return [*times, Figure("GPU time / byte budget", over), Figure("extra memory", own.extra, "N"), *ratios]


_KINDS = {"GPU": "device", "host": "host", "wall": "wall"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where something that was begun could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    parser.add_argument("--operators", action="append", default=[], metavar="BACKEND:DTYPE", help="each alone")
    parser.add_argument("--cases", action="append", default=[], choices=[*SETS, *CASES], help="whole steps")
    parser.add_argument("--seconds", type=float, default=150, help="begin nothing after these; default: %(default)s")
    options = parser.parse_args(arguments)
    device = current()
    benchmarks = Benchmarks(Record(options.record), device.make_clock(), Deadline(options.seconds))
    for title, shapes in OPERATORS_ON.items():
        for backend, dtype in (asked.split(":") for asked in options.operators):
            benchmarks.operators(title, device.shapes(shapes), backend, getattr(torch, dtype))
    for asked in options.cases:
        for name, case in device.some(SETS.get(asked, {asked: CASES.get(asked)}).items()):
            benchmarks.step(name, device.case(case))
    return 0 if benchmarks.well else 1


if __name__ == "__main__":
    sys.exit(main())
