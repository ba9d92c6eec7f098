"""Many training runs, one a core, each row written as it comes: after a kill those that are missing are made."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import bsam_fused
from bsam_fused.extension.compiling import cores
from bsam_fused.report import ctrl_c
from bsam_fused.report.models import Refused
from bsam_fused.report.training.runs import Row, Run

PACKAGE = Path(bsam_fused.__file__).parent
LOOK = 0.2
"""Seconds between looks for Ctrl-C, while runs are under way."""


def written(path: Path) -> list[Row]:
    """Return the rows of a file of lines of JSON, none where there is no file, and leave its last line ended.

    A row that a kill cut short, after whole ones, is cut off. A row of another commit counts as any other: whoever
    wants all rows of one begins with another file.

    Raises:
        Refused: a line is no row; nothing of the file is changed.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    cut = lines.pop() if lines[1:] and _is_cut_short(lines[-1]) else b""
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    if cut:
        os.truncate(path, sum(map(len, lines)))
    elif lines and not lines[-1].endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    return rows


def _is_cut_short(line: bytes) -> bool:
    """Return whether a row was being written to it when a kill came."""
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(b"{") and not line.endswith(b"\n")
    return False


def _row(path: Path, number: int, line: bytes) -> Row:
    try:
        return Row(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise Refused(f"--out {path}: line {number} is not of a training run; name another file") from error


def run(runs: Sequence[Run], path: Path | None = None, workers: int | None = None) -> Iterator[Row]:
    """Make all runs that ``path`` has no row of, and yield the rows in the order in which they come.

    Args:
        runs: what to train.
        path: rows are appended to it, a line of JSON each; None: they are written nowhere.
        workers: processes, of one thread each; None: as many as there are cores.

    Raises:
        Refused: ``path`` holds something else than rows, or another process is writing rows to it.
        RuntimeError: a run failed; its traceback is shown.
        KeyboardInterrupt: Ctrl-C came.
    """
    if path is None:
        yield from _made(runs, workers)
        return
    with _alone(path) as file:
        done = {row.run for row in written(path)}
        for row in _made([each for each in runs if each not in done], workers):
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            yield row


@contextmanager
def _alone(path: Path) -> Iterator[TextIO]:
    """Open a file to append to, which no other process opens so meanwhile: both would make every row."""
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"--out {path}: another process writes rows to it; wait for it, or name another") from error
        yield file


def _made(runs: Sequence[Run], workers: int | None) -> Iterator[Row]:
    """Yield the rows of runs in the order in which they come."""
    if not runs:
        return
    count = min(workers or cores(), len(runs))
    # Left in the other order: workers that are ended fail the runs which threads still wait for.
    with ThreadPoolExecutor(count) as threads, _Workers(count) as crew:
        waiting = {threads.submit(crew.train, each) for each in runs}
        while waiting:
            ctrl_c.look()
            came, waiting = wait(waiting, LOOK, FIRST_COMPLETED)
            for future in came:
                yield future.result()


class _Workers:
    """Processes that train, each one run at a time. Args: count: how many."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._ends = ExitStack()

    def __enter__(self) -> _Workers:
        for _ in range(self._count):
            worker = subprocess.Popen(
                [sys.executable, "-m", "bsam_fused.report.training.worker"],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=PACKAGE.parent,  # `-m` looks there first, and the user may be in a folder with another one
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C in a terminal is this process's
            )
            self._ends.enter_context(worker)
            self._ends.callback(worker.kill)
            self._free.put(worker)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def train(self, one: Run) -> Row:
        """Return the row of a run, made by the next process that is free."""
        worker = self._free.get()
        try:
            answer = _ask(worker, json.dumps(asdict(one)))
        finally:
            self._free.put(worker)
        found = json.loads(answer) if answer else {"error": f"its process ended with status {worker.wait()}"}
        if "error" in found:
            raise RuntimeError(f"{one.repeated_by}:\n{found['error']}")
        return Row(**found)


def _ask(worker: subprocess.Popen[bytes], line: str) -> bytes:
    """Return a worker's answer; nothing where it ended."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(line.encode() + b"\n")
        return worker.stdout.readline()
    except OSError:
        return b""
