"""How a launch cuts tensors into pieces, where int32 would not do: no tensor is allocated for it."""

from pathlib import Path

import processes

SHIM = Path(__file__).parent / "shim"
CHUNK = 2048  # elements of 16 bits: csrc/cuda_pieces.cuh's 256 threads of 16 bytes
LINE = 32  # elements of 16 bits in csrc/flat.h's 64 bytes


def test_elements_beyond_int32(tmp_path):
    numels = [2**31 + 3, 5, 5 * 10**9, CHUNK, 2**33 + 1]
    command = ["c++", "-std=c++17", "-Wno-unknown-pragmas", f"-I{SHIM}", str(SHIM / "pieces.cpp"), "-o", "pieces"]
    processes.run(command, cwd=tmp_path, check=True)
    arguments = [str(numel) for numel in numels]
    printed = processes.run(["./pieces", *arguments], cwd=tmp_path, check=True).stdout
    pieces = [tuple(map(int, line.split())) for line in printed.splitlines()]
    expected, flat = [], 0
    for tensor, numel in enumerate(numels):
        last = (numel - 1) // CHUNK * CHUNK
        expected += [(tensor, 0, flat, min(numel, CHUNK)), (tensor, last, flat + last, numel - last)]
        flat += -(-numel // LINE) * LINE
    assert pieces == expected
