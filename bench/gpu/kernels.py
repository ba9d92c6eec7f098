"""Each kernel in two dtypes under Nsight Compute, added to a run's record.

python -m bench.gpu.kernels --record FILE.json --logs FOLDER

Without arguments it is what ncu watches: every operator once, found by the profiler's start and stop.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import SUBJECT
from bench.gpu.device import current
from bench.gpu.record import Record
from bench.gpu.stages import NOT_FOUND, ROOT, Outcome
from bench.gpu.tools import find
from bench.operators import OPERATORS, OperatorRun

SHAPES = ((1 << 26,),)
DTYPES = (torch.float32, torch.bfloat16)
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "gpc__cycles_elapsed.avg.per_second",  # the clocks, as they are
    "dram__cycles_elapsed.avg.per_second",
)
REFUSALS = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler")
REFUSED = 3
"""The exit status where ncu is there, and may not or cannot read counters."""


def run_operators() -> None:
    """Run every operator, seen by ncu the second time, when its buffers are there."""
    device = torch.device(current().worker[0])
    for dtype in DTYPES:
        run = OperatorRun(SUBJECT, current().shapes(SHAPES), device, dtype)
        for name in OPERATORS:
            for seen in (False, True):
                run.come_to(name)
                torch.cuda.synchronize()
                if seen:
                    torch.cuda.profiler.start()
                run.run(name)
                torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def watch(tool: str, log: Path) -> tuple[int, str]:
    """Run that under ncu; return its exit status and what it said."""
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:bsam", "--metrics", ",".join(METRICS)]
    command += ["--log-file", str(log), sys.executable, "-m", "bench.gpu.kernels"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        return NOT_FOUND, ""
    return done.returncode, done.stdout + (log.read_text() if log.exists() else "")


def parse(lines: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the metrics of each kernel, with their units, from ncu's raw page: heads, units, a row a launch."""
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if not rows:
        return {}
    heads, units, *launches = rows
    found: dict[str, dict[str, str]] = {}
    for launch in launches:
        it, unit = dict(zip(heads, launch, strict=True)), dict(zip(heads, units, strict=True))
        found[_short(it["Kernel Name"])] = {m: f"{it[m]} {unit[m]}".strip() for m in METRICS if m in it}
    return found


def _short(name: str) -> str:
    """Return a demangled name without namespaces, return type and parameters."""
    return re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", name).partition("(")[0]


def judge(status: int | None, output: str) -> Outcome:
    """Judge the stage; that ncu is not there, or refuses, is no failure."""
    if status == NOT_FOUND:
        return Outcome("left out", "ncu is not installed")
    if status == REFUSED:
        return Outcome("left out", "ncu cannot read counters on this machine: see the log")
    last = (output.splitlines() or [""])[-1]
    return Outcome("ok", last) if status == 0 else Outcome("failed", f"exit status {status}: {last}")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    if not arguments:
        run_operators()
        return 0
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    parser.add_argument("--logs", type=Path, required=True, help="the folder for what ncu writes")
    options = parser.parse_args(arguments)
    status, said = watch(find("ncu"), options.logs / "ncu.csv")
    print(said)
    if status == NOT_FOUND:
        return status
    if any(refusal in said for refusal in REFUSALS):
        return REFUSED
    record: Record = Record(options.record)
    found: dict[str, Any] = parse(said.splitlines())
    record.content["kernels"] |= found
    record.save()
    print(f"{len(found)} kernels")
    return status or (0 if found else 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
