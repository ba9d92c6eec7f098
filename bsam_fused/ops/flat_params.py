"""What FlatParams written in Python share: parameters, gradients, flat buffers, what a phase does in which order.

The twin of csrc/flat_params.cpp, but that no device is asked whether a sum is finite: the phases choose there.
What runs over the elements is a backend's own: torch_flat.py, triton_flat.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from bsam_fused.ops import contract, rounding
from bsam_fused.ops.contract import CHECKED, SCALE, SLOTS, AdamScalars, Radius, SGDScalars

DIRECTION = "direction"  # the flat buffer in which `merge` leaves d
ALIGNMENT = 64  # bytes: every tensor starts on a cache line of the flat buffers


class Update(NamedTuple):
    """What every update needs beside its param groups: see `contract.FlatParams.update_sgd`."""

    sums: Tensor
    from_saved: bool
    max_norm: float


class PythonFlatParams(ABC):
    """`contract.FlatParams`, but for what runs over the elements."""

    @torch.no_grad()
    def __init__(self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], seed: int | None) -> None:
        self.params, self.places = list(params), list(places)
        self.device, self.dtype = self.params[0].device, self.params[0].dtype
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.sums = torch.zeros(SLOTS, dtype=wide, device=self.device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.step_count = torch.zeros((), dtype=torch.int64, device=self.device)
        # Of parameters that are rounded stochastically.
        self._keys = [rounding.tensor_key(seed, *place) for place in places] if self._rounds(seed) else []
        self._steps = torch.zeros(len(self.params), device=self.device)
        self._layouts = [(p.shape, p.stride(), p.dtype, p.device) for p in self.params]
        self._numels = [p.numel() for p in self.params]
        # An element's place in the flat buffers: its parameter's strides, or dense ones where they have gaps.
        self._strides = [torch.empty_like(p, device="meta").stride() for p in self.params]
        self._usual = [(p.shape, s, p.dtype, p.device) for p, s in zip(self.params, self._strides, strict=True)]
        self._versioned = [not p.is_inference() for p in self.params]
        # What has gaps, or is lazily negated, is worked on in a packed copy.
        self._packed = {
            i: torch.empty_like(p, requires_grad=False)
            for i, p in enumerate(self.params)
            if p.stride() != self._strides[i] or p.is_neg()
        }
        pad = ALIGNMENT // self.params[0].element_size()
        self._offsets = [0]
        for numel in self._numels:
            self._offsets.append(self._offsets[-1] + -(-numel // pad) * pad)
        self._buffers: dict[str, Tensor] = {}  # "saved", and the base optimizer's state
        self._begun: set[int] = set()  # whose state Python has been told of
        self._own: dict[int, Tensor] = {}  # where g is kept if it had to be copied
        self._bilateral = False  # this step's ascend kept g
        self._refuse_capture()
        self._forget()

    def _rounds(self, seed: int | None) -> TypeGuard[int]:
        return seed is not None and self.dtype.itemsize == 2

    def _forget(self) -> None:
        self._now: dict[int, Tensor] = {}  # this pass's gradients, in the flat buffers' strides
        self._g: dict[int, Tensor] = {}  # BSAM: g, then g + g_max, likewise
        self._perturbed: list[int] = []  # what is not w, but saved is
        self._at_w = False  # saved holds the perturbed weights meanwhile

    # ---- what a backend does in a phase, over the elements of all parameters

    @abstractmethod
    def square_norm(self, slot: int, radii: Sequence[Radius]) -> None:
        """Σ (T g)²."""

    @abstractmethod
    def direction_sums(self) -> None:
        """Σ g_min², Σ s², Σ s g_min; s = g + g_max."""

    @abstractmethod
    def _take(self) -> None:
        """Take the gradients of this pass into g, where g is not there yet: at the latest as the phase runs."""

    @abstractmethod
    def _run_ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        """Save w, then w = w_max; note what is perturbed."""

    @abstractmethod
    def _run_descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        """From the saved w, w = w_min; g = g + g_max; Σ g_max²."""

    @abstractmethod
    def _run_sgd(self, update: Update, groups: Sequence[SGDScalars], members: list[int]) -> None:
        """SGD's rule; counts the members' steps, or the skipped one."""

    @abstractmethod
    def _run_adam(self, update: Update, groups: Sequence[AdamScalars], members: list[int]) -> None:
        """Adam's rule, likewise."""

    @abstractmethod
    def _run_direction(self, sums: Tensor, max_norm: float) -> dict[int, Tensor]:
        """Return d of every member, in the flat buffers' strides, in tensors that nothing else needs."""

    # ---- parameters and gradients

    @property
    def skipped(self) -> int:
        """Updates that were skipped."""
        return int(self._skipped)

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside parameters and gradients."""
        g = [g for i, g in self._g.items() if g is not self._own.get(i)]
        return sum(t.nbytes for t in (*self._buffers.values(), *self._packed.values(), *self._own.values(), *g))

    def _weights(self, i: int) -> Tensor:
        """Return the i-th parameter's elements, in the flat buffers' strides."""
        return self._packed.get(i, self.params[i])

    def _unmoved(self, i: int) -> bool:
        p = self.params[i]
        return (p.shape, p.stride(), p.dtype, p.device) == self._layouts[i]

    @torch.no_grad()
    def read_gradients(self) -> None:
        """Note the gradients of this pass."""
        self._now = {}
        if [(p.shape, p.stride(), p.dtype, p.device) for p in self.params] != self._layouts:
            contract.reject(self, next(i for i in range(len(self.params)) if not self._unmoved(i)))
        now, usual, strided = {}, self._usual, torch.strided
        for i, grad in enumerate([p.grad for p in self.params]):
            if grad is None:
                continue
            if (
                grad.layout is not strided
                or (grad.shape, grad.stride(), grad.dtype, grad.device) != usual[i]
                or grad.is_neg()
                or grad._is_zerotensor()
            ):
                grad = self._staged(i, grad)
            if not grad.data_ptr() and self._numels[i]:
                contract.reject(self, i)
            now[i] = grad
        for i in now:
            if i in self._packed:
                self._packed[i].copy_(self.params[i])
            if not self._weights(i).data_ptr() and self._numels[i]:
                contract.reject(self, i)
        self._now = now

    def _staged(self, i: int, grad: Tensor) -> Tensor:
        """Return a copy in the flat buffers' strides: a lazily negated or zero gradient is not what its memory says."""
        shape, _, dtype, device = self._usual[i]
        if grad.layout != torch.strided or (grad.shape, grad.dtype, grad.device) != (shape, dtype, device):
            contract.reject(self, i)
        return self._empty(i).copy_(grad)

    def clear_gradients(self) -> None:
        """Set every .grad to None."""
        for param in self.params:
            param.grad = None

    def _wrote(self, members: Sequence[int]) -> None:
        for i in self._packed.keys() & set(members):
            self.params[i].copy_(self._packed[i])
        torch.autograd.graph.increment_version([self.params[i] for i in members if self._versioned[i]])

    def _end_pass(self) -> None:
        for i in self._now:
            self.params[i].grad = None
        self._now = {}

    def _empty(self, i: int) -> Tensor:
        return torch.empty_strided(self.params[i].shape, self._strides[i], dtype=self.dtype, device=self.device)

    def _kept(self, i: int) -> Tensor:
        """Return where a copy of the i-th gradient is kept, from step to step."""
        if i not in self._own:
            self._own[i] = self._empty(i)
        return self._own[i]

    # ---- flat buffers

    def _refuse_capture(self) -> None:
        """What a graph's capture makes is made anew by every replay."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first step cannot be captured in a CUDA graph: take one before, then capture")

    def _buffer(self, key: str) -> Tensor:
        if key not in self._buffers:
            self._refuse_capture()
            dtype = torch.float32 if key == contract.MASTER_WEIGHT else self.dtype
            self._buffers[key] = torch.zeros(self._offsets[-1], dtype=dtype, device=self.device)
        return self._buffers[key]

    def _view(self, key: str, i: int) -> Tensor:
        return self._buffer(key).as_strided(self._layouts[i][0], self._strides[i], self._offsets[i])

    def state(self, key: str) -> list[Tensor]:
        """Views of the flat buffer ``key``."""
        if key == "step":
            return list(self._steps.unbind())
        return [self._view(key, i) for i in range(len(self.params))]

    @torch.no_grad()
    def clear_state(self, i: int) -> None:
        """Zero the i-th parameter's state."""
        self._begun.discard(i)
        self._steps[i].zero_()
        for key in self._buffers:
            if key not in {"saved", DIRECTION}:
                self._view(key, i).zero_()

    # ---- phases

    @torch.no_grad()
    def ascend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float, keep: bool) -> None:
        """Save w, then w = w_max."""
        self._bilateral, self._g = keep, {}
        if keep:
            self._take()
        self._run_ascend(sums, radii, norm_eps)
        self._wrote(self._perturbed)
        self._end_pass()

    @torch.no_grad()
    def descend(self, sums: Tensor, radii: Sequence[Radius], norm_eps: float) -> None:
        """From the saved w, w = w_min; g = g + g_max."""
        self._take()
        self._run_descend(sums, radii, norm_eps)
        self._wrote(self._perturbed)
        self._end_pass()

    def _members(self) -> list[int]:
        """Return the parameters that had a gradient in some pass of this step."""
        return sorted({*self._perturbed, *self._g, *self._now})

    def _update(self, counted: Callable[[int], bool], run: Callable[[list[int]], None]) -> list[int]:
        members = self._members()
        begun = [i for i in members if i not in self._begun and counted(self.places[i][0])]
        run(members)
        self._wrote(members)
        self._begun.update(begun)
        self.release()
        return begun

    @torch.no_grad()
    def update_sgd(self, sums: Tensor, groups: Sequence[SGDScalars], from_saved: bool, max_norm: float) -> list[int]:
        """torch.optim.SGD's rule."""
        update = Update(sums, from_saved, max_norm)
        return self._update(lambda i: groups[i].stateful, lambda members: self._run_sgd(update, groups, members))

    @torch.no_grad()
    def update_adam(self, sums: Tensor, groups: Sequence[AdamScalars], from_saved: bool, max_norm: float) -> list[int]:
        """torch.optim.Adam's and AdamW's rule."""
        update = Update(sums, from_saved, max_norm)
        return self._update(lambda i: True, lambda members: self._run_adam(update, groups, members))

    @torch.no_grad()
    def combine(self, sums: Tensor, from_saved: bool, max_norm: float) -> bool:
        """Put d into .grad, w into the weights."""
        self.step_count += 1
        if not sums[:CHECKED].isfinite().all():
            self._skipped += 1
            self.restore()
            return False
        directions = self._run_direction(sums, max_norm)
        if from_saved:
            self._write_saved()
        for i, d in directions.items():
            self.params[i].grad = d
        return True

    @torch.no_grad()
    def merge(self, sums: Tensor, share: float) -> Tensor:
        """Put share · d into a flat buffer, of which .grad are views."""
        scaled = sums.clone()  # as the loss still is
        scaled[SCALE] = 0
        buffer = self._buffer(DIRECTION).zero_()
        for i, d in self._run_direction(scaled, math.inf).items():
            self.params[i].grad = self._view(DIRECTION, i).copy_(d).mul_(share)
        self._bilateral, self._g = False, {}
        return buffer

    def write_options(self, tables: Sequence[Sequence[Sequence[float]]]) -> None:
        """Refuse: options are arguments of what runs over the elements."""
        raise RuntimeError(
            "this backend's launches carry their options: a captured step would replay those it began with"
        )

    # ---- giving up, and looking at w

    @torch.no_grad()
    def _write_saved(self) -> None:
        """saved -> w, for the perturbed; also right for a parameter that was moved since."""
        if self._perturbed and not self._at_w:
            saved = [self._view("saved", i) for i in self._perturbed]
            torch._foreach_copy_([self.params[i] for i in self._perturbed], saved)

    def restore(self) -> None:
        """Saved w back into the weights."""
        self._write_saved()
        self.release()

    def release(self) -> None:
        """Forget the step."""
        self._forget()

    @torch.no_grad()
    def show_w(self, at_w: bool) -> None:
        """Exchange perturbed weights and saved w, if that is not so already."""
        if at_w == self._at_w:
            return
        for i in self._perturbed:
            saved, kept = self._view("saved", i), self.params[i].clone()
            self.params[i].copy_(saved)
            saved.copy_(kept)
        self._at_w = at_w
