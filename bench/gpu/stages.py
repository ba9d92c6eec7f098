"""The stages of `make gpu`: commands, each with its own time limit, and what their ends mean."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 5.0
"""What must be left of the time for a stage to be begun."""
ERRORS_FOUND = 86
"""The exit status by which the sanitizer says so."""
NOT_FOUND = 127
"""The exit status of a command that is not there, as shells have it."""
REFUSAL = "Device not supported"
"""How the sanitizer says that it cannot work on a machine at all."""


class Outcome(NamedTuple):
    """How a stage ended."""

    ok: bool
    said: str
    """In one line."""


Judge = Callable[[int, str], Outcome]
"""(exit status, output) -> outcome."""


def by_status(status: int, output: str) -> Outcome:
    """Judge a command that says by its exit status whether it did its work."""
    return Outcome(True, "done") if status == 0 else Outcome(False, f"exit status {status}")


@dataclass(frozen=True)
class Stage:
    """A command."""

    name: str
    command: Sequence[str]
    limit: float
    """Seconds."""
    log: Path
    """Where its output is added to."""
    judge: Judge = by_status
    environment: dict[str, str] = field(default_factory=dict)


def run_all(stages: Iterable[Stage], seconds: float, note: Callable[[Stage, Outcome, float], None]) -> bool:
    """Run every stage, whatever became of those before, and ``note`` how it ended and the seconds that it took.

    Returns:
        Whether all of them ended well, within so many ``seconds`` together.
    """
    end, well = time.monotonic() + seconds, True
    for stage in stages:
        begin = time.monotonic()
        limit = min(stage.limit, end - begin)
        outcome = run(stage, limit) if limit >= LEAST_SECONDS else Outcome(False, "not begun: the time was up")
        note(stage, outcome, time.monotonic() - begin)
        well &= outcome.ok
    return well


def run(stage: Stage, limit: float) -> Outcome:
    """Run a stage for ``limit`` seconds at the most."""
    stage.log.parent.mkdir(parents=True, exist_ok=True)
    with stage.log.open("a+", errors="replace") as log:
        log.write(f"$ {' '.join(stage.command)}\n")
        log.flush()
        begin = log.tell()
        try:
            status = _run(stage, limit, log)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"stopped after {limit:.0f} s")
        except FileNotFoundError:
            status = NOT_FOUND
        log.seek(begin)
        return stage.judge(status, log.read())


def _run(stage: Stage, limit: float, log: IO[str]) -> int:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=os.setpgrp,  # its children end with it; no session of its own, which would outlive this one
    )
    try:
        return process.wait(limit)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ---- what is run


def plan(record: Path, logs: Path) -> list[Stage]:
    """Return the stages of `make gpu`; ``record``: the file that the benchmarks add to."""
    python, junit = sys.executable, logs / "tests.xml"
    return [
        Stage(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            limit=240,
            log=logs / "build.log",
            environment={"BSAM_FUSED_BUILD": "cuda", **_toolkit()},
        ),
        Stage("backend", [python, "-c", _WHY_NO_BACKEND], limit=60, log=logs / "build.log"),
        Stage(
            "tests",
            [python, "-m", "pytest", "-q", "-m", "cuda", f"--junitxml={junit}", *_PYTEST],
            limit=210,
            log=logs / "tests.log",
            judge=partial(judge_tests, junit),
        ),
        Stage(
            "benchmarks",
            [python, "-m", "bench.gpu.measure", f"--record={record}"],
            limit=180,
            log=logs / "benchmarks.log",
        ),
        Stage(
            "training",
            [python, "-m", "bench.gpu.training", f"--record={record}"],
            limit=100,
            log=logs / "training.log",
        ),
        *(_sanitizer(tool, options, logs / "sanitizer.log") for tool, options in _TOOLS.items()),
    ]


_WHY_NO_BACKEND = "import sys, bsam_fused.ops.dispatch as d; sys.exit(d.unavailable('cuda', 'cuda'))"
# Modules whose tests need none of CUDA may need what is not installed there.
_PYTEST = ("-p", "no:cacheprovider", "--continue-on-collection-errors")


def _toolkit() -> dict[str, str]:
    """Return where the CUDA toolkit is, unless the environment says: an nvcc on PATH may be a script elsewhere."""
    home = Path("/usr/local/cuda")
    return {"CUDA_HOME": str(home)} if "CUDA_HOME" not in os.environ and home.is_dir() else {}


def judge_tests(junit: Path, status: int, output: str) -> Outcome:
    """Judge pytest by its report: all tests that ran passed, and some did."""
    if not junit.exists():
        return Outcome(False, f"exit status {status}, no report")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    report = ElementTree.parse(junit)
    junit.unlink()  # and no later run takes it for its own
    for suite in report.getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return Outcome(status == 0 and passed > 0, f"{passed} passed, {failed} failed, {counts['skipped']} skipped")


# Torch's own kernels are watched only where what they initialise must be known.
_OURS = ("--kernel-name", "kns=bsam")
_TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": (*_OURS, "--report-api-errors", "no"),  # torch asks for driver functions that may be missing
    "racecheck": _OURS,
    "initcheck": (),
}


def _sanitizer(tool: str, options: Sequence[str], log: Path) -> Stage:
    options = ["--tool", tool, *options, "--error-exitcode", str(ERRORS_FOUND), "--print-limit", "20"]
    return Stage(
        tool,
        [_find_sanitizer(), *options, sys.executable, "-m", "bench.gpu.sanitize"],
        limit=60,
        log=log,
        judge=judge_sanitizer,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else memory past a tensor's end is the cache's
    )


def _find_sanitizer() -> str:
    """Return compute-sanitizer's path, on PATH or with the toolkit, or its name where there is none."""
    name, home = "compute-sanitizer", {**os.environ, **_toolkit()}.get("CUDA_HOME", "")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin") or name


def judge_sanitizer(status: int, output: str) -> Outcome:
    """Judge compute-sanitizer; that it is not there, or refuses a machine, is no failure."""
    if status == NOT_FOUND:
        return Outcome(True, "left out: compute-sanitizer is not installed")
    if REFUSAL in output:
        return Outcome(True, f"left out: it cannot run on this machine ({REFUSAL})")
    summaries = [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line]
    said = summaries[-1] if summaries else "no summary"
    return Outcome(status == 0, said if status in {0, ERRORS_FOUND} else f"exit status {status}; {said}")
