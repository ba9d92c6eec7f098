"""The benchmarks of `make gpu`, or some of them.

python -m bench.gpu.measure --record FILE.json [--only operators|CASE]... [--seconds N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import one_operator, steps
from bench.cases import Case
from bench.deadline import Deadline
from bench.figures import Figure, judged, spread
from bench.gpu import page
from bench.gpu.cases import CASES, H200_TARGETS, NO_TARGETS, OPERATOR_TARGETS, OPERATORS_ON, SUBJECT
from bench.gpu.record import Record
from bsam_fused.report.clock import Clock, CudaClock, copy_bandwidth
from bsam_fused.report.contestant import Shapes
from bsam_fused.report.implementations import reason

LEAST_SECONDS = 5.0
"""What must be left of the time for a benchmark to be begun."""
WARM_UP = 3
"""Repetitions that are thrown away."""


class Benchmarks:
    """Runs benchmarks, keeps what they find in a record, and prints it.

    Args:
        record: where findings go.
        clock: what measures.
        copy: the copy's bytes a second.
        deadline: by when all is done; what has not begun then is left out, and says so.
        subject: the implementation that the figures are about.
    """

    def __init__(self, record: Record, clock: Clock, copy: float, deadline: Deadline, subject: str = SUBJECT) -> None:
        self.record, self.clock, self.copy, self.deadline, self.subject = record, clock, copy, deadline, subject
        self.complete = True
        """Whether the subject was measured in all of them, and no implementation has other weights."""
        record.content["copy_gb_per_s"] = copy / 1e9
        record.save()

    def operators(self, title: str, shapes: Shapes, backend: str) -> None:
        """Measure every operator of a backend on parameters of these shapes."""
        found = self._find(partial(self._operators, backend, shapes))
        key = f"{backend}, {title}"
        self._note("operators", key, found, complete=backend != self.subject or "why" not in found)
        print(f"\n{page.operators({key: found})}", flush=True)

    def step(self, name: str, case: Case) -> None:
        """Measure a case."""
        found = self._find(partial(self._step, name, case))
        implementations = found.get("implementations", {self.subject: found})
        wrong = any(it.get("wrong") for it in implementations.values())
        self._note("steps", name, found, complete=not wrong and "why" not in implementations[self.subject])
        print(f"\n{page.case(name, found)}", flush=True)

    def count(self, name: str, case: Case) -> None:
        """Count the launches of what was measured of a case; once all else is done (`steps.launches`)."""
        found = self.record.content["steps"][name]
        measured = [who for who, it in found.get("implementations", {}).items() if "why" not in it]
        counts = self._find(partial(steps.launches, case, self.clock, measured))
        if "why" in counts:
            print(f"\nlaunches of {name} not counted: {counts['why']}", flush=True)
            return
        for who, by_phase in counts.items():
            found["implementations"][who]["launches"] = by_phase
        own = counts.get(self.subject, {}).values()
        if own and None not in own:
            found["figures"] += judged(case.targets, [Figure("launches", sum(own))])
        self.record.save()

    def _operators(self, backend: str, shapes: Shapes) -> dict[str, Any]:
        found = one_operator.measure(backend, shapes, self.clock, self.copy)
        shares = [Figure(name, it["copy_percent"], "%") for name, it in found.items()]
        operators = {
            name: {"moves": it["moves"], "gpu_ms": spread(it["seconds"]), "gb_per_s": it["gb_per_s"]}
            for name, it in found.items()
        }
        return {"operators": operators, "figures": judged(OPERATOR_TARGETS.get(backend, NO_TARGETS), shares)}

    def _step(self, name: str, case: Case) -> dict[str, Any]:
        found = steps.measure(case, self.clock, self.deadline, warm_up=WARM_UP)
        figures = _figures(case, found, self.subject, self.copy)
        on_h200 = "H200" in self.record.content["about"]["device"]
        absolute = H200_TARGETS.get(name, NO_TARGETS) if on_h200 else NO_TARGETS
        return steps.report(case, found, figures, {**case.targets, **absolute})

    def _find(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what ``work()`` does, or why it does not."""
        if self.deadline.left < LEAST_SECONDS:
            return {"why": "the time was up"}
        try:
            return work()
        except Exception as error:  # out of memory, say: the others may still run
            return {"why": reason(error)}

    def _note(self, section: str, name: str, found: dict[str, Any], *, complete: bool) -> None:
        self.record.content[section][name] = found
        self.complete &= complete
        self.record.save()


def _figures(case: Case, found: steps.Found, subject: str, copy: float) -> list[Figure]:
    """Return the numbers that matter of ``subject``, from medians; ``copy``: the copy's bytes a second."""
    measured = steps.measured_of(found)
    if subject not in measured:
        return []
    own = measured[subject]
    times = [Figure(f"{title} time", 1e6 * own.median(what), "µs") for title, what in _KINDS.items()]
    if "triton" in measured:
        times.append(Figure("host time, triton", 1e6 * measured["triton"].median("host"), "µs"))
    share = 100 * steps.budget(case, copy) / own.median("device")
    ratios = [
        figure
        for title, what in _KINDS.items()
        if what != "host"
        for figure in steps.ratios(found, subject, what, f"{title} time, ")
    ]
    return [*times, Figure("of copy bandwidth", share, "%"), Figure("extra memory", own.extra, "N"), *ratios]


_KINDS = {"GPU": "device", "host": "host", "wall": "wall"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where something that should be measured was not."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    parser.add_argument("--only", action="append", choices=["operators", *CASES], help="default: all")
    parser.add_argument("--seconds", type=float, default=150, help="begin nothing after these; default: %(default)s")
    options = parser.parse_args(arguments)
    deadline = Deadline(options.seconds)
    clock = CudaClock()
    benchmarks = Benchmarks(Record(options.record), clock, copy_bandwidth(clock), deadline)
    only = options.only or ["operators", *CASES]
    if "operators" in only:
        for title, shapes in OPERATORS_ON.items():
            for backend in OPERATOR_TARGETS:
                benchmarks.operators(title, shapes, backend)
    cases = {name: case for name, case in CASES.items() if name in only}
    for name, case in cases.items():
        benchmarks.step(name, case)
    for name, case in cases.items():
        benchmarks.count(name, case)
    return 0 if benchmarks.complete else 1


if __name__ == "__main__":
    sys.exit(main())
