"""Measures all on this CPU but what `bench.members` and `bench.policies` do; docs/performance.md: `make performance`.

python -m bench.performance [--page-only] [--shapes NAME]...
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from bench import freeing, on_cpu, one_operator, scaling
from bench.cases import SHAPES, cpu_case
from bench.figures import spread
from bench.performance_page import page
from bsam_fused.ops import native_flat
from bsam_fused.report import make
from bsam_fused.report.clock import HostClock
from bsam_fused.report.implementations import BASES
from bsam_fused.report.machine import this_machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu.json"
FAMILY_RESULTS = ROOT / "bench" / "results" / "members.json"
POLICY_RESULTS = ROOT / "bench" / "results" / "policies.json"
PAGE = ROOT / "docs" / "performance.md"
TRAINED = {"digits": 50, "resnet18": 5}
"""Networks whose training steps are timed, and how many."""
CASES = [(algorithm, base) for algorithm in ("bsam", "sam") for base in BASES]
OPERATORS_ON = ("resnet18", "wrn28_10")


def measure(shapes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure everything; yield what there is so far, for JSON, whenever there is more."""
    found: dict[str, Any] = {
        "about": about(),
        "scaling": _scaling(),
        "freeing": _freeing(),
        "training": [_training(name, steps) for name, steps in TRAINED.items()],
        "operators": {name: _operators(name) for name in OPERATORS_ON if name in shapes},
        "steps": [],
    }
    for name in shapes:
        for algorithm, base in CASES:
            note_busy_cores(found["about"])
            found["steps"].append(_steps(name, algorithm, base))
            yield found


def about() -> dict[str, Any]:
    """Return when and on what it is measured, for JSON."""
    module, _ = native_flat.load()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **asdict(this_machine()),
        "instruction_set": module.instruction_set() if module else None,
        "busy_cores": _busy_cores(),
    }


def note_busy_cores(about: dict[str, Any]) -> None:
    """Note, between measurements, the most cores that others kept busy so far."""
    about["busy_cores"] = max(about["busy_cores"], _busy_cores())


def _busy_cores(seconds: float = 1.0) -> float:
    """Return how many cores others keep busy, other machines on the same host included: this process sleeps."""

    def spent() -> int:
        user, nice, system, _idle, _wait, *more = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        return sum(map(int, (user, nice, system, *more)))  # in clock ticks, of all cores

    if not Path("/proc/stat").exists():
        return round(os.getloadavg()[0], 2)  # of the minute before, with this process's own
    begin = spent()
    time.sleep(seconds)
    return round((spent() - begin) / os.sysconf("SC_CLK_TCK") / seconds, 2)


def _training(name: str, steps: int) -> dict[str, Any]:
    draft = make.Draft(make.Options(model=name, steps=steps))
    with Progress(disable=True) as progress:
        draft.time(progress)
    report = draft.report()
    print(f"training {name}: {len(report.rows)} implementations", flush=True)
    kept = ("model", "parameters", "tensors", "batch", "dtype", "base", "base_pass_ms", "absent")
    return {**{key: getattr(report, key) for key in kept}, "rows": [asdict(row) for row in report.rows]}


def _steps(shapes: str, algorithm: str, base: str) -> dict[str, Any]:
    side = on_cpu.measure(cpu_case(shapes, algorithm, base))
    print(f"{algorithm}-{base}-{shapes}\n{on_cpu.told(side)}", flush=True)
    return {"shapes": shapes, "algorithm": algorithm, "base": base, **on_cpu.report(side)}


def _operators(name: str) -> dict[str, Any]:
    found = one_operator.on_cpu(SHAPES[name], HostClock())
    return {
        backend: {
            operator: {**{key: it[key] for key in it if key != "seconds"}, "ms": spread(it["seconds"])}
            for operator, it in operators.items()
        }
        for backend, operators in found.items()
    }


def _scaling() -> dict[str, Any]:
    found = scaling.measure()
    print(scaling.told(found), flush=True)
    return found


def _freeing() -> dict[str, Any]:
    found = freeing.measure()
    print(freeing.told(found), flush=True)
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Write figures."""
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def written_page() -> str:
    """Return the page of the figures that there are."""
    family, policies = (_read(path) if path.exists() else None for path in (FAMILY_RESULTS, POLICY_RESULTS))
    return page(_read(RESULTS), family, policies)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.performance", description=__doc__.splitlines()[0])
    parser.add_argument("--page-only", action="store_true", help="write the page of the figures that there are")
    parser.add_argument("--shapes", action="append", choices=SHAPES, help="default: all")
    options = parser.parse_args(arguments)
    if not options.page_only:
        torch.set_num_threads(on_cpu.THREADS)
        for found in measure(options.shapes or list(SHAPES)):
            write(RESULTS, found)
    PAGE.write_text(written_page())


if __name__ == "__main__":
    main()
