"""What the figures were measured with: versions, machine, source. Needs torch alone."""

from __future__ import annotations

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from bsam_fused import __version__


@dataclass(frozen=True)
class Machine:
    """Versions, CPU and threads, and the commit of the source if this is a git checkout."""

    bsam_fused: str
    python: str
    torch: str
    cpu: str
    threads: int
    git_commit: str | None


def this_machine() -> Machine:
    """Return what is running here and now."""
    return Machine(
        bsam_fused=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        cpu=_cpu_model(),
        threads=torch.get_num_threads(),
        git_commit=_git_commit(),
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the checkout's commit, with "-dirty" where tracked files differ from it; None elsewhere.

    Results and pages count for nothing: they change as rows come.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = ["git", "diff", "--quiet", "HEAD", "--", ".", ":!bench/results", ":!docs"]
        dirty = subprocess.run(changed, cwd=root, capture_output=True, check=False).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + ("-dirty" if dirty else "")
