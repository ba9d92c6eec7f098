"""Builds the C++ extension where it can be built. BSAM_FUSED_BUILD=none|cpu|cuda|auto decides by hand.

auto (the default) builds what this machine can and else installs the pure-Python package, which works;
the others fail with the reason where they cannot have their way. Only torch, and torch only while building.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h"))
GIB_A_JOB = 2.0  # what compiling one file against torch's headers takes at the most
TORCH_HINT = "install torch first, then: pip install --no-build-isolation ."


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
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing: install Python's headers (Debian, Ubuntu: apt install python3-dev)"
    return None


def cuda_obstacle() -> str | None:
    """Return what keeps the CUDA kernels from being built here, None where nothing does."""
    if not (ROOT / "csrc" / "cuda.cu").exists():
        return "this version of bsam_fused has no CUDA kernels (csrc/cuda.cu) yet"
    return cpu_obstacle()


def requested() -> str:
    """Return the build asked for by BSAM_FUSED_BUILD."""
    build = os.environ.get("BSAM_FUSED_BUILD", "auto")
    if build not in {"none", "cpu", "cuda", "auto"}:
        raise SystemExit(f"BSAM_FUSED_BUILD={build}: must be none, cpu, cuda or auto")
    return build


BUILD = requested()
OBSTACLE = cuda_obstacle() if BUILD == "cuda" else cpu_obstacle() if BUILD != "none" else "not asked for"


def jobs() -> int:
    """Return how many files to compile at once: the CPUs, as far as free memory carries them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cpus
    return max(1, min(cpus, int(free / GIB_A_JOB)))


def extension() -> Extension:
    """Return the extension, its name made of the torch version that it is compiled for.

    A binary for another torch is then never loaded, and can be told from a missing one (ops/native_flat.py).
    """
    major, minor = torch_version().split("+")[0].split(".")[:2]
    version: dict[str, str] = {}
    exec((ROOT / "bsam_fused" / "_version.py").read_text(), version)
    flags = [
        "-O3",
        "-g0",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
    ]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # at::parallel_for's pragma; the runtime is the one torch has loaded
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        f"bsam_fused._native_torch{major}_{minor}",
        SOURCES,
        depends=HEADERS,
        extra_compile_args={"cxx": flags},
        define_macros=[("BSAM_FUSED_VERSION", f'"{version["__version__"]}"')],
    )


class BuildPy(build_py):
    """The step that every installation runs: refuses what was asked for and cannot be built."""

    def run(self) -> None:
        """Build the Python part."""
        if BUILD in {"cpu", "cuda"} and OBSTACLE:
            raise SystemExit(f"BSAM_FUSED_BUILD={BUILD}: {OBSTACLE}")
        if BUILD == "auto" and OBSTACLE:
            print(f"bsam_fused: pure-Python package, no C++ extension: {OBSTACLE}", file=sys.stderr)
        super().run()


def build_ext_command() -> type[build_ext]:
    """Return torch's build command, with capped jobs; in auto a failing compiler is no failure."""
    if OBSTACLE:
        return build_ext
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def run(self) -> None:
            os.environ.setdefault("MAX_JOBS", str(jobs()))
            try:
                super().run()
            except Exception as error:
                if BUILD != "auto":
                    raise
                print(f"bsam_fused: the C++ extension did not build, going on without: {error}", file=sys.stderr)
                self.extensions = []

    return BuildExt


setup(
    ext_modules=[] if OBSTACLE else [extension()],
    cmdclass={"build_py": BuildPy, "build_ext": build_ext_command()},
)
