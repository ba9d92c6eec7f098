"""What keeps the extension, or its CUDA kernels, from being built here, and what removes it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Obstacle(NamedTuple):
    """Why something cannot be built, and what to do first; "" where nothing helps."""

    why: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{self.why}: {self.mend}" if self.mend else self.why


WRAPPERS = {"ccache", "sccache", "distcc"}
"""Commands that call the compiler that is their first argument."""


def compiler() -> list[str]:
    """Return the C++ compiler's command.

    Raises:
        ValueError: CXX is no command.
    """
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise ValueError(f"CXX={os.environ['CXX']}: {error}") from error


def compiler_itself() -> str:
    """Return the C++ compiler's command without what calls it, and without options."""
    return next((word for word in compiler() if Path(word).name not in WRAPPERS), "c++")


def cpu_obstacle() -> Obstacle | None:
    """Return what keeps the extension from being built, None where nothing does."""
    if sys.platform == "win32":
        return Obstacle("building on Windows is not supported yet")
    try:
        import torch  # noqa: F401
    except ImportError:
        return Obstacle(
            "no torch to build with, as in pip's isolated build",
            "run `bsam-fused build` once all is installed, or install with --no-build-isolation",
        )
    obstacle = _compiler_obstacle()
    if obstacle:
        return obstacle
    folders = [sysconfig.get_path("include"), *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any(Path(folder, "Python.h").exists() for folder in folders if folder):
        return Obstacle("Python.h is missing", "install Python's headers (Debian, Ubuntu: apt install python3-dev)")
    return None


def _compiler_obstacle() -> Obstacle | None:
    try:
        commands = compiler()[0], compiler_itself()
    except ValueError as error:
        return Obstacle(str(error), "set it to a compiler's command, or not at all")
    missing = [command for command in commands if shutil.which(command) is None]
    mend = "install one (Debian, Ubuntu: apt install g++)"
    return Obstacle(f"no C++ compiler ({missing[0]}) on PATH", mend) if missing else None


# ---- CUDA


def find_toolkit() -> Path | Obstacle:
    """Return the folder of the CUDA toolkit that builds for the running torch, or what keeps it from doing so."""
    import torch

    if torch.version.hip is not None:
        return Obstacle(f"torch {torch.__version__} is built for ROCm, and the kernels are written for CUDA")
    if torch.version.cuda is None:
        mend = "install a CUDA build of it (https://pytorch.org/get-started)"
        return Obstacle(f"torch {torch.__version__} is built without CUDA", mend)
    return find_toolkit_for(torch.version.cuda)


def find_toolkit_for(cuda: str) -> Path | Obstacle:
    """Return the first toolkit that will do for a torch of this CUDA version, or why the first of all does not."""
    obstacles = []
    for home in toolkits():
        obstacle = toolkit_obstacle(home, cuda)
        if obstacle is None:
            return home
        obstacles.append(obstacle)
    named = named_toolkit()
    where = f" in {named}/bin" if named else ""
    none = Obstacle(f"no nvcc{where}", f"install the CUDA {cuda} toolkit, or set CUDA_HOME to its folder")
    return obstacles[0] if obstacles else none


def toolkit_obstacle(home: Path, cuda: str) -> Obstacle | None:
    """Return why the toolkit in ``home`` cannot build for a torch of this CUDA version, None if it can."""
    if not cuda_headers(home):
        return Obstacle(f"no cuda_runtime.h under {home}", f"set CUDA_HOME to the folder of the CUDA {cuda} toolkit")
    try:
        release = ask_nvcc(home, "--version").partition("release ")[2].partition(",")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        return Obstacle(f"nvcc in {home}/bin does not run ({error})", f"set CUDA_HOME to a CUDA {cuda} toolkit")
    if release.split(".")[0] != cuda.split(".")[0]:
        why = f"nvcc in {home}/bin is of CUDA {release}, torch of CUDA {cuda}"
        return Obstacle(why, "set CUDA_HOME to a toolkit like torch's")
    return None


def cuda_headers(home: Path) -> list[Path]:
    """Return the folders in a toolkit that have CUDA's headers; the second pattern is conda's."""
    return [
        file.parent for pattern in ("include", "targets/*/include") for file in home.glob(f"{pattern}/cuda_runtime.h")
    ]


def ask_nvcc(home: Path, option: str) -> str:
    """Return what nvcc prints when called with one option."""
    return subprocess.run([home / "bin" / "nvcc", option], capture_output=True, text=True, check=True).stdout


def toolkits() -> Iterator[Path]:
    """Yield the folders that have an nvcc, once each: of CUDA_HOME alone, where it is set, else of the usual places."""
    homes = [home for nvcc in _compilers() if nvcc.exists() for home in _homes(nvcc)]
    yield from dict.fromkeys(home for home in homes if (home / "bin" / "nvcc").exists())


def named_toolkit() -> str | None:
    """Return the folder that the environment names."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def _compilers() -> Iterator[Path]:
    named = named_toolkit()
    if named:
        yield Path(named, "bin", "nvcc")
        return
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    versions = sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    conda = [Path(os.environ.get("CONDA_PREFIX") or sys.prefix)]
    pip = importlib.util.find_spec("nvidia")
    packaged = [
        path for root in (pip.submodule_search_locations or () if pip else ()) for path in Path(root).glob("cu*")
    ]
    for home in [Path("/usr/local/cuda"), Path("/opt/cuda"), *versions, *conda, *packaged]:
        yield home / "bin" / "nvcc"


def _homes(nvcc: Path) -> list[Path]:
    """Return the folders whose nvcc this is, as it says itself first: the one on PATH may be a script that calls it."""
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return [*([Path(top[1]).resolve()] if top else []), nvcc.resolve().parents[1], nvcc.parents[1]]
