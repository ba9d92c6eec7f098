"""A launch over many tensors, as its Triton programs see it: csrc/cuda_pieces.cuh's twin. No formulas.

The tensors are cut into chunks of CHUNK elements, which the programs of a launch take in turns. A tensor's pointers
come as addresses; 0 stands for a tensor that is not there, whose elements read as 0 and are not written. Where a chunk
is whole and all its addresses are multiples of 16 bytes, accesses are of 128 bits: Triton makes none of those under a
mask of elements, hence two variants of each body, WHOLE or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The tables: of tensors, int64 rows (offset in the flat buffers, elements, param group, key); of a launch's pointers,
# int64 rows (w, g, now, flags); of chunks, int32 rows (tensor, which of its chunks); of options, float64 rows.
ROW = tl.constexpr(4)
WANTED = tl.constexpr(1)  # takes part in the launch
PERTURBED = tl.constexpr(2)  # w is not w, but saved is
COUNTED = tl.constexpr(4)  # the base optimizer keeps state for it
ASCENDED = tl.constexpr(8)  # had a gradient in the first pass, which, if anything is kept, is in g

PARTIALS = tl.constexpr(1024)  # partial sums that are added up at a time

# ---- a chunk


@triton.jit
def piece(
    tensors: tl.tensor, pointers: tl.tensor, map: tl.tensor, chunk: tl.tensor, S: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tuple:
    """Return a chunk's tensor, its group, key and flags; its first element and how many; and where they are.

    That is: the place in bytes in the flat buffers, and the addresses of w, g and this pass's gradient.
    """
    size: tl.constexpr = S.primitive_bitwidth // 8
    tensor = tl.load(map + 2 * chunk)
    begin = tl.load(map + 2 * chunk + 1).to(tl.int64) * CHUNK
    row, now = tensors + ROW * tensor, pointers + ROW * tensor
    flags = tl.load(now + 3)
    count = tl.where((flags & WANTED) != 0, tl.minimum(tl.load(row + 1) - begin, CHUNK), 0)
    return (
        tensor,
        tl.load(row + 2),
        tl.load(row + 3),
        flags,
        begin,
        count,
        (tl.load(row) + begin) * size,
        _moved(tl.load(now), begin * size),
        _moved(tl.load(now + 1), begin * size),
        _moved(tl.load(now + 2), begin * size),
    )


@triton.jit
def _moved(address: tl.tensor, by: tl.tensor) -> tl.tensor:
    return tl.where(address == 0, address, address + by)


@triton.jit
def only_if(condition: tl.tensor, address: tl.tensor) -> tl.tensor:
    """The address, or none."""
    return tl.where(condition, address, 0)


@triton.jit
def is_variant(
    WHOLE: tl.constexpr, count: tl.tensor, w: tl.tensor, g: tl.tensor, now: tl.tensor, CHUNK: tl.constexpr
) -> tl.tensor:
    """Whether there is something to do in this variant; WHOLE: by 128 bits."""
    whole = (count == CHUNK) & (((w | g | now) & 15) == 0)
    return (count > 0) & (whole == WHOLE)


@triton.jit
def load(address: tl.tensor, count: tl.tensor, S: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr) -> tl.tensor:
    """The elements at an address, 0 past `count` and where there is none."""
    i = tl.arange(0, CHUNK)
    if WHOLE:
        return tl.load(tl.multiple_of(address.to(tl.pointer_type(S)), 16) + i, mask=address != 0, other=0)
    else:
        return tl.load(address.to(tl.pointer_type(S)) + i, mask=(i < count) & (address != 0), other=0)


@triton.jit
def store(
    address: tl.tensor, x: tl.tensor, count: tl.tensor, S: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr
) -> None:
    """Write the elements x, rounded to nearest."""
    i = tl.arange(0, CHUNK)
    if WHOLE:
        tl.store(tl.multiple_of(address.to(tl.pointer_type(S)), 16) + i, x.to(S), mask=address != 0)
    else:
        tl.store(address.to(tl.pointer_type(S)) + i, x.to(S), mask=(i < count) & (address != 0))


# ---- sums: a partial sum a program, added up by the one that comes last, in the programs' order


@triton.jit
def partial(total: tl.tensor, partials: tl.tensor, term: tl.constexpr) -> None:
    """Leave this program's part of a sum."""
    tl.store(partials + term * tl.num_programs(0) + tl.program_id(0), tl.sum(total))


@triton.jit
def is_last(ticket: tl.tensor) -> tl.tensor:
    """Whether all other programs of this launch have come here before: what they wrote before is then seen."""
    tl.debug_barrier()  # all threads have come
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return last


@triton.jit
def added_up(partials: tl.tensor, term: tl.constexpr) -> tl.tensor:
    """Return the sum over all programs, to the last of them."""
    programs = tl.num_programs(0)
    total = tl.zeros((PARTIALS,), tl.float64)
    for first in range(0, programs, PARTIALS):
        i = first + tl.arange(0, PARTIALS)
        total += tl.load(partials + term * programs + i, mask=i < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(total)
