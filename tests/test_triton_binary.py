"""What Triton's compiler makes of the kernels, for GPUs that need not be there: spills, and how data move."""

import json
import os
import sys
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ["cuda:80", "cuda:90", "hip:gfx942"]
DTYPES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
# How many tensors of the parameters' size a kernel reads and writes.
OPERANDS = {
    "square_norm": (2, 0),  # g, w where adaptive
    "mix": (3, 1),  # g, m, w where adaptive -> q
    "direction_sums": (2, 0),  # g, g_max
    "ascend": (2, 3),  # w, g -> saved, w, g where copied
    "descend": (3, 2),  # saved, g, g_max -> w, g
    "direction": (2, 1),  # g, g_max -> d
    "remember": (2, 1),  # q, m -> m
    "update_sgd": (4, 2),  # saved, g, g_max, m -> w, m
    "update_adam": (5, 3),  # saved, g, g_max, m, v -> w, m, v
}
# How many operands of 16 bits are rounded stochastically, in the variants compiled: with master weights.
ROUNDED = {"ascend": 1, "descend": 1, "remember": 1, "update_sgd": 1, "update_adam": 2}


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "compile_triton.py"), *TARGETS]
    result = processes.run(command, timeout=900, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", OPERANDS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_operand_moves_in_128_bits_and_nothing_spills(compiled, target, kernel, dtype):
    """Of a whole chunk, each thread's part of each operand; master weights are twice as wide as their parameters."""
    found = compiled[f"{target} {kernel} {dtype}"]
    size = DTYPES[dtype]
    vectors = found["chunk"] * size / (16 * found["threads"])
    extra = 2 * vectors if kernel.startswith("update") and size == 2 else 0
    reads, writes = OPERANDS[kernel]
    if target.startswith("cuda"):
        assert found["loads"] == reads * vectors + extra
    else:  # rows of tables come in 128 bits, too
        assert found["loads"] >= reads * vectors + extra
    assert found["stores"] == writes * vectors + extra
    assert found["spills"]
    assert not any(found["spills"])
    assert found["approximate"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ROUNDED)
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_random_keys_are_worked_out_once_a_chunk(compiled, target, kernel, dtype):
    """In both variants, WHOLE and not: two multiplications an element and operand, and six an operand for its keys."""
    found = compiled[f"{target} {kernel} {dtype}"]
    elements = found["chunk"] // found["threads"]
    hashes = found["hashes"] / (2 * ROUNDED[kernel])
    assert 2 * elements <= hashes <= 2 * elements + 6
