"""Builds the C++ extension where it can be built. BSAM_FUSED_BUILD=none|cpu|cuda|auto decides by hand.

auto (the default) builds what this machine can, with CUDA kernels, without them, or else the pure-Python package,
which works; the others fail with the reason where they cannot have their way. Only torch, and torch only while
building. No GPU is needed for any of it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir() if path.suffix in {".h", ".cuh"})
GIB_A_JOB = 2.0  # what compiling one file against torch's headers takes at the most; cuda.cu takes less
TORCH_HINT = "install torch first, then: pip install --no-build-isolation ."
CUDA_TORCH_HINT = "install a CUDA build of it (https://pytorch.org/get-started)"
LEFT_OUT = {"none": "pure-Python package, no C++ extension", "cpu": "C++ extension without CUDA kernels"}

CXX_FLAGS = [
    "-O3",
    "-g0",
    "-ffp-contract=off",  # math.h says which multiply-adds are fused
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
if sys.platform == "linux":
    CXX_FLAGS.append("-fopenmp")  # at::parallel_for's pragma; the runtime is the one torch has loaded
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",  # whatever torch's own: cuda.cu includes none of its headers
    "-fmad=false",  # nvcc's -ffp-contract=off
    "--threads=2",  # architectures are compiled side by side
    "-Xcompiler=-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]


# ---- what can be built here


def torch_version() -> str | None:
    """Return the version of the torch that this build can see, None without one."""
    try:
        import torch
    except ImportError:
        return None
    return torch.__version__


def cpu_obstacle() -> str | None:
    """Return what keeps the CPU extension from being built here, None where nothing does."""
    if sys.platform == "win32":
        return "building on Windows is not supported yet"
    if torch_version() is None:
        return f"torch cannot be imported in this build (pip's isolated build has none): {TORCH_HINT}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on PATH: install one (Debian, Ubuntu: apt install g++) or set CXX"
    places = [sysconfig.get_path("include"), *os.environ.get("CPATH", "").split(os.pathsep)]
    if not any(Path(place, "Python.h").exists() for place in places if place):
        return "Python.h is missing: install Python's headers (Debian, Ubuntu: apt install python3-dev)"
    return None


def cuda_obstacle() -> str | None:
    """Return what keeps CUDA kernels out of an extension that can be built, None where nothing does."""
    import torch

    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for ROCm, and the kernels are written for CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: {CUDA_TORCH_HINT}"
    from torch.utils.cpp_extension import CUDA_HOME

    return toolkit_obstacle(CUDA_HOME, torch.version.cuda)


def toolkit_obstacle(home: str | None, cuda: str) -> str | None:
    """Return why the toolkit in `home` (CUDA_HOME) cannot build for a torch of this CUDA version, None if it can."""
    if home is None or not Path(home, "bin", "nvcc").exists():
        where = "" if home is None else f" in {home}/bin"
        return f"no nvcc{where}: install the CUDA {cuda} toolkit, or set CUDA_HOME to its folder"
    # An nvcc on PATH may be a script that calls the toolkit's, with no headers beside it; conda has its in targets/.
    headers = ("include/cuda_runtime.h", "targets/*/include/cuda_runtime.h")
    if not any(any(Path(home).glob(header)) for header in headers):
        return f"no cuda_runtime.h under {home}: set CUDA_HOME to the folder of the CUDA {cuda} toolkit"
    release = ask_nvcc(home, "--version").partition("release ")[2].partition(",")[0]
    if release.split(".")[0] != cuda.split(".")[0]:
        return f"nvcc in {home}/bin is of CUDA {release}, torch of CUDA {cuda}: set CUDA_HOME to a toolkit like torch's"
    return None


def ask_nvcc(home: str, option: str) -> str:
    """Return what nvcc prints when called with one option."""
    return subprocess.run([f"{home}/bin/nvcc", option], capture_output=True, text=True, check=True).stdout


# ---- what is built


def requested() -> str:
    """Return the build asked for by BSAM_FUSED_BUILD."""
    build = os.environ.get("BSAM_FUSED_BUILD", "auto")
    if build not in {"none", "cpu", "cuda", "auto"}:
        raise SystemExit(f"BSAM_FUSED_BUILD={build}: must be none, cpu, cuda or auto")
    return build


def decide(build: str) -> tuple[str, str | None]:
    """Return what to build (none, cpu or cuda), and what keeps more of `build` from being built, None if nothing."""
    if build == "none":
        return "none", None
    obstacle = cpu_obstacle()
    if obstacle or build == "cpu":
        return "none" if obstacle else "cpu", obstacle
    obstacle = cuda_obstacle()
    if obstacle:
        return "cpu" if build == "auto" else "none", obstacle
    return "cuda", None


BUILD = requested()
KIND, OBSTACLE = decide(BUILD)


def jobs() -> int:
    """Return how many files to compile at once: the CPUs, as far as free memory carries them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cpus
    return max(1, min(cpus, int(free / GIB_A_JOB)))


def sources(kind: str) -> list[str]:
    """Return the files to compile: those named cuda* only with CUDA, whose headers they include."""
    files = [path for path in (ROOT / "csrc").iterdir() if path.suffix in {".cpp", ".cu"}]
    return sorted(str(path.relative_to(ROOT)) for path in files if kind == "cuda" or not path.name.startswith("cuda"))


def architecture_flags(supported: str) -> list[str]:
    """Return nvcc's flags for compute capabilities 8.0, 9.0 and 10.0, and PTX of the last for later ones.

    `supported`, what ``nvcc --list-gpu-code`` prints, limits them: 10.0 came with CUDA 12.8.
    """
    known = [sm for sm in ("80", "90", "100") if f"sm_{sm}" in supported.split()]
    targets = [*(f"compute_{sm},code=sm_{sm}" for sm in known), f"compute_{known[-1]},code=compute_{known[-1]}"]
    return [f"-gencode=arch={target}" for target in targets]


def nvcc_flags() -> list[str]:
    """Return NVCC_FLAGS with the architectures; torch adds those of TORCH_CUDA_ARCH_LIST, where that is set."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return NVCC_FLAGS
    from torch.utils.cpp_extension import CUDA_HOME

    return NVCC_FLAGS + architecture_flags(ask_nvcc(CUDA_HOME, "--list-gpu-code"))


def extension(kind: str) -> Extension:
    """Return the extension, cpu or cuda, its name made of the torch version that it is compiled for.

    A binary for another torch is then never loaded, and can be told from a missing one (ops/native_flat.py).
    """
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    major, minor = torch_version().split("+")[0].split(".")[:2]
    version: dict[str, str] = {}
    exec((ROOT / "bsam_fused" / "_version.py").read_text(), version)
    options = {
        "name": f"bsam_fused._native_torch{major}_{minor}",
        "sources": sources(kind),
        "depends": HEADERS,
        "define_macros": [("BSAM_FUSED_VERSION", f'"{version["__version__"]}"')],
    }
    if kind == "cpu":
        return CppExtension(**options, extra_compile_args={"cxx": CXX_FLAGS})
    options["define_macros"].append(("BSAM_FUSED_CUDA", None))
    return CUDAExtension(**options, extra_compile_args={"cxx": CXX_FLAGS, "nvcc": nvcc_flags()})


# ---- the commands


def refuse() -> None:
    """Raise where what was asked for cannot be built."""
    if OBSTACLE and BUILD != "auto":
        raise SystemExit(f"BSAM_FUSED_BUILD={BUILD}: {OBSTACLE}")


class BuildPy(build_py):
    """The step that every installation runs."""

    def run(self) -> None:
        """Build the Python part."""
        refuse()
        if OBSTACLE:
            print(f"bsam_fused: {LEFT_OUT[KIND]}: {OBSTACLE}", file=sys.stderr)
        super().run()


class NoExtension(build_ext):
    """Where there is no extension to build."""

    def run(self) -> None:
        """Build nothing."""
        refuse()


def build_ext_command() -> type[build_ext]:
    """Return torch's build command, with capped jobs; in auto a failing compiler is no failure."""
    if KIND == "none":
        return NoExtension
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def build_extensions(self) -> None:
            os.environ.setdefault("MAX_JOBS", str(jobs()))
            for kind in ("cuda", "cpu") if KIND == "cuda" else ("cpu",):
                vars(self.extensions[0]).update(vars(extension(kind)))
                try:
                    return super().build_extensions()
                except Exception as error:
                    if BUILD != "auto":
                        raise
                    print(f"bsam_fused: the {kind} build failed, going on without: {error}", file=sys.stderr)
            self.extensions = []

    return BuildExt


if __name__ == "__main__":
    setup(
        ext_modules=[] if KIND == "none" else [extension(KIND)],
        cmdclass={"build_py": BuildPy, "build_ext": build_ext_command()},
    )
