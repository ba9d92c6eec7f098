"""Where tensors lie, and whether they have memory of their own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import repeat
from operator import add, gt, le, mul
from typing import NamedTuple

from torch import Tensor


class Occupied(NamedTuple):
    """Where parameters and flat buffers lie."""

    weights: list[int]
    """The parameters' addresses."""
    begins: list[int]
    """Where each begins, in order."""
    ends: list[int]
    """Where the first 0, 1, 2, … of them end."""

    def shares(self, addresses: Sequence[int], sizes: Sequence[int]) -> list[bool]:
        """Return of each of other spans whether it overlaps one of these."""
        before = map(bisect_left, repeat(self.begins), map(add, addresses, sizes))
        return list(map(gt, map(self.ends.__getitem__, before), addresses))


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return how far a strided tensor's elements reach, in elements, from its first one on."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def are_in_storage(tensors: Sequence[Tensor], extents: Sequence[int]) -> bool:
    """Return whether strided tensors of one dtype have memory for every element: others may have freed or shrunk it.

    Args:
        tensors: also such as have none of their own, as wrappers.
        extents: of each, its `extent`.
    """
    itemsize = tensors[0].element_size() if tensors else 0
    ends = map(mul, map(add, map(Tensor.storage_offset, tensors), extents), repeat(itemsize))
    sizes = [storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)]
    there = zip(extents, map(Tensor.data_ptr, tensors), map(le, ends, sizes), strict=True)
    return all(not extent or (address and fits) for extent, address, fits in there)


def is_in_storage(tensor: Tensor) -> bool:
    """Return the same of one."""
    return are_in_storage([tensor], [extent(tensor.shape, tensor.stride())])


def can_be_written(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own for every element."""
    if not tensor.numel():
        return True
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return is_in_storage(tensor) and all(strides) and not tensor.is_neg()
