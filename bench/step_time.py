"""Times the optimizers' own part of a training step: all phases, without the forward and backward passes.

python -m bench.step_time [--case NAME]... [--repeat N] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

import bsam_fused
from bench.cases import CASES, TRIAL_CASES, Case
from bench.contestant import Contestant, coefficients, first_steps, seconds_of
from bench.figures import Figure, judged, spread, verdict
from bsam_fused.ops import native_flat

THREADS = 2
ITEMSIZE = torch.float32.itemsize
COPIED = 1 << 26
"""Elements of the copy that measures bandwidth: so many that no cache helps, and that it goes around them."""


class Measured(NamedTuple):
    """What was measured of a case."""

    phases: dict[str, list[list[float]]]
    """Implementation -> repetition -> seconds a phase."""
    copies: list[float]
    """Seconds of copying COPIED elements, each repetition (nothing in small cases: it would empty their caches)."""
    extra: dict[str, float]
    """Implementation -> peak memory beside parameters, gradients and momentum, in N elements."""


def measure(case: Case, repeat: int) -> Measured:
    """Measure a case: implementations take turns within each repetition, so that noise hits all alike.

    Raises:
        AssertionError: the implementations' weights have come apart.
    """
    curvatures = coefficients(case.shapes)
    contestants: dict[str, Contestant] = {}
    extra = {}
    for name, build in case.algorithm.implementations.items():
        contestants[name], peak = first_steps(build, case.algorithm.calls, curvatures)
        extra[name] = peak / (case.elements * ITEMSIZE) - 3  # without parameters, gradients and momentum
    for name, contestant in contestants.items():
        torch.testing.assert_close(contestant.params, contestants["loops"].params, msg=f"{name}: {{}}".format)
    phases: dict[str, list[list[float]]] = {name: [] for name in contestants}
    copies = []
    source, copy = torch.ones(2, 0 if case.small else COPIED)
    for _ in range(repeat + 1):
        for name, contestant in contestants.items():
            phases[name].append(contestant.step())
        copies.append(seconds_of(lambda: copy.copy_(source)))
    return Measured({name: steps[1:] for name, steps in phases.items()}, copies[1:], extra)


def figures(case: Case, measured: Measured) -> list[Figure]:
    """Return the numbers that matter, from medians over the repetitions."""
    times = {name: median(map(sum, steps)) for name, steps in measured.phases.items()}
    fused = times["fused"]
    result = [Figure(name, 1e3 * seconds, "ms") for name, seconds in times.items()]
    result += [Figure(f"{name} / fused", times[name] / fused) for name in times if name != "fused"]
    if case.small:
        result.append(Figure("fused, a tensor", 1e6 * fused / len(case.shapes), "µs"))
    else:
        budget = case.algorithm.moves * case.elements / (2 * COPIED) * median(measured.copies)
        result += [Figure("byte budget", 1e3 * budget, "ms"), Figure("fused / byte budget", fused / budget)]
    return result + [Figure(f"extra memory of {name}", extra, "N") for name, extra in measured.extra.items()]


def table(name: str, case: Case, found: Sequence[Figure]) -> str:
    """Return the figures as text, their targets beside them."""
    lines = [f"{name}: {len(case.shapes)} tensors, {case.elements / 1e6:.3g} M elements"]
    lines += [f"  {f.name:<24}{f.value:>10.2f} {f.unit:<4}{verdict(case.targets, f)}".rstrip() for f in found]
    return "\n".join(lines)


def report(name: str, case: Case, measured: Measured, found: Sequence[Figure]) -> dict[str, Any]:
    """Return everything found out about a case, for JSON."""
    return {
        "case": name,
        "calls": case.algorithm.calls,
        "tensors": len(case.shapes),
        "elements": case.elements,
        "repetitions": len(measured.copies),
        "step_ms": {who: spread([sum(step) for step in steps]) for who, steps in measured.phases.items()},
        "phase_ms": {
            who: {call: spread(seconds) for call, *seconds in zip(case.algorithm.calls, *steps, strict=True)}
            for who, steps in measured.phases.items()
        },
        "copy_gb_per_s": None if case.small else 2e-9 * COPIED * ITEMSIZE / median(measured.copies),
        "figures": judged(case.targets, found),
    }


def about() -> dict[str, Any]:
    """Return what the figures depend on: machine, versions, threads, commit, date."""
    module, _ = native_flat.load()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "instruction_set": module.instruction_set() if module else None,
        "commit": _commit(),
        "bsam_fused": bsam_fused.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    """Return the commit, with "-dirty" where the checkout differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_time", description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=[*CASES, *TRIAL_CASES], help="default: all but tiny")
    parser.add_argument("--repeat", type=int, help="repetitions, instead of each case's own number")
    parser.add_argument("--out", type=Path, help="write a JSON report to this file")
    options = parser.parse_args(arguments)
    if options.repeat is not None and options.repeat < 1:
        parser.error("--repeat: at least 1")
    torch.set_num_threads(THREADS)
    reports = []
    for name in options.case or CASES:
        case = {**CASES, **TRIAL_CASES}[name]
        measured = measure(case, options.repeat or case.repeat)
        found = figures(case, measured)
        print(table(name, case, found), flush=True)
        reports.append(report(name, case, measured, found))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**about(), "cases": reports}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
