"""Builds the C++ extension where it can be built. BSAM_FUSED_BUILD=none|cpu|cuda|auto decides by hand.

auto (the default) builds what this machine can, with CUDA kernels, without them, or else the pure-Python package,
which works, and which `bsam-fused build` adds them to; the others fail with the reason where they cannot have their
way. Only torch, and torch only while building. No GPU is needed for any of it.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from bsam_fused.extension import compiling, obstacles, places  # noqa: E402

NOT_BUILT = {"none": "pure-Python package, no C++ extension", "cpu": "C++ extension without CUDA kernels"}


def requested() -> str:
    """Return the build asked for by BSAM_FUSED_BUILD."""
    build = os.environ.get("BSAM_FUSED_BUILD", "auto")
    if build not in {"none", "cpu", "cuda", "auto"}:
        raise SystemExit(f"BSAM_FUSED_BUILD={build}: must be none, cpu, cuda or auto")
    return build


def decide(build: str) -> tuple[str, obstacles.Obstacle | None]:
    """Return what to build (none, cpu or cuda), and what keeps more of it from being built, None if nothing."""
    asked_for = obstacles.Obstacle(f"BSAM_FUSED_BUILD={build}")
    if build == "none":
        return "none", asked_for
    obstacle = obstacles.cpu_obstacle()
    if obstacle:
        return "none", obstacle
    if build == "cpu":
        return "cpu", asked_for
    toolkit = obstacles.find_toolkit()
    if isinstance(toolkit, obstacles.Obstacle):
        return "cpu" if build == "auto" else "none", toolkit
    return "cuda", None


BUILD = requested()
KIND, OBSTACLE = decide(BUILD)


def left_out() -> places.LeftOut:
    """Return what this build leaves out, and why."""
    why = OBSTACLE.why if OBSTACLE else None
    return places.LeftOut(extension=why) if KIND == "none" else places.LeftOut(cuda=why)


def refuse() -> None:
    """Raise where what was asked for cannot be built."""
    if BUILD not in {KIND, "auto"}:
        raise SystemExit(f"BSAM_FUSED_BUILD={BUILD}: {OBSTACLE}")


def say(text: str) -> None:
    """Print a line of ours among setuptools' own."""
    print(f"bsam_fused: {text}", file=sys.stderr, flush=True)


def forget_other_sources(package: Path, built: str) -> None:
    """Delete libraries for the same torch and Python as the one that was built, of sources as they were before."""
    for library in package.glob(built.replace(places.digest(), "*")):
        if library.name != built:
            library.unlink()


class BuildPy(build_py):
    """The step that every installation runs."""

    def run(self) -> None:
        """Build the Python part, with the extension's sources for `bsam-fused build`."""
        refuse()
        if BUILD == "auto" and OBSTACLE:
            say(f"{NOT_BUILT[KIND]}: {OBSTACLE}")
        super().run()
        package = ROOT / "bsam_fused" if self.editable_mode else Path(self.build_lib, "bsam_fused")
        if not self.editable_mode:
            shutil.rmtree(package / "csrc", ignore_errors=True)  # of an earlier build
            shutil.copytree(ROOT / "csrc", package / "csrc")
        left_out().write(package)


class BuildExt(build_ext):
    """Compiles with the package's own compiling.py; in auto a failing compiler is no failure."""

    def run(self) -> None:
        """Build the extension, where there is one to build."""
        refuse()
        self.left_out = left_out()
        super().run()
        package = ROOT / "bsam_fused" if self.inplace else Path(self.build_lib, "bsam_fused")
        self.left_out.write(package)
        for extension in self.extensions:
            forget_other_sources(package, Path(self.get_ext_filename(extension.name)).name)

    def build_extensions(self) -> None:
        """Build with CUDA kernels, without them, or nothing."""
        library, objects = Path(self.get_ext_fullpath(self.extensions[0].name)), Path(self.build_temp)
        for kind in ("cuda", "cpu") if KIND == "cuda" else ("cpu",):
            try:
                return compiling.build(library, objects, cuda() if kind == "cuda" else None, say)
            except compiling.BuildError as error:
                if BUILD != "auto":
                    raise SystemExit(f"BSAM_FUSED_BUILD={BUILD}: {error}; log: {objects / places.LOG}") from error
                say(f"the {kind} build failed, going on without: {error}; log: {objects / places.LOG}")
                part = "cuda" if kind == "cuda" else "extension"
                self.left_out = self.left_out._replace(**{part: f"compiling failed: {error}"})
        self.extensions = []


def cuda() -> compiling.Cuda:
    """Return what to build the CUDA kernels with, which `decide` has found to be there."""
    toolkit = obstacles.find_toolkit()
    return compiling.Cuda(toolkit, compiling.architectures(toolkit))


def extensions() -> list[Extension]:
    """Return the extension, by name alone."""
    if KIND == "none":
        return []
    import torch

    return [Extension(f"bsam_fused.{places.module_name(torch.__version__)}", sources=[])]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
