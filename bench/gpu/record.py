"""What a run on a GPU has found so far: a JSON file, and a page beside it. Written anew after every finding."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu.page import page
from bsam_fused.report.machine import this_machine

RESULTS = Path(__file__).parents[1] / "results"


class Record:
    """A run's findings, each under a key of ``content``.

    Args:
        path: the JSON file; read where it is there.
        commit: of the source, where this is no git checkout.
    """

    def __init__(self, path: Path, commit: str | None = None) -> None:
        self.path = path
        if path.exists():
            self.content: dict[str, Any] = json.loads(path.read_text())
        else:
            self.content = {"about": about(commit), "stages": {}, "operators": {}, "steps": {}, "training": {}}

    def save(self) -> None:
        """Write the JSON and the page, and copies of both into the folder $OUT, where that is set."""
        text = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
        for folder in {self.path.parent, logs()} if "OUT" in os.environ else {self.path.parent}:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / self.path.name, text)
            _write(folder / self.path.with_suffix(".md").name, page(self.content))


def _write(path: Path, text: str) -> None:
    """Write a file at once, so that a run that is killed leaves the last one whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def results_path() -> Path:
    """Return where a run on this device begun today keeps its record."""
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return RESULTS / f"{device}-{_now().date().isoformat()}.json"


def logs() -> Path:
    """Return the folder for logs: $OUT, which comes back from a lent machine, else one that git ignores."""
    return Path(os.environ.get("OUT") or RESULTS.parents[1] / "build" / "gpu")


def about(commit: str | None = None) -> dict[str, Any]:
    """Return what figures depend on: device, driver, versions, commit, date."""
    machine = asdict(this_machine())
    return {
        "date": _now().isoformat(timespec="seconds"),
        **_device(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        **machine,
        "git_commit": machine["git_commit"] or commit,
    }


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"device": "no GPU"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split()[0] if done.stdout.split() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
