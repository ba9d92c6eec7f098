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


def are_in_storage(tensors: Sequence[Tensor], extents: Sequence[int]) -> bool:
    """Return whether tensors of one dtype have memory for as many elements each, from their first one on."""
    ends = map(add, map(Tensor.storage_offset, tensors), extents)
    bytes_ = [storage.nbytes() for storage in map(Tensor.untyped_storage, tensors)]
    return all(map(le, map(mul, ends, repeat(tensors[0].element_size())), bytes_)) if tensors else True


def is_in_storage(tensor: Tensor) -> bool:
    """Return whether a strided tensor has memory for every element: others may have freed or shrunk it."""
    if not tensor.numel():
        return True
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.storage_offset() + steps < tensor.untyped_storage().nbytes() // tensor.element_size()


def can_be_written(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own for every element."""
    if not tensor.numel():
        return True
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    return is_in_storage(tensor) and all(strides) and not tensor.is_neg()
