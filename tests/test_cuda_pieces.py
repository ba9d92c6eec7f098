"""How a launch cuts tensors into pieces, also where int32 would not do, and shares them out; on the host."""

from collections import defaultdict
from itertools import chain
from pathlib import Path

import processes
import pytest

SHIM = Path(__file__).parent / "shim"
CHUNK = 2048  # elements of 16 bits: csrc/cuda_pieces.cuh's 256 threads of 16 bytes
RUN = 4  # chunks that a block takes at a time
LINE = 32  # elements of 16 bits in csrc/flat.h's 64 bytes


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    command = ["c++", "-std=c++17", "-Wno-unknown-pragmas", f"-I{SHIM}", str(SHIM / "pieces.cpp"), "-o", "pieces"]
    processes.run(command, cwd=folder, check=True)

    def run(*arguments):
        printed = processes.run(["./pieces", *map(str, arguments)], cwd=folder, check=True).stdout
        return [tuple(map(int, line.split())) for line in printed.splitlines()]

    return run


def test_elements_beyond_int32(pieces):
    numels = [2**31 + 3, 5, 5 * 10**9, CHUNK, 2**33 + 1]
    expected, flat = [], 0
    for tensor, numel in enumerate(numels):
        last = (numel - 1) // CHUNK * CHUNK
        expected += [(tensor, 0, flat, min(numel, CHUNK)), (tensor, last, flat + last, numel - last)]
        flat += -(-numel // LINE) * LINE
    assert pieces("ends", *numels) == expected


@pytest.mark.parametrize("walk", ["forwards", "backwards"])
@pytest.mark.parametrize("blocks", [1, 3, 4, 50])
def test_every_chunk_is_one_blocks(pieces, walk, blocks):
    """Whatever is left over from whole rounds, and past tensors that are left out, at either end, too."""
    numels = [0, 3, 9 * CHUNK, 0, 0, CHUNK - 1, 20 * CHUNK + 1, 0]
    chunks = [
        (tensor, begin, min(CHUNK, numel - begin))
        for tensor, numel in enumerate(numels)
        for begin in range(0, numel, CHUNK)
    ]
    taken = defaultdict(list)
    for block, tensor, begin, _, count in pieces(walk, blocks, *numels):
        taken[block].append(chunks.index((tensor, begin, count)))
    assert sorted(chain.from_iterable(taken.values())) == [*range(len(chunks))]
    shares = [len(taken[block]) for block in range(blocks)]
    assert max(shares) - min(shares) <= 1
    rounds = len(chunks) // (RUN * blocks)
    for own in taken.values():
        runs = [own[RUN * i : RUN * (i + 1)] for i in range(rounds)]
        assert all(run == [*range(run[0], run[0] + RUN)] for run in runs)
    # The grid goes from one end to the other: each round is past the one before.
    ends = [sorted(x for own in taken.values() for x in own[RUN * i : RUN * (i + 1)]) for i in range(rounds)]
    ends.append(sorted(x for own in taken.values() for x in own[RUN * rounds :]))
    in_order = ends if walk == "forwards" else ends[::-1]
    assert [*chain.from_iterable(in_order)] == [*range(len(chunks))]
