"""What a run on a GPU has found so far: a JSON file of its own, and the page of the day. Written after every finding.

A run never writes another one's file: nothing that was found earlier can be lost.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu import page
from bench.gpu.device import current
from bench.gpu.files import write
from bsam_fused.report.machine import this_machine

RESULTS = Path(__file__).parents[1] / "results"
SECTIONS = ("stages", "operators", "steps", "training", "accuracy", "tests", "kernels", "compared")


class Record:
    """A run's findings, each under a key of ``content``.

    Args:
        path: the JSON file; read where it is there.
        commit: of the source; None: what git says.
    """

    def __init__(self, path: Path, commit: str | None = None) -> None:
        self.path = path
        if path.exists():
            self.content: dict[str, Any] = json.loads(path.read_text())
        else:
            self.content = {"about": about(commit), **{section: {} for section in SECTIONS}}

    def save(self) -> None:
        """Write the JSON, and the page of all runs of the day: those of `RESULTS`, and those beside it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path, json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
        page.write_day(page.day_of(self.path), [RESULTS, self.path.parent], self.path.parent)


def new_name() -> str:
    """Return the name of a run that begins now: DEVICE-DATE-TIME."""
    device = re.sub(r"[^a-z0-9]+", "-", current().name.lower()).strip("-")
    return f"{device}-{_now():%Y-%m-%d-%H%M%S}"


def about(commit: str | None = None) -> dict[str, Any]:
    """Return what figures depend on: device, versions, commit, date."""
    machine = asdict(this_machine())
    return {
        "date": _now().isoformat(timespec="seconds"),
        "device": current().name,
        **current().about,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "cores": os.cpu_count(),
        **machine,
        "git_commit": commit or machine["git_commit"],
    }


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
