"""`bsam-fused build`: the C++ extension for the torch that is running, from the package's own sources, into a cache."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch

from bsam_fused._version import __version__
from bsam_fused.extension import compiling, obstacles, places
from bsam_fused.ops import native_flat

Kernels = Literal["auto", "cpu", "cuda"]
_LOG_LINES = 15  # shown where something failed


def run(kernels: Kernels, *, all_architectures: bool) -> int:
    """Build.

    Args:
        kernels: "cpu": those alone; "cuda": CUDA kernels too, or nothing; "auto": these where they can be had.
        all_architectures: CUDA kernels not for this machine's GPUs alone.

    Returns:
        The exit status: 0, or 1 where nothing could be built.
    """
    folder = places.cached(torch.__version__, torch.version.cuda)
    try:
        obstacle = obstacles.cpu_obstacle()
        if obstacle:
            return _failed(folder, obstacle.why, str(obstacle))
        cuda = _cuda(all_architectures) if kernels != "cpu" else obstacles.Obstacle("bsam-fused build --cpu")
        if kernels == "cuda" and isinstance(cuda, obstacles.Obstacle):
            return _refused(f"no CUDA kernels: {cuda}")
        return _build(folder, cuda, kernels)
    except ValueError as error:
        return _refused(str(error))
    except OSError as error:
        return _refused(f"{error}; {places.CACHE_VARIABLE} names another folder to build in")


def _cuda(all_architectures: bool) -> compiling.Cuda | obstacles.Obstacle:
    toolkit = obstacles.find_toolkit()
    if isinstance(toolkit, obstacles.Obstacle):
        return toolkit
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    alone = gpus and not all_architectures and not os.environ.get(compiling.ARCHITECTURES_VARIABLE)
    return compiling.Cuda(
        toolkit, compiling.architectures_of(toolkit, gpus) if alone else compiling.architectures(toolkit)
    )


def _build(folder: Path, cuda: compiling.Cuda | obstacles.Obstacle, kernels: Kernels) -> int:
    """Build in a folder beside, then rename: whoever looks finds a whole library, of whichever build came last.

    Where "auto" fails with CUDA kernels, it goes on without them.
    """
    start = time.monotonic()
    _say(
        f"bsam_fused {__version__} for torch {torch.__version__}, Python {platform.python_version()}: {_kernels(cuda)}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
        library = Path(scratch, places.file_name(torch.__version__))
        try:
            compiling.build(library, Path(scratch), cuda if isinstance(cuda, compiling.Cuda) else None, _say)
            native_flat.opened(library)
        except (compiling.BuildError, ImportError) as error:
            log = Path(shutil.copy(Path(scratch, places.LOG), folder))
            if kernels == "auto" and isinstance(cuda, compiling.Cuda):
                _say(f"With CUDA kernels it failed ({error}; log: {log}); going on without them")
                return _build(folder, obstacles.Obstacle(f"compiling failed: {error}"), kernels)
            end = "\n".join(log.read_text().splitlines()[-_LOG_LINES:])
            return _failed(folder, f"{error}; log: {log}", f"{error}\n\n{end}\n\nThe whole log: {log}")
        places.LeftOut(cuda=cuda.why if isinstance(cuda, obstacles.Obstacle) else None).write(folder)
        library.replace(folder / library.name)
    _say(f"Built in {time.monotonic() - start:.0f} s: {folder / library.name}")
    return 0


def _kernels(cuda: compiling.Cuda | obstacles.Obstacle) -> str:
    if isinstance(cuda, obstacles.Obstacle):
        return f"kernels for the CPU; none for CUDA ({cuda.why})"
    return f"kernels for the CPU, and for CUDA with {cuda.toolkit}: {', '.join(cuda.architectures)}"


def _say(text: str) -> None:
    print(text, flush=True)


def _failed(folder: Path, why: str, told: str) -> int:
    """Keep the reason for `bsam-fused info`, and tell it."""
    places.left_out(folder)._replace(extension=why).write(folder)
    return _refused(told)


def _refused(why: str) -> int:
    print(f"bsam-fused build: {why}", file=sys.stderr)
    return 1
