"""What nvcc makes of csrc/cuda.cu: registers, data moved, the path of a whole chunk. Needs nvcc, and no GPU."""

import importlib.util
import itertools
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import processes
import pytest
import sass

from bsam_fused.extension.flags import NVCC_FLAGS

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda.cu"
NVCC = shutil.which("nvcc")
FLAGS = [*NVCC_FLAGS, "-Xptxas=-v", "-cubin"]  # what a build has, and the report
ARCHITECTURES = ["sm_80", "sm_90"]
SLOWER = ["sm_100"]  # with --whole
DTYPES = ["float", "double", "BFloat16", "Float16"]
NARROW = {"BFloat16", "Float16"}  # what alone is rounded stochastically, and has master weights
# How many vectors of a thread a kernel reads and writes in a whole chunk. A branch with accesses of its own (what is
# not perturbed, or a skipped update) counts beside the others.
VECTORS = {
    "SquareNorm": (2, 0),  # g, w where adaptive
    "DirectionSums<false>": (2, 0),  # what is kept, the last gradient
    "DirectionSums<true>": (2, 0),
    "MixFriendly": (3, 1),  # g, m, w where adaptive -> q
    "Ascend<ToNearest>": (2, 3),  # w, g -> saved, w, g where copied
    "Ascend<Stochastic>": (2, 3),
    "Descend<ToNearest>": (3, 3),  # saved, g, g_max -> w, g; or g where copied
    "Descend<Stochastic>": (3, 3),
    "MakeDirection": (2, 1),  # what is kept, the last gradient -> d
    "Restore": (1, 1),  # saved -> w
    "Step<SgdBase, ToNearest, false>": (5, 3),  # w, what is kept, the last gradient, m -> w, m; or saved -> w
    "Step<SgdBase, Stochastic, false>": (5, 3),
    "Step<SgdBase, ToNearest, true>": (7, 5),  # and float32 master weights, which are twice as long
    "Step<SgdBase, Stochastic, true>": (7, 5),
    "Step<AdamBase, ToNearest, false>": (6, 4),  # and v
    "Step<AdamBase, Stochastic, false>": (6, 4),
    "Step<AdamBase, ToNearest, true>": (8, 6),
    "Step<AdamBase, Stochastic, true>": (8, 6),
    "Remember<ToNearest>": (3, 1),  # what is kept, the last gradient, the history -> the history
    "Remember<Stochastic>": (3, 1),
}
# At least, of a multiprocessor of 2048 threads and 65536 registers; one less of float64.
BLOCKS = {
    "SquareNorm": 8,
    "DirectionSums": 5,
    "MixFriendly": 5,
    "Ascend": 5,
    "Descend": 4,
    "MakeDirection": 8,
    "Restore": 8,
    "Step": 3,
    "Remember": 5,
}
# Instructions for a whole chunk, at most: what was reached, and a little for other versions of nvcc.
INSTRUCTIONS = {
    ("SquareNorm", "float"): 130,
    ("MixFriendly", "float"): 195,
    ("Ascend<ToNearest>", "float"): 120,
    ("Descend<ToNearest>", "float"): 170,
    ("Step<SgdBase, ToNearest, false>", "float"): 200,
    ("Step<AdamBase, ToNearest, false>", "float"): 530,
    ("Remember<ToNearest>", "float"): 150,
    ("Ascend<Stochastic>", "BFloat16"): 275,
    ("Descend<Stochastic>", "BFloat16"): 410,
    ("Step<SgdBase, Stochastic, false>", "BFloat16"): 425,
    ("Step<AdamBase, Stochastic, false>", "BFloat16"): 850,
    ("Remember<Stochastic>", "BFloat16"): 310,
}
# How many operands of 16 bits are rounded stochastically.
ROUNDED = {
    "Ascend<Stochastic>": 1,
    "Descend<Stochastic>": 1,
    "Step<SgdBase, Stochastic, false>": 2,
    "Step<SgdBase, Stochastic, true>": 1,
    "Step<AdamBase, Stochastic, false>": 3,
    "Step<AdamBase, Stochastic, true>": 2,
    "Remember<Stochastic>": 1,
}

pytestmark = [
    pytest.mark.cuda_build,
    pytest.mark.skipif(NVCC is None, reason="nvcc, of the CUDA toolkit, is not on PATH"),
]


class Kernel(NamedTuple):
    """A kernel as compiled; `name` is its operator, dtype and most tensors in a launch, or a plain name."""

    name: tuple[str, ...]
    stack: int
    spilled: int
    registers: int
    code: list[sass.Instruction]

    def count(self, pattern):
        return sum(1 for instruction in self.code if re.match(pattern, instruction.name))


def operator(kernel):
    """Its name without how it rounds."""
    return kernel.name[0].partition("<")[0]


def tool(name):
    """The path of a disassembler: of the toolkit, which may leave them out, or of the triton wheel."""
    triton = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or triton


def read_name(mangled):
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"(\w+|\(anonymous namespace\))::", "", text)
    arguments = re.match(r"void kernel<(.+), (\w+), (\d+)>\(", text)
    return arguments.groups() if arguments else (text.partition("(")[0],)


def disassembled(cubin):
    return subprocess.run([tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True).stdout


PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*\n.*\n"
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, request):
    """The kernels of each architecture, compiled at the same time."""
    folder = tmp_path_factory.mktemp("cubin")
    architectures = ARCHITECTURES + SLOWER * request.config.getoption("whole")
    cubins = {architecture: folder / f"{architecture}.cubin" for architecture in architectures}
    kernels, pipe = {}, {"stderr": subprocess.PIPE, "text": True}
    with ExitStack() as running:
        commands = ([NVCC, *FLAGS, f"-arch={each}", "-o", cubin, SOURCE] for each, cubin in cubins.items())
        runs = [running.enter_context(processes.started(command, **pipe)) for command in commands]
        reports = [run.communicate(timeout=900)[1] for run in runs]
    for run, report, (architecture, cubin) in zip(runs, reports, cubins.items()):
        assert run.returncode == 0, report
        code = sass.functions(disassembled(cubin))
        kernels[architecture] = [
            Kernel(read_name(name), int(stack), int(stores) + int(loads), int(registers), code.pop(name))
            for name, stack, stores, loads, registers in PTXAS.findall(report)
        ]
        assert not code, "ptxas reports every kernel that there is"
    return kernels


@pytest.fixture(params=[*ARCHITECTURES, *SLOWER])
def architecture(request):
    if request.param in SLOWER and not request.config.getoption("whole"):
        pytest.skip("with --whole: make cuda-build-check")
    return request.param


@pytest.fixture
def kernels(architecture, compiled):
    return compiled[architecture]


@pytest.fixture
def elementwise(kernels):
    return [kernel for kernel in kernels if len(kernel.name) == 3]


def test_every_kernel_is_there(kernels, elementwise):
    capacities = {capacity for _, _, capacity in (kernel.name for kernel in elementwise)}
    assert len(capacities) == 2  # few tensors, and as many as the parameters of a kernel hold
    expected = {
        (name, dtype, capacity)
        for name, dtype, capacity in itertools.product(VECTORS, DTYPES, capacities)
        if dtype in NARROW or not re.search("Stochastic|Step.*true", name)
    }
    assert {kernel.name for kernel in elementwise} == expected
    assert {kernel.name for kernel in kernels} - expected == {("write_words",)}


def test_nothing_spills(kernels):
    assert [kernel.name for kernel in kernels if kernel.stack or kernel.spilled] == []
    assert [kernel.name for kernel in kernels if kernel.count("LDL|STL")] == []


def test_every_operand_moves_in_128_bit_accesses(elementwise):
    """And once: a compiler that takes a store apart is seen, too, or one that makes a path twice."""
    broken = {}
    for kernel in elementwise:
        of_thread = 1 if kernel.name[1] in NARROW else 2
        expected = tuple(of_thread * n for n in VECTORS[kernel.name[0]])
        found = kernel.count(r"LDG\.\S*\b128\b"), kernel.count(r"STG\.\S*\b128\b")
        if found != expected:
            broken[kernel.name] = found
    assert not broken, broken


def test_how_many_blocks_a_multiprocessor_runs(elementwise):
    few = {}
    for kernel in elementwise:
        blocks = 65536 // (-(-kernel.registers // 8) * 8 * 256)
        if blocks < BLOCKS[operator(kernel)] - (kernel.name[1] == "double"):
            few[kernel.name] = f"{kernel.registers} registers, {blocks} blocks"
    assert not few, few


def test_how_long_the_path_of_a_whole_chunk_is(elementwise):
    """What a chunk costs beside its data: where nobody looks, a way of an element comes in again."""
    lengths = {
        kernel.name[:2]: len(sass.whole_chunk(kernel.code)) for kernel in elementwise if kernel.name[:2] in INSTRUCTIONS
    }
    assert lengths.keys() == INSTRUCTIONS.keys()
    long = {name: length for name, length in lengths.items() if length > INSTRUCTIONS[name]}
    assert not long, long


def test_random_keys_are_worked_out_once_a_chunk(elementwise):
    """Two multiplications an element and operand, and six an operand for its keys."""
    counts = {}
    for kernel in elementwise:
        if operands := ROUNDED.get(kernel.name[0]):
            hashes = sum(kernel.code[i].hash for i in sass.whole_chunk(kernel.code))
            if not 8 * 2 * operands <= hashes <= (8 * 2 + 6) * operands:
                counts[kernel.name] = hashes
    assert not counts, counts


def test_what_uses_sums_waits_for_them(elementwise, architecture):
    """From 9.0 on a launch may begin before the one before it has ended: nothing is read or written but after that.

    Before 9.0 neither can be said, and none is launched so.
    """
    begin = {kernel.name for kernel in elementwise if kernel.count("PREEXIT")}
    wait = {kernel.name for kernel in elementwise if kernel.count("ACQBULK")}
    can = architecture != "sm_80"
    sums, users = {"SquareNorm", "DirectionSums", "MixFriendly"}, {"Ascend", "Step"}
    assert begin == {kernel.name for kernel in elementwise if can and operator(kernel) in sums}
    assert wait == {kernel.name for kernel in elementwise if can and operator(kernel) in users}
    for kernel in elementwise:
        if kernel.name in wait:
            names = [instruction.name for instruction in kernel.code]
            before = kernel.code[: names.index("ACQBULK")]
            assert not [one for one in before if re.match(r"(LD|ST|ATOM|RED)(?!C)|BRA|BAR", one.name)], kernel.name
            assert not kernel.code[len(before)].conditional
