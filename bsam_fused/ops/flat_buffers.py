"""The flat buffers of FlatParams written in Python: where parameters lie in them, their views, state that begins.

The twin of what csrc/flat.h and csrc/flat_params.cpp have of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import attrgetter

import torch
from torch import Tensor

from bsam_fused.ops.contract import MASTER_WEIGHT
from bsam_fused.ops.memory import Occupied, extent

DIRECTION = "direction"  # the flat buffer in which `merge` leaves d
ALIGNMENT = 64  # bytes: every tensor starts on a cache line of the flat buffers

kind_of = attrgetter("shape", "dtype", "device", "layout")


class FlatBuffers:
    """Flat buffers, zeros at first, in which each parameter has a place: "saved", and state.

    Args:
        params: of one device and dtype.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        self._kinds = list(map(kind_of, self.params))
        self._layouts = list(map(Tensor.stride, self.params))
        self._numels = [p.numel() for p in self.params]
        # An element's place in the flat buffers: its parameter's strides, or dense ones where they have gaps.
        self._strides = [torch.empty_like(p, device="meta").stride() for p in self.params]
        self._extents = [extent(p.shape, p.stride()) for p in self.params]
        self._bytes = [numel * self.dtype.itemsize for numel in self._numels]
        pad = ALIGNMENT // self.dtype.itemsize
        self._offsets = [0]
        for numel in self._numels:
            self._offsets.append(self._offsets[-1] + -(-numel // pad) * pad)
        self._steps = torch.zeros(len(self.params), dtype=torch.float32, device=self.device)
        self._buffers: dict[str, Tensor] = {}
        self._lists: dict[str, list[Tensor]] = {}  # of their views
        self._where = Occupied([], [], [0])
        self._begun: set[int] = set()  # whose state has begun

    def _refuse_capture(self) -> None:
        """What a graph's capture makes is made anew by every replay."""
        if is_capturing(self.device):
            raise RuntimeError("the first step cannot be captured in a CUDA graph: take one before, then capture")

    def _empty(self, i: int) -> Tensor:
        return torch.empty_strided(self.params[i].shape, self._strides[i], dtype=self.dtype, device=self.device)

    def _buffer(self, key: str) -> Tensor:
        if key not in self._buffers:
            self._refuse_capture()
            dtype = torch.float32 if key == MASTER_WEIGHT else self.dtype
            self._buffers[key] = torch.zeros(self._offsets[-1], dtype=dtype, device=self.device)
            self._where = Occupied([], [], [0])
        return self._buffers[key]

    def _view(self, key: str, i: int) -> Tensor:
        return self._buffer(key).as_strided(self._kinds[i][0], self._strides[i], self._offsets[i])

    def _list(self, key: str) -> list[Tensor]:
        """Return views of a flat buffer that nobody else has."""
        if key not in self._lists:
            self._lists[key] = self.state(key)
        return self._lists[key]

    def _occupied_by(self, weights: list[int]) -> Occupied:
        """Return where parameters, at these addresses, and flat buffers lie: what lies there, too, is written to."""
        sizes = [reach * self.dtype.itemsize for reach in self._extents]
        spans = [(address, address + size) for address, size in zip(weights, sizes, strict=True) if size]
        buffers = self._steps, *self._buffers.values()
        spans += [(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in buffers]
        begins = sorted(spans)
        return Occupied(weights, [begin for begin, _ in begins], [0, *accumulate((end for _, end in begins), max)])

    def state(self, key: str) -> list[Tensor]:
        """Views of the flat buffer ``key``."""
        if key == "step":
            return list(self._steps.unbind())
        return [self._view(key, i) for i in range(len(self.params))]

    def begin_state(self, members: Sequence[int]) -> None:
        """Note whose state has begun."""
        self._begun.update(members)

    def retract_state(self, i: int) -> None:
        """Note whose state has not begun."""
        self._begun.discard(i)

    def drop_state(self) -> None:
        """Begin with new buffers of state."""
        self._begun = set()
        self._steps = torch.zeros_like(self._steps)
        self._where = Occupied([], [], [0])
        self._lists = {}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in {"saved", DIRECTION}}


def is_capturing(device: torch.device) -> bool:
    """Return whether work on ``device``, which need not be the current one, goes into a graph instead of running."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
