"""The compiled module: where it is, and if it cannot be used, why and what adds it."""

from __future__ import annotations

import functools
import importlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bsam_fused._version import __version__
from bsam_fused.ops import contract

COMMAND = "pip install --no-build-isolation --no-deps --force-reinstall ."
"""Builds the extension, in the source directory, for the torch that is installed."""


def module_name() -> str:
    """Return the extension's name for the running torch; setup.py names what it builds likewise."""
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return f"_native_torch{major}_{minor}"


def _why_missing(package: Path) -> str:
    others = sorted({path.name.split(".")[0] for path in package.glob("_native_torch*")} - {module_name()})
    if others:
        built = ", ".join(name.removeprefix("_native_torch").replace("_", ".") for name in others)
        return f"built for torch {built}, but torch {torch.__version__} is running"
    if next(package.glob("_native_torch*"), None) is not None:
        return "built for another Python"
    if shutil.which("c++") is None:
        return "not built, and no C++ compiler is on PATH (Debian, Ubuntu: apt install g++)"
    return "not built (pip's isolated build sees no torch; or BSAM_FUSED_BUILD=none)"


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """Return the compiled module and "", or None and the reason with the command that mends it."""
    package = Path(__file__).parents[1]
    mend = f"in bsam_fused's source directory: {COMMAND}"
    try:
        module = importlib.import_module(f"bsam_fused.{module_name()}")
    except ModuleNotFoundError:
        return None, f"the C++ extension is {_why_missing(package)}; {mend}"
    except ImportError as error:
        return None, f"the C++ extension does not load ({error}); rebuild it, {mend}"
    if module.version != __version__:
        return (
            None,
            f"the C++ extension is of bsam_fused {module.version}, not {__version__}; rebuild it, {mend}",
        )
    return module, ""


@functools.cache
def why_no_cuda(device: torch.device) -> str:
    """Return why the CUDA kernels cannot run on a CUDA device, "" if they can; the only device that it uses."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    module, reason = load()
    if module is None:
        return reason
    if not hasattr(module, "CudaFlatParams"):
        return (
            "the C++ extension is built without CUDA kernels; with nvcc on PATH, in bsam_fused's source directory: "
            f"BSAM_FUSED_BUILD=cuda {COMMAND}"
        )
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    with torch.cuda.device(device):  # torch's, which leaves no context on the device that it comes back to
        obstacle = module.cuda_obstacle()
    if obstacle:
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"the CUDA kernels do not run on {torch.cuda.get_device_name(device)} ({obstacle}); in bsam_fused's source "
            f"directory: TORCH_CUDA_ARCH_LIST={major}.{minor} BSAM_FUSED_BUILD=cuda {COMMAND}"
        )
    return ""


def cpu_flat_params(
    params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None
) -> contract.FlatParams:
    """Return the compiled FlatParams over ``params`` on the CPU.

    Raises:
        RuntimeError: the extension cannot be used here, with the reason.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(reason)
    return module.CpuFlatParams(list(params), list(places), seed)


def cuda_flat_params(
    params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None
) -> contract.FlatParams:
    """Return the compiled FlatParams over ``params`` on a CUDA device.

    Raises:
        RuntimeError: the CUDA kernels cannot run here, with the reason.
    """
    module, reason = load()[0], why_no_cuda(params[0].device)
    if module is None or reason:
        raise RuntimeError(reason)
    return module.CudaFlatParams(list(params), list(places), seed)


def is_compiled(flat: contract.FlatParams) -> bool:
    """Return whether the compiled module runs ``flat``."""
    module, _ = load()
    return module is not None and isinstance(_over_shards(flat), module.FlatParams)


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
    natives, sums = [_over_shards(flat) for flat, _ in flats], [sums for _, sums in flats]
    return partial(getattr(module, operator), natives, sums, *how)


def _over_shards(flat: Any) -> Any:
    return getattr(flat, "over_shards", flat)
