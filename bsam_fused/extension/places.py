"""Where the extension's sources and libraries lie, and what a build left out, and why."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from bsam_fused._version import __version__

CACHE_VARIABLE = "BSAM_FUSED_CACHE"
PACKAGE = Path(__file__).parents[1]
COMMAND = "bsam-fused build"
LOG = "build.log"
PREFIX = "_native_torch"
_LEFT_OUT = "left_out.json"


def sources_folder() -> Path:
    """Return csrc/: in an installed package it lies within, in a checkout beside."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


@functools.cache
def digest() -> str:
    """Return what tells these sources, and the flags that they are compiled with, from all others."""
    told = hashlib.sha256(__version__.encode())
    sources = sorted(path for path in sources_folder().iterdir() if path.is_file())
    for path in [*sources, Path(__file__).with_name("flags.py")]:
        told.update(path.name.encode() + path.read_bytes())
    return told.hexdigest()[:12]


def module_name(torch_version: str) -> str:
    """Return the module's name for a version of torch: what was built for another, or of other sources, has another."""
    major, minor = torch_version.split("+")[0].split(".")[:2]
    return f"{PREFIX}{major}_{minor}_{digest()}"


def file_name(torch_version: str) -> str:
    """Return the library's name, which holds the Python and the platform, too."""
    return module_name(torch_version) + sysconfig.get_config_var("EXT_SUFFIX")


def torch_of(library: Path) -> str:
    """Return the version of torch that a library is named for, such as 2.13."""
    return ".".join(library.name.removeprefix(PREFIX).split(".")[0].split("_")[:2])


def cache_root() -> Path:
    """Return where all that `bsam-fused build` builds lies."""
    named = os.environ.get(CACHE_VARIABLE)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(named) if named else Path(base, "bsam_fused")


def cached(torch_version: str, cuda: str | None) -> Path:
    """Return the folder in the cache for these sources, this Python, and a torch and its CUDA version."""
    torch = f"torch-{torch_version}" + (f"-cuda-{cuda}" if cuda else "")
    return cache_root() / digest() / str(sysconfig.get_config_var("SOABI")) / torch


class LeftOut(NamedTuple):
    """Why a build left out the extension, or its CUDA kernels; None where it has them."""

    extension: str | None = None
    cuda: str | None = None

    def write(self, folder: Path) -> None:
        """Keep it in ``folder``, where the library is or would be: whole, whoever else writes there."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
            new = Path(scratch, _LEFT_OUT)
            new.write_text(json.dumps(self._asdict()) + "\n")
            new.replace(folder / _LEFT_OUT)


def left_out(folder: Path) -> LeftOut:
    """Return what the build of ``folder`` left out, nothing where that cannot be read."""
    try:
        return LeftOut(**json.loads((folder / _LEFT_OUT).read_text()))
    except (OSError, ValueError, TypeError):  # none, or somebody else's
        return LeftOut()
