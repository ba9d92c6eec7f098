"""Stages: commands, each with its own share of the time, and what their ends mean."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, NamedTuple

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1

ROOT = Path(__file__).parents[2]
LEAST_SECONDS = 5.0
"""What must be left of the time for a stage to be begun."""
TICK = 10.0
"""Seconds between two looks at a stage that runs."""
SPARE = 3
"""Seconds of its limit that a stage is not told of: by then it has ended by itself."""
NOT_FOUND = 127
"""The exit status of a command that is not there, as shells have it."""

How = Literal["ok", "failed", "left out"]


class Outcome(NamedTuple):
    """How a stage ended."""

    how: How
    said: str
    """In one line."""


Judge = Callable[["int | None", str], Outcome]
"""(exit status, None where it was stopped; output) -> outcome."""


def by_status(status: int | None, output: str) -> Outcome:
    """Judge a command that says by its exit status whether it did its work."""
    if status is None:
        return Outcome("failed", "stopped: its time was up")
    return Outcome("ok", "done") if status == 0 else Outcome("failed", f"exit status {status}")


def as_far_as_it_came(status: int | None, output: str) -> Outcome:
    """Judge a command that notes its findings one by one, for which there may never be time enough."""
    return Outcome("ok", "as far as the time went") if status is None else by_status(status, output)


@dataclass(frozen=True)
class Stage:
    """A command; "{seconds}" in it stands for the time that it has."""

    name: str
    command: Sequence[str]
    limit: float
    """Seconds that it has; more where others before it left some."""
    judge: Judge = by_status
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    """It is left out where this stage did not end well."""
    only_after_failure_of: str | None = None
    """It is left out where this stage did not fail."""
    folder: Path = ROOT
    """Where it runs; it is left out where that is not there."""


def run_all(
    stages: Sequence[Stage],
    seconds: float,
    logs: Path,
    note: Callable[[Stage, Outcome, float], None],
    tick: Callable[[], None] = lambda: None,
) -> bool:
    """Run stages in turn, whatever became of those before.

    Args:
        stages: in order.
        seconds: for all of them together.
        logs: a folder; a stage's output goes to NAME.log there.
        note: is told how each ended, and the seconds that it took.
        tick: is called every `TICK` seconds meanwhile.

    Returns:
        Whether none failed. Those that were left out, or for which there was no time, did not.
    """
    end, ended = time.monotonic() + seconds, dict[str, How]()
    for i, stage in enumerate(stages):
        begin = time.monotonic()
        why = _why_not(stage, ended)
        later = sum(other.limit for other in stages[i + 1 :] if _is_promised(other, ended))
        limit = max(min(stage.limit, end - begin), end - begin - later)
        if why is None and limit < LEAST_SECONDS:
            why = "not begun: the time was up"
        outcome = Outcome("left out", why) if why else run(stage, limit, logs, tick)
        ended[stage.name] = outcome.how
        note(stage, outcome, time.monotonic() - begin)
    return "failed" not in ended.values()


def _why_not(stage: Stage, ended: Mapping[str, How]) -> str | None:
    """Return why a stage is left out, after others have ended so; None where it is not, as far as can be known."""
    if stage.needs in ended and ended[stage.needs] != "ok":
        return f"{stage.needs} was not ok"
    first = stage.only_after_failure_of
    if first in ended and ended[first] != "failed":
        return f"{first} did not fail"
    return None if stage.folder.is_dir() else f"there is no {stage.folder.relative_to(ROOT)}"


def _is_promised(stage: Stage, ended: Mapping[str, How]) -> bool:
    """Return whether time is kept for a stage; one for after a failure has the time of those that it takes away."""
    first = stage.only_after_failure_of
    return _why_not(stage, ended) is None and (first is None or ended.get(first) == "failed")


def run(stage: Stage, limit: float, logs: Path, tick: Callable[[], None] = lambda: None) -> Outcome:
    """Run a stage for ``limit`` seconds at the most."""
    logs.mkdir(parents=True, exist_ok=True)
    command = [word.replace("{seconds}", str(max(1, int(limit) - SPARE))) for word in stage.command]
    with (logs / f"{stage.name}.log").open("w+", errors="replace") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        begin = log.tell()
        try:
            status = _run(stage, command, limit, log, tick)
        except FileNotFoundError:
            status = NOT_FOUND
        log.seek(begin)
        return stage.judge(status, log.read())


def _run(stage: Stage, command: Sequence[str], limit: float, log: IO[str], tick: Callable[[], None]) -> int | None:
    path = os.pathsep.join(filter(None, [str(stage.folder), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=stage.folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment},
        stdout=log,
        stderr=subprocess.STDOUT,
        preexec_fn=_begin,
    )
    end = time.monotonic() + limit
    try:
        while (left := end - time.monotonic()) > 0:
            try:
                return process.wait(min(left, TICK))
            except subprocess.TimeoutExpired:
                tick()
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _begin() -> None:
    """End with this process, and one's children with oneself; no session of its own, which would outlive this one."""
    os.setpgrp()
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
