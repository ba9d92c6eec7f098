"""FlatParams over DTensors, such as FSDP2's parameters: a backend's own, over this rank's shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bsam_fused import distributed
from bsam_fused.ops import contract

_SEED_STEP = 0x9E3779B9  # shards of one parameter draw other random bits


class ShardedFlatParams:
    """`contract.FlatParams`, whose parameters, gradients and state are DTensors to others and shards to the operators.

    The operators see plain tensors that share the shards' storage. Sums are of this rank's shards. Stochastic
    rounding draws from a stream of its own on every shard.

    Args:
        params: DTensors of one mesh, sharded alike.
        places: as `contract.FlatParams` has it.
        seed: likewise.
        exempt: likewise.
        build: makes the FlatParams of a backend.
    """

    def __init__(
        self,
        params: Sequence[Any],
        places: Sequence[tuple[int, int]],
        seed: int | None,
        exempt: bool,
        build: Callable[..., contract.FlatParams],
    ) -> None:
        self.params = list(params)
        self._shards = [distributed.local(param) for param in self.params]
        if seed is not None:
            seed = (seed + _SEED_STEP * distributed.shard_index(params[0])) % 2**32
        self.over_shards = build(self._shards, places, seed, exempt)

    def __getattr__(self, name: str) -> Any:
        """Return what the shards' FlatParams has: all that needs no parameter."""
        if name == "over_shards":  # not built: what made it raised
            raise AttributeError(name)
        return getattr(self.over_shards, name)

    @property
    def limit(self) -> float:
        """What no number of a step may exceed."""
        return self.over_shards.limit

    @limit.setter
    def limit(self, limit: float) -> None:
        self.over_shards.limit = limit

    def _attach(self) -> None:
        """Follow parameters whose storage was replaced."""
        for param, shard in zip(self.params, self._shards, strict=True):
            now = distributed.local(param)
            if now.data_ptr() != shard.data_ptr():
                shard.data = now

    def read_gradients(self) -> None:
        """Note the gradients of this pass.

        Raises:
            RuntimeError: a gradient is not sharded as its parameter is; or as `contract.reject` has it.
        """
        self._attach()
        for i, (param, shard) in enumerate(zip(self.params, self._shards, strict=True)):
            grad = param.grad
            if grad is not None and getattr(grad, "placements", None) != param.placements:
                raise RuntimeError(
                    f"{contract.describe(param, self.over_shards.places[i])} is placed {param.placements}, but its "
                    f"gradient {getattr(grad, 'placements', 'is no DTensor')}: redistribute it before the phase"
                )
            shard.grad = None if grad is None else distributed.local(grad)
        self.over_shards.read_gradients()

    def _return_gradients(self) -> None:
        for param, shard in zip(self.params, self._shards, strict=True):
            if shard.grad is None:
                param.grad = None
            elif param.grad is None or distributed.local(param.grad).data_ptr() != shard.grad.data_ptr():
                param.grad = distributed.like(shard.grad, param)

    def clear_gradients(self) -> None:
        """Set every .grad to None."""
        self.over_shards.clear_gradients()
        self._return_gradients()

    def ascend(self, *args: Any) -> None:
        """Save w, then w = w_max."""
        self.over_shards.ascend(*args)
        self._return_gradients()

    def descend(self, *args: Any) -> None:
        """From the saved w, w = w_min; g = g + g_max."""
        self.over_shards.descend(*args)
        self._return_gradients()

    def combine(self, *args: Any) -> bool:
        """Put d into .grad, w into the weights."""
        went = self.over_shards.combine(*args)
        self._return_gradients()
        return went

    def restore(self) -> None:
        """Saved w back into the weights."""
        self._attach()
        self.over_shards.restore()

    def show_w(self, at_w: bool) -> None:
        """Exchange perturbed weights and saved w."""
        self._attach()
        self.over_shards.show_w(at_w)

    def state(self, key: str) -> list[Tensor]:
        """Views of the flat buffer ``key``, as DTensors; "step" is each rank's own."""
        views = self.over_shards.state(key)
        if key == "step":
            return views
        with torch.no_grad():
            return [distributed.like(_alone(view), param) for view, param in zip(views, self.params, strict=True)]


def _alone(view: Tensor) -> Tensor:
    """Return a dense ``view`` over a storage of its own, which keeps the flat buffer's alive.

    A DTensor, which has no memory, repeats its shard's offset, by which torch takes it for one that has some.
    """
    start = view.storage_offset() * view.itemsize
    storage = view.untyped_storage()[start : start + view.nbytes]
    return view.new_empty(0).set_(storage, 0, view.shape, view.stride())  # type: ignore[call-overload]
