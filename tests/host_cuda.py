"""The CUDA backend on the host: csrc/cuda.cu compiled as C++ against tests/shim, for tests without a GPU."""

import functools
import os
import sys
from pathlib import Path

from torch.utils import cpp_extension

from bsam_fused.extension import compiling
from bsam_fused.ops import dispatch

ROOT = Path(__file__).parents[1]


@functools.cache
def module():
    """Return the extension with `CudaFlatParams` over CPU tensors; builds it the first time (about a minute)."""
    build = ROOT / "build" / "host_cuda"
    build.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja's
    sources = [path for path in compiling.sources(with_cuda=True) if path.suffix == ".cpp"]
    return cpp_extension.load(
        "bsam_fused_host_cuda",
        [*map(str, sources), str(ROOT / "tests" / "shim" / "cuda.cpp")],
        extra_include_paths=[str(ROOT / "tests" / "shim")],
        extra_cflags=[
            *("-O2", "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp", "-Wno-unknown-pragmas"),
            "-DBSAM_FUSED_CUDA",
        ],
        build_directory=str(build),
    )


def flat_params(params, places, seed, exempt):
    return module().CudaFlatParams(list(params), list(places), seed, exempt)


def stand_in(monkeypatch):
    """Have it be the backend "cuda", on CPU tensors."""
    unavailable = dispatch.unavailable
    monkeypatch.setitem(dispatch._FACTORIES, "cuda", flat_params)
    monkeypatch.setattr(
        dispatch, "unavailable", lambda name, device: None if name == "cuda" else unavailable(name, device)
    )
