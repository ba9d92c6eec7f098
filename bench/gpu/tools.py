"""What of the CUDA toolkit there is: where, and how its tools say that they cannot work here."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path

from bench.gpu.stages import NOT_FOUND, Outcome, as_far_as_it_came
from bsam_fused.extension import obstacles

ERRORS_FOUND = 86
"""The exit status by which the sanitizer says so."""
REFUSAL = "Device not supported"
"""How the sanitizer says that it cannot work on a machine at all."""
CARRIED = Path(__file__).parents[2] / "build" / "carry"
"""What `make gpu-carry` has brought."""


def toolkit() -> dict[str, str]:
    """Return where the CUDA toolkit is, unless the environment says: an older source's build does not look itself."""
    found = obstacles.find_toolkit()
    return {"CUDA_HOME": str(found)} if isinstance(found, Path) and obstacles.named_toolkit() is None else {}


def headers() -> dict[str, str]:
    """Return where compilers also look for headers: for Python's, where they were carried along."""
    return _also("CPATH", CARRIED / "include")


def packages() -> dict[str, str]:
    """Return where Python also looks for packages: for those that tests import, where they were carried along."""
    return _also("PYTHONPATH", CARRIED / "packages")


def _also(variable: str, folder: Path) -> dict[str, str]:
    """Return a search path with one more folder, where that is there."""
    return {variable: os.pathsep.join(filter(None, [os.environ.get(variable), str(folder)]))} if folder.is_dir() else {}


@functools.cache
def find(name: str) -> str:
    """Return a tool's path, on PATH or with a toolkit, or its name where there is none."""
    folders = [os.environ.get("PATH", ""), *(str(home / "bin") for home in obstacles.toolkits())]
    return shutil.which(name, path=os.pathsep.join(folders)) or name


def judge_sanitizer(status: int | None, output: str) -> Outcome:
    """Judge compute-sanitizer; that it is not there, refuses a machine, or does not end in time, is no failure."""
    if status == NOT_FOUND:
        return Outcome("left out", "compute-sanitizer is not installed")
    if REFUSAL in output:
        return Outcome("left out", f"compute-sanitizer cannot run on this machine ({REFUSAL})")
    found = [line.strip("= ") for line in output.splitlines() if line.startswith("========= ")]
    errors = [line for line in found if line.startswith(("Invalid", "Error", "Race", "Uninitialized", "Potential"))]
    if status is None:
        return Outcome("failed", errors[0]) if errors else Outcome("ok", "nothing found until its time was up")
    summaries = [line for line in found if "SUMMARY" in line]
    said = summaries[-1] if summaries else "no summary"
    if status in {0, ERRORS_FOUND}:
        return Outcome("ok" if status == 0 else "failed", said)
    return Outcome("failed", f"exit status {status}; {said}")


def judge_accuracy(status: int | None, output: str) -> Outcome:
    """Judge the trainings on CIFAR-10; that there is none is no failure."""
    if status == NOT_FOUND:
        return Outcome("left out", "CIFAR-10 was not carried along: make gpu-carry CIFAR10=...")
    if status in {0, None} and ", seed 0: " not in output:
        return Outcome("failed", "no training ended")
    return as_far_as_it_came(status, output)
