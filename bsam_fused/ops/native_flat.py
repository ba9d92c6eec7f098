"""The compiled module: where it is, and if it cannot be used, why and what adds it."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bsam_fused.extension import obstacles, places
from bsam_fused.ops import contract


def folders() -> tuple[Path, Path]:
    """Return where the library may lie, what `bsam-fused build` built for exactly this torch before the package's."""
    return places.cached(torch.__version__, torch.version.cuda), places.PACKAGE


def libraries() -> list[Path]:
    """Return the libraries for this torch and Python, of the sources that lie here; the first that loads is used."""
    found = [folder / places.file_name(torch.__version__) for folder in folders()]
    return [library for library in found if os.access(library, os.R_OK)]


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Return the compiled module and "", or None and the reason with the command that mends it."""
    why = ""
    for library in libraries():
        try:
            return opened(library), ""
        except ImportError as error:
            why = why or f"does not load ({error})"
    why = f"the C++ extension {why or _why_missing()}"
    failed = places.left_out(folders()[0]).extension is not None
    return None, f"{why}; {_mend(obstacles.cpu_obstacle(), why, failed)}"


def opened(library: Path) -> ModuleType:
    """Return the module in a library.

    Raises:
        ImportError: it does not load.
    """
    name = f"bsam_fused.{places.module_name(torch.__version__)}"
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.machinery.ModuleSpec(name, loader, origin=str(library))
    spec.has_location = True  # and so __file__
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
    return module


def _why_missing() -> str:
    cache, package = folders()
    failed = places.left_out(cache).extension
    if failed:
        return f"is not built ({failed}, at the last `{places.COMMAND}`)"
    every = f"{places.PREFIX}*"
    here = list(package.glob(every))
    built_for = {path.parent.name.removeprefix("torch-") for path in cache.parent.glob(f"*/{every}")}
    torches = {version.replace("-cuda-", " with CUDA ") for version in built_for}
    torches |= {places.torch_of(path) for path in here if not torch.__version__.startswith(f"{places.torch_of(path)}.")}
    if torches:
        return f"is built for torch {', '.join(sorted(torches))}, but torch {torch.__version__} is running"
    if here or any(places.cache_root().glob(f"*/*/*/{every}")):
        return "is built for another Python, or of other sources than this bsam_fused has"
    left_out = places.left_out(package).extension
    return f"is not built ({left_out}, when bsam_fused was installed)" if left_out else "is not built"


def _mend(obstacle: obstacles.Obstacle | None, told: str, failed: bool = False) -> str:
    """Return the way out: the command, and what comes before it where something is in its way, or was.

    Args:
        obstacle: what is in its way now.
        told: the reason that was told already, which may be the same.
        failed: whether the last build failed.
    """
    if obstacle is None:
        return f"{'once that is mended, ' if failed else ''}run: {places.COMMAND}"
    before = obstacle.mend if obstacle.why in told else str(obstacle)
    return f"{before}, then run: {places.COMMAND}" if obstacle.mend else obstacle.why


@functools.cache
def why_no_cuda(device: torch.device) -> str:
    """Return why the CUDA kernels cannot run on a CUDA device, "" if they can; the only device that it uses."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    module, reason = load()
    if module is None:
        return reason
    if not hasattr(module, "CudaFlatParams"):
        why = places.left_out(Path(str(module.__file__)).parent).cuda
        return f"the C++ extension is built without CUDA kernels ({why}); {_mend_cuda(str(why))}"
    with torch.cuda.device(device):  # torch's, which leaves no context on the device that it comes back to
        obstacle = module.cuda_obstacle()
    if obstacle:
        return f"the CUDA kernels do not run on {torch.cuda.get_device_name(device)} ({obstacle}); {_mend_cuda('')}"
    return ""


def _mend_cuda(told: str) -> str:
    toolkit = obstacles.find_toolkit()
    return _mend(toolkit if isinstance(toolkit, obstacles.Obstacle) else obstacles.cpu_obstacle(), told)


def cpu_flat_params(
    params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None, exempt: bool
) -> contract.FlatParams:
    """Return the compiled FlatParams over ``params`` on the CPU.

    Raises:
        RuntimeError: the extension cannot be used here, with the reason.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    return module.CpuFlatParams(list(params), list(places), seed, exempt)


def cuda_flat_params(
    params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None, exempt: bool
) -> contract.FlatParams:
    """Return the compiled FlatParams over ``params`` on a CUDA device.

    Raises:
        RuntimeError: the CUDA kernels cannot run here, with the reason.
    """
    module, reason = load()[0], why_no_cuda(params[0].device)
    if module is None or reason:
        raise RuntimeError(reason)
    return module.CudaFlatParams(list(params), list(places), seed, exempt)


def is_compiled(flat: contract.FlatParams) -> bool:
    """Return whether the compiled module runs ``flat``."""
    module, _ = load()
    return module is not None and isinstance(flat, module.FlatParams)


def update_together(
    operator: str, flats: Sequence[tuple[contract.FlatParams, Tensor]], how: Sequence[Any]
) -> Callable[[], None]:
    """Return the one call that updates compiled FlatParams: all of them or, where it raises, none.

    Args:
        operator: "update_sgd" or "update_adam".
        flats: each with its sums.
        how: the update's other arguments.
    """
    module, _ = load()
    natives, sums = [flat for flat, _ in flats], [sums for _, sums in flats]
    return partial(getattr(module, operator), natives, sums, *how)
