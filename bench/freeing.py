"""What it costs that a phase frees gradients, with glibc's defaults and with memory kept: `python -m bench.freeing`.

glibc gives large blocks back to the kernel as they are freed, and the next pass takes them anew, page by page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from bench.figures import spread
from bench.on_cpu import SUBJECT, THREADS
from bench.operators import OperatorRun
from bsam_fused.report.clock import HostClock

KEPT = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}
"""Has glibc keep what is freed: allocations come from the heap, and its top stays."""
ELEMENTS = 1 << 26
OPERATOR = "descend"
"""Frees one gradient of all elements."""
ROUNDS = 3
"""Of a process each way, in turns."""
STEPS = 10
WARM_UP = 3
"""Steps in which the heap grows to what it needs."""


def measure(elements: int = ELEMENTS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the operator's and the pass's times each way, for JSON."""
    ways: dict[str, dict[str, str]] = {"glibc's defaults": {}, "memory kept": KEPT}
    found: dict[str, dict[str, list[float]]] = {way: {"pass": [], OPERATOR: []} for way in ways}
    command = [sys.executable, "-m", "bench.freeing", "--elements", str(elements), "--json"]
    for _ in range(rounds):
        for way, environment in ways.items():
            said = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True)
            for name, seconds in json.loads(said.stdout).items():
                found[way][name] += seconds
    return {
        "elements": elements,
        "settings": KEPT,
        "ways": {way: {name: spread(seconds) for name, seconds in each.items()} for way, each in found.items()},
    }


def here(elements: int) -> dict[str, list[float]]:
    """Return the seconds of the pass, which makes gradients, and of the operator, in this process."""
    clock, run = HostClock(), OperatorRun(SUBJECT, ((elements,),), HostClock.device)
    found: dict[str, list[float]] = {"pass": [], OPERATOR: []}
    for _ in range(WARM_UP + STEPS):
        run.come_to("ascend")
        run.run("ascend")
        found["pass"].append(clock.busy(lambda: run.run("pass")))
        found[OPERATOR].append(clock.busy(lambda: run.run(OPERATOR)))
    return {name: seconds[WARM_UP:] for name, seconds in found.items()}


def told(found: dict[str, Any]) -> str:
    """Return the times as text."""
    return "\n".join(
        f"{way:<18}{name:<9}{ms['median']:7.1f} ms ({ms['p25']:.1f} to {ms['p75']:.1f})"
        for way, each in found["ways"].items()
        for name, ms in each.items()
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.freeing", description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--json", action="store_true", help="of this process alone, for the one that compares")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    print(json.dumps(here(options.elements)) if options.json else told(measure(options.elements)))


if __name__ == "__main__":
    main()
