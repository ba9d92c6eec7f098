"""The last full run of each check: a JSON file in bench/results/reliability/."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bsam_fused.report.machine import this_machine

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "bench" / "results" / "reliability"
TRIALS = ROOT / "build" / "reliability"
"""For the records of runs that are not full ones."""


@dataclass
class Record:
    """What ran, where, when and for how long; and what it found."""

    check: str
    command: str
    date: str
    machine: dict[str, Any]
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    """By name: numbers, texts, and lists and dicts of them."""


@contextmanager
def recorded(check: str, folder: Path = FOLDER) -> Iterator[Record]:
    """Yield the record of a run that begins now; it is written once the block ends without an error.

    Args:
        check: its name, and its file's: `CHECK.json`.
        folder: where to.
    """
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    command = shlex.join(["python", *program, *sys.argv[1:]])
    date, begin = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    record = Record(check, command, date, asdict(this_machine()))
    yield record
    record.seconds = round(time.monotonic() - begin, 1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{check}.json").write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")


def run(check: str, parser: argparse.ArgumentParser, find: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """Run a check whose moments or places are drawn as its command says, and record what it finds; returns 0.

    Args:
        check: its name.
        parser: of its other options; it gets `--seed` and `--out`.
        find: the check itself, of all options; what it returns are the figures.
    """
    full = parser.parse_args([])
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is drawn (default: the time)")
    parser.add_argument("--out", type=Path, help=f"where the record goes (default: {FOLDER}; of less {TRIALS})")
    options = parser.parse_args()
    folder = options.out or (FOLDER if vars(full).items() <= vars(options).items() else TRIALS)
    print(f"--seed {options.seed}", flush=True)
    with recorded(check, folder) as record:
        record.figures = {"seed": options.seed, **find(options)}
    print(f"recorded in {folder}", flush=True)
    return 0
