"""The last full run of each check: a JSON file in bench/results/reliability/."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bsam_fused.report.machine import this_machine

FOLDER = Path(__file__).parents[2] / "bench" / "results" / "reliability"


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
    module = sys.modules["__main__"].__spec__.name.removesuffix(".__main__")
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    date, begin = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
    record = Record(check, command, date, asdict(this_machine()))
    yield record
    record.seconds = round(time.monotonic() - begin, 1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{check}.json").write_text(json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")


def read(folder: Path = FOLDER) -> dict[str, Record]:
    """Return all records, by check."""
    found = (Record(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json")))
    return {record.check: record for record in found}
