"""The tests that need a GPU, file by file, several files at a time, added to a run's record.

python -m bench.gpu.suite --record FILE.json --logs FOLDER [--seconds N] [--pytest ARGUMENT]... [FILE...]

A process a file, the most telling ones first; the counts of each are in the record as soon as it ends. One whose
process dies, of a crash or a test that hangs, is gone on with after the test that it died of, which counts as failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.gpu.outcomes import read
from bench.gpu.record import Record
from bench.gpu.stages import ROOT

WORKERS = 8
A_TEST = 60
"""Seconds of a test, at the most."""
DEATHS = 3
"""Of a file's process, after which the file is given up: a context that is broken breaks all."""
NO_TESTS = 5
"""pytest's exit status where a file has none of what was asked for."""
FIRST = ("cuda", "against_reference", "graphs", "graph_state", "golden", "rounding", "numbers", "base_optimizers")
WORDS = ("cuda", "backend")
"""In the text of each file that has tests for a GPU."""


def files() -> list[str]:
    """Return the files that may have tests for a GPU, those that tell most first."""
    found = {
        path.stem.removeprefix("test_"): str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if any(word in path.read_text() for word in WORDS)
    }
    return [found[name] for name in sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))]


def run_file(file: str, arguments: Sequence[str], logs: Path, end: float) -> dict[str, Any]:
    """Run a file's tests until the time ``end``; return counts and the names of those that failed, for JSON."""
    logs.mkdir(parents=True, exist_ok=True)
    outcomes, log = logs / f"{Path(file).stem}.jsonl", logs / f"{Path(file).stem}.log"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.outcomes"]
    command += [f"--outcomes={outcomes}", f"--a-test={A_TEST}", file, *arguments]
    begin, said = time.monotonic(), "not begun: the time was up"
    for _ in range(DEATHS):
        known, left = len(read(outcomes)), end - time.monotonic()
        if left <= 0:
            break
        try:
            with log.open("a") as output:
                done = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=left)
        except subprocess.TimeoutExpired:
            said = "stopped: the time was up"
            break
        said = "done" if known and done.returncode == NO_TESTS else _said(done.returncode, log)
        if not (len(read(outcomes)) > known and [*read(outcomes).values()][-1] == "begun"):
            break
    else:
        said = f"exit status {done.returncode}: given up, its process died {DEATHS} times"
    return {**_counted(read(outcomes), said), "said": said, "seconds": time.monotonic() - begin}


def _said(status: int, log: Path) -> str:
    """Return what pytest's exit status says."""
    if status in {0, 1}:
        return "done"
    if status == NO_TESTS:
        return "no tests"
    missing = re.search(r"ModuleNotFoundError: (.*)", log.read_text(errors="replace"))
    return f"left out: {missing[1]}" if missing else f"exit status {status}"


def _counted(outcomes: dict[str, str], said: str) -> dict[str, Any]:
    """Return counts and names. A test that was begun and did not end failed, unless the time ended it."""
    count, failed = Counter(outcomes.values()), [test for test, how in outcomes.items() if how in {"failed", "begun"}]
    if said.startswith("stopped") and [*outcomes.values()][-1:] == ["begun"]:
        failed.pop()
    return {"passed": count["passed"], "failed": len(failed), "skipped": count["skipped"], "names": failed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where a test failed, or none ran."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.suite", description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="the JSON file to write, or to add to")
    parser.add_argument("--logs", type=Path, required=True, help="the folder for the output of each file")
    parser.add_argument("--key", default="tests", help="under which to keep the counts; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=300, help="for all; default: %(default)s")
    parser.add_argument("--pytest", action="append", default=[], help="an argument for pytest")
    parser.add_argument(
        "files", nargs="*", help="default: all that may have tests for a GPU, those that tell most first"
    )
    options = parser.parse_args(arguments)
    record, end = Record(options.record), time.monotonic() + options.seconds
    found = record.content["tests"].setdefault(options.key, {})
    with ThreadPoolExecutor(WORKERS) as pool:
        running = {
            pool.submit(run_file, file, options.pytest, options.logs, end): file for file in options.files or files()
        }
        for done in as_completed(running):
            file, result = running[done], done.result()
            if result["said"] == "no tests":
                continue
            found[file] = result
            record.save()
            print(f"{file}: {result['passed']} passed, {result['failed']} failed, {result['said']}", flush=True)
            for name in result["names"]:
                print(f"  {name}", flush=True)
    well = all(it["failed"] == 0 and not it["said"].startswith("exit") for it in found.values())
    passed = sum(it["passed"] for it in found.values())
    in_time = all("the time was up" not in it["said"] for it in found.values())
    print(f"{passed} passed, {sum(it['failed'] for it in found.values())} failed", flush=True)
    return 0 if well and (passed or not in_time) else 1


if __name__ == "__main__":
    sys.exit(main())
