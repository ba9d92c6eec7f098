"""What `make gpu` runs: the stages by name, and the calls, lists of stages that fit into ten minutes together."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.gpu import kernels
from bench.gpu.device import REHEARSAL, current
from bench.gpu.stages import ROOT, Stage, as_far_as_it_came
from bench.gpu.tools import CARRIED, ERRORS_FOUND, find, judge_accuracy, judge_sanitizer

SECONDS = 570
"""Of a call."""
CLOSING = 5
"""Of these, for what comes after the last stage."""
CALLS = {
    "call1": ("environment", "build", "smoke", "memcheck-smoke", "operators", "steps", "operators-triton", "tests"),
    "call2": ("environment", "build", "graphs", "tests-triton", "memcheck", "racecheck"),
    "call3": ("environment", "build", "smoke", "kernels", "cases", "training-resnet18", "training-vit", "compiled"),
    "call4": ("environment", "build", "build-before", "smoke", "compare"),
    "call5": ("environment", "build", "smoke", "accuracy"),
}
"""By name, in the order in which they are made."""


def names(asked: str) -> list[str]:
    """Return the names of stages, in order, for names of stages and calls with commas between them.

    Raises:
        ValueError: one is neither.
    """
    found = [stage for name in asked.split(",") for stage in CALLS.get(name, (name,))]
    known = stages(Path(), Path())
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(f"--stages {unknown[0]}: must be one of {', '.join([*CALLS, *known])}")
    return list(dict.fromkeys(found))


def stages(record: Path, logs: Path) -> dict[str, Stage]:
    """Return all stages by name.

    Args:
        record: the file that they add to.
        logs: the folder for what they print and leave.
    """
    python = [sys.executable, "-m"]
    adding = f"--record={record}"
    measure = [*python, "bench.gpu.measure", adding, "--seconds={seconds}"]
    figures = partial(Stage, needs="smoke", judge=as_far_as_it_came)
    found = [
        Stage("environment", [*python, "bench.gpu.environment", adding], 20, as_far_as_it_came),
        _build("build", ROOT),
        _build("build-before", CARRIED / "before"),
        Stage("smoke", [*python, "bench.gpu.smoke"], 45, needs="build"),
        _sanitizer("memcheck-smoke", "memcheck", 135, only_after_failure_of="smoke"),
        figures("operators", [*measure, "--operators=cuda:float32", "--operators=cuda:bfloat16"], 45),
        figures("steps", [*measure, "--cases=first"], 90),
        Stage(
            "operators-triton",
            ["sh", "-c", " && ".join(_triton(measure))],
            110,
            judge=as_far_as_it_came,
        ),
        _suite("tests", record, logs, 110),
        _suite("graphs", record, logs, 30, "tests/test_graphs.py", "tests/test_graph_state.py"),
        _suite("tests-triton", record, logs, 30, keyword="triton"),
        _sanitizer("memcheck", "memcheck", 180, needs="build"),
        _sanitizer("racecheck", "racecheck", 180, needs="build"),
        Stage("kernels", [*python, "bench.gpu.kernels", adding, f"--logs={logs}"], 60, kernels.judge, needs="smoke"),
        figures("cases", [*measure, "--cases=others"], 130),
        figures("training-resnet18", [*python, "bench.gpu.training", adding, "resnet18"], 40),
        figures("training-vit", [*python, "bench.gpu.training", adding, "vit_b_16"], 45),
        Stage(
            "accuracy",
            [*python, "bench.gpu.accuracy", adding, "--seconds={seconds}"],
            150,
            judge_accuracy,
            environment={"BSAM_FUSED_CIFAR10": str(CARRIED / "cifar10_jpeg.npz")},
            needs="smoke",
        ),
        figures("compiled", [*measure, "--cases=compiled"], 100),
        Stage(
            "compare",
            [*python, "bench.gpu.compare", adding, str(CARRIED / "before"), str(ROOT)],
            240,
            judge=as_far_as_it_came,
            needs="build-before",
        ),
    ]
    return {stage.name: stage for stage in found}


def _build(name: str, source: Path) -> Stage:
    """Return the stage that builds a source tree in place, for this device alone, which takes a third of the time."""
    rehearsal = bool(os.environ.get(REHEARSAL))
    only = {} if rehearsal else {"TORCH_CUDA_ARCH_LIST": current().about["compute_capability"]}
    return Stage(
        name,
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        120,
        environment={"BSAM_FUSED_BUILD": "none" if rehearsal else "cuda", **only},
        folder=source,
    )


def _triton(measure: Sequence[str]) -> tuple[str, str]:
    """Return the commands of Triton's operators: figures only of what is right."""
    dtypes = ("float32", "bfloat16")
    smoke = [sys.executable, "-m", "bench.gpu.smoke", "--backend=triton", f"--dtypes={','.join(dtypes)}"]
    return shlex.join(smoke), shlex.join([*measure, *(f"--operators=triton:{dtype}" for dtype in dtypes)])


def _suite(name: str, record: Path, logs: Path, limit: float, *files: str, keyword: str = "") -> Stage:
    command = [sys.executable, "-m", "bench.gpu.suite", f"--record={record}", f"--logs={logs / name}", f"--key={name}"]
    if os.environ.get(REHEARSAL):  # the tests of the stand-in that the other stages have
        arguments = ["-k", "cuda-on-host and (zero_last_gradient or input_that_is_not)"]
        files = files or ("tests/test_against_reference.py",)
    else:
        arguments = ["-m", "cuda", *(["-k", keyword] if keyword else [])]
    return Stage(
        name,
        [*command, "--seconds={seconds}", *(f"--pytest={argument}" for argument in arguments), *files],
        limit,
        judge=as_far_as_it_came,
        environment={"OMP_NUM_THREADS": "2"},
        needs="build",
    )


_OURS = ("--kernel-name", "kns=bsam")
_TOOLS = {
    "memcheck": (*_OURS, "--report-api-errors", "no"),  # torch asks for driver functions that may be missing
    "racecheck": _OURS,
}


def _sanitizer(name: str, tool: str, limit: float, **when: str) -> Stage:
    options = ["--tool", tool, *_TOOLS[tool], "--error-exitcode", str(ERRORS_FOUND), "--print-limit", "20"]
    return Stage(
        name,
        [find("compute-sanitizer"), *options, sys.executable, "-m", "bench.gpu.smoke", "--eager"],
        limit,
        judge_sanitizer,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else memory past a tensor's end is the cache's
        **when,  # type: ignore[arg-type]
    )
