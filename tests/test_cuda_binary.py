"""What nvcc makes of csrc/cuda.cu: each kernel's registers, and how it moves its data. Needs nvcc, and no GPU."""

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import processes
import pytest

from bsam_fused.extension.flags import NVCC_FLAGS

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda.cu"
NVCC = shutil.which("nvcc")
FLAGS = [*NVCC_FLAGS, "-Xptxas=-v", "-cubin"]  # what a build has, and the report
ARCHITECTURES = ["sm_80", "sm_90"]
DTYPES = ["float", "double", "BFloat16", "Float16"]
# How many 16-byte vectors a kernel reads and writes for each one of a parameter. A branch with accesses of its own
# (what is not perturbed, or a skipped update) counts beside the others.
VECTORS = {
    "SquareNorm": (2, 0),  # g, w where adaptive
    "DirectionSums": (2, 0),  # g + g_max, g_min
    "Ascend": (2, 3),  # w, g -> saved, w, g where copied
    "Descend": (3, 3),  # saved, g, g_max -> w, g; or g
    "Direction": (2, 1),  # g + g_max, g_min -> g
    "Restore": (1, 1),  # saved -> w
    "Step<SgdBase>": (5, 3),  # w, g + g_max, g_min, m -> w, m; or saved -> w
    "Step<AdamBase>": (6, 4),  # w, g + g_max, g_min, m, v -> w, m, v; or saved -> w
}
MASTER_VECTORS = (2, 2)  # more, of an update of 16 bits: float32 master weights are twice as long

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc, of the CUDA toolkit, is not on PATH")


class Kernel(NamedTuple):
    """A kernel as compiled; `name` is its operator, dtype and most tensors in a launch, or a plain name."""

    name: tuple[str, ...]
    stack: int
    spilled: int
    instructions: Counter

    def count(self, pattern):
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def tool(name):
    """The path of a disassembler: of the toolkit, which may leave them out, or of the triton wheel."""
    triton = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or triton


def read_name(mangled):
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"(\w+|\(anonymous namespace\))::", "", text)
    arguments = re.match(r"void kernel<(.+), (\w+), (\d+)>\(", text)
    return arguments.groups() if arguments else (text.partition("(")[0],)


def instructions(cubin):
    """How many of each instruction every kernel has, by mangled name."""
    text = subprocess.run([tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = (part.partition("\n") for part in text.split("Function : ")[1:])
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", re.MULTILINE)
    return {name: Counter(line.findall(body)) for name, _, body in functions}


PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*\n.*\n"
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The kernels of each architecture, compiled at the same time."""
    folder = tmp_path_factory.mktemp("cubin")
    cubins = {architecture: folder / f"{architecture}.cubin" for architecture in ARCHITECTURES}
    kernels, pipe = {}, {"stderr": subprocess.PIPE, "text": True}
    with ExitStack() as running:
        commands = ([NVCC, *FLAGS, f"-arch={each}", "-o", cubin, SOURCE] for each, cubin in cubins.items())
        runs = [running.enter_context(processes.started(command, **pipe)) for command in commands]
        reports = [run.communicate(timeout=900)[1] for run in runs]
    for run, report, (architecture, cubin) in zip(runs, reports, cubins.items()):
        assert run.returncode == 0, report
        code = instructions(cubin)
        kernels[architecture] = [
            Kernel(read_name(name), int(stack), int(stores) + int(loads), code.pop(name))
            for name, stack, stores, loads in PTXAS.findall(report)
        ]
        assert not code, "ptxas reports every kernel that there is"
    return kernels


@pytest.fixture(params=ARCHITECTURES)
def kernels(request, compiled):
    return compiled[request.param]


def test_every_kernel_is_there(kernels):
    elementwise = {kernel.name for kernel in kernels if len(kernel.name) == 3}
    capacities = {capacity for _, _, capacity in elementwise}
    assert len(capacities) == 2  # few tensors, and as many as the parameters of a kernel hold
    assert elementwise == set(itertools.product(VECTORS, DTYPES, capacities))
    assert {kernel.name for kernel in kernels} - elementwise == {("write_words",)}


def test_nothing_spills(kernels):
    assert [kernel.name for kernel in kernels if kernel.stack or kernel.spilled] == []
    assert [kernel.name for kernel in kernels if kernel.count("LDL|STL")] == []


def test_every_operand_moves_in_128_bit_accesses(kernels):
    """As many vectors as are read are written: a compiler that takes a store apart is seen, too."""
    broken = {}
    for kernel in kernels:
        if kernel.name[0] not in VECTORS:
            continue
        read, written = VECTORS[kernel.name[0]]
        if kernel.name[0].startswith("Step") and kernel.name[1] in {"BFloat16", "Float16"}:
            read, written = read + MASTER_VECTORS[0], written + MASTER_VECTORS[1]
        loads, stores = kernel.count(r"LDG\.\S*\b128\b"), kernel.count(r"STG\.\S*\b128\b")
        if loads < read or loads % read or stores * read != loads * written:
            broken[kernel.name] = f"{loads} loads, {stores} stores"
    assert not broken, broken
