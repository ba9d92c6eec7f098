"""Lists of tensors copied, and looked at: by csrc/copies.cpp where it is there (and they are on a CPU), else torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bsam_fused.ops import native_flat

_native, _ = native_flat.load()
_on_cpu: Callable[[list[Tensor], list[Tensor]], None] = (
    torch._foreach_copy_ if _native is None else _native.copy_all  # type: ignore[assignment]
)


def _places(tensors: list[Tensor]) -> list[object]:
    return [(t.data_ptr(), t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]


places: Callable[[list[Tensor]], object] = _places if _native is None else _native.places
"""Returns where each tensor's elements are, and how they lie: to be compared with what this returned before."""


@torch.no_grad()
def copy_all(to: list[Tensor], source: list[Tensor]) -> None:
    """Copy every tensor of a list into the one of another at its place.

    Args:
        to: of one device and dtype.
        source: of the same device, dtype and shapes.
    """
    if to:
        (_on_cpu if to[0].is_cpu else torch._foreach_copy_)(to, source)
