"""Compiles csrc/, for setup.py and `bsam-fused build` alike. Needs no ninja and no setuptools."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from bsam_fused.extension import places
from bsam_fused.extension.flags import CXX_FLAGS, LINK_FLAGS, NVCC_FLAGS
from bsam_fused.extension.obstacles import ask_nvcc, compiler, compiler_itself, cuda_headers

GIB_A_JOB = 2.0
"""What compiling one file against torch's headers takes at the most; cuda.cu takes less."""
WITH_TORCH = "with_torch.cpp"
"""The one file that reads torch's headers, which takes longer than to compile what comes after them."""
ARCHITECTURES_VARIABLE = "TORCH_CUDA_ARCH_LIST"


class BuildError(RuntimeError):
    """A command failed; the message is its first error."""


@dataclass(frozen=True)
class Cuda:
    """What the CUDA kernels are built with."""

    toolkit: Path
    architectures: Sequence[str]
    """Compute capabilities, such as "9.0"; with "+PTX" also code that later GPUs compile for themselves."""


# ---- what is compiled


def sources(with_cuda: bool) -> list[Path]:
    """Return the files to compile: those named cuda* only with CUDA, and none that is a part of `WITH_TORCH`."""
    folder = places.sources_folder()
    parts = re.findall(r'^#include "(.+\.cpp)"', (folder / WITH_TORCH).read_text(encoding="utf-8"), re.MULTILINE)
    files = [path for path in folder.iterdir() if path.suffix in {".cpp", ".cu"} and path.name not in parts]
    return sorted(path for path in files if with_cuda or not path.name.startswith("cuda"))


def architectures(toolkit: Path) -> list[str]:
    """Return those of TORCH_CUDA_ARCH_LIST, else 8.0, 9.0 and 10.0 as far as nvcc knows them, PTX of the last.

    Raises:
        ValueError: the list has something else than compute capabilities, or nvcc knows none of these.
    """
    wanted = os.environ.get(ARCHITECTURES_VARIABLE, "").replace(";", " ").split()
    for architecture in wanted:
        if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", architecture):
            raise ValueError(
                f"{ARCHITECTURES_VARIABLE}: {architecture} is no compute capability such as 9.0 or 9.0+PTX"
            )
    if wanted:
        return wanted
    known = [number for number in ("8.0", "9.0", "10.0") if _knows(toolkit, number)]
    if not known:
        raise ValueError(f"{toolkit}/bin/nvcc knows neither 8.0, 9.0 nor 10.0: name others in {ARCHITECTURES_VARIABLE}")
    return [*known[:-1], f"{known[-1]}+PTX"]


def architectures_of(toolkit: Path, capabilities: Sequence[tuple[int, int]]) -> list[str]:
    """Return the architectures for GPUs of these compute capabilities alone; all, where nvcc is older than one."""
    wanted = sorted({f"{major}.{minor}" for major, minor in capabilities})
    return wanted if wanted and all(_knows(toolkit, number) for number in wanted) else architectures(toolkit)


def _knows(toolkit: Path, number: str) -> bool:
    return f"sm_{number.replace('.', '')}" in ask_nvcc(toolkit, "--list-gpu-code").split()


def architecture_flags(wanted: Sequence[str]) -> list[str]:
    """Return nvcc's flags for these architectures."""
    flags = []
    for architecture in wanted:
        number = architecture.removesuffix("+PTX").replace(".", "")
        codes = ["sm", "compute"] if architecture.endswith("+PTX") else ["sm"]
        flags += [f"-gencode=arch=compute_{number},code={code}_{number}" for code in codes]
    return flags


# ---- the commands


def cxx_command(source: Path, compiled: Path, cuda: Cuda | None) -> list[str]:
    """Return the command that compiles a C++ file."""
    import torch

    torch_headers = Path(torch.__file__).with_name("include")
    headers = [torch_headers, torch_headers / "torch" / "csrc" / "api" / "include"]
    headers += cuda_headers(cuda.toolkit)[:1] if cuda else []
    macros = {
        "TORCH_EXTENSION_NAME": places.module_name(torch.__version__),
        "_GLIBCXX_USE_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
        **({"BSAM_FUSED_CUDA": 1} if cuda else {}),
    }
    return [
        *compiler(),
        *CXX_FLAGS,
        f"-std={_torchs_standard()}",
        *(f"-D{name}={value}" for name, value in macros.items()),
        *(f"-isystem{folder}" for folder in headers if folder != Path("/usr/include")),  # gcc minds its place
        f"-ffile-prefix-map={torch_headers}=torch",  # which the headers' errors name: else this machine's own folders
        f"-I{sysconfig.get_path('include')}",
        *("-c", str(source), "-o", str(compiled)),
    ]


def _torchs_standard() -> str:
    """Return the C++ standard that torch's headers need, as its own builder has it, which imports setuptools."""
    import torch

    text = Path(torch.__file__).with_name("utils").joinpath("cpp_extension.py").read_text()
    return re.findall(r"-std=(c\+\+\d+)", text)[0]


def nvcc_command(source: Path, compiled: Path, cuda: Cuda) -> list[str]:
    """Return the command that compiles CUDA kernels."""
    flags = [*NVCC_FLAGS, *architecture_flags(cuda.architectures), f"-ccbin={compiler_itself()}"]
    return [str(cuda.toolkit / "bin" / "nvcc"), *flags, "-c", str(source), "-o", str(compiled)]


def link_command(compiled: Sequence[Path], library: Path, cuda: Cuda | None) -> list[str]:
    """Return the command that makes the library."""
    import torch

    names = ["c10", "torch_cpu", "torch", "torch_python", *(("c10_cuda", "torch_cuda") if cuda else ())]
    folder = Path(torch.__file__).with_name("lib")
    runtime = [str(path) for path in _cuda_runtime(cuda.toolkit)] if cuda else []
    links = [f"-L{folder}", *(f"-l{name}" for name in names), *runtime]
    return [*compiler(), *LINK_FLAGS, *map(str, compiled), *links, "-o", str(library)]


def _cuda_runtime(toolkit: Path) -> list[Path]:
    """Return CUDA's runtime library; pip's packages have it under its full name alone."""
    return [path for name in ("lib64", "lib", "targets/*/lib") for path in toolkit.glob(f"{name}/libcudart.so*")][:1]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def jobs() -> int:
    """Return how many files to compile at once: MAX_JOBS, else the CPUs, as far as free memory carries them.

    Raises:
        ValueError: MAX_JOBS is no such number.
    """
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"MAX_JOBS={asked}: must be a number of files to compile side by side, 1 or more")
        return int(asked)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cores()
    return max(1, min(cores(), int(free / GIB_A_JOB)))


# ---- the build


def build(library: Path, objects: Path, cuda: Cuda | None, tell: Callable[[str], None]) -> None:
    """Compile and link.

    Args:
        library: the file to make.
        objects: a folder for what is compiled, and for the log of all commands.
        cuda: with what to build CUDA kernels; None: without them.
        tell: is told of every file.

    Raises:
        BuildError: a command failed.
    """
    objects.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    log = objects / places.LOG
    log.write_text("")
    commands = _commands(objects, cuda)
    executor = ThreadPoolExecutor(jobs())
    try:
        runs = {executor.submit(_run, command, log): source for source, command in commands.items()}
        for number, run in enumerate(as_completed(runs), 1):
            tell(f"{number:>3}/{len(runs)}  {run.result():4.0f} s  {runs[run].name}")
    finally:
        executor.shutdown(cancel_futures=True)
    _run(link_command([_compiled(objects, source) for source in sorted(commands)], library, cuda), log)


def _commands(objects: Path, cuda: Cuda | None) -> dict[Path, list[str]]:
    """Return the command of each source, those that take longest first."""
    longest_first = sorted(sources(cuda is not None), key=lambda path: (path.suffix != ".cu", path.name != WITH_TORCH))
    return {
        source: nvcc_command(source, _compiled(objects, source), cuda)
        if cuda and source.suffix == ".cu"
        else cxx_command(source, _compiled(objects, source), cuda)
        for source in longest_first
    }


def _compiled(objects: Path, source: Path) -> Path:
    return objects / f"{source.name}.o"


def _run(command: list[str], log: Path) -> float:
    """Run a command; return the seconds that it took."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildError(str(error)) from error
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n{done.stdout}\n")
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        raise BuildError(errors[0].strip() if errors else f"{command[0]} ended with status {done.returncode}")
    return time.monotonic() - start
