"""What the ranks of a process group tell each other: small vectors of sums, and what they must agree on."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bsam_fused import checks

Sync = Literal["every", "last"]


def world_size() -> int:
    """Return how many ranks there are: 1 without an initialised process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _imported(module: str, name: str) -> Any:
    """Return a class of torch.distributed, None where nobody has imported its module: nothing is of it then."""
    return getattr(sys.modules.get(f"torch.distributed.{module}"), name, None)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor, without importing what makes them."""
    kind = _imported("tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


# ---- shards that each rank has alone

OWN_NORM = "each rank would perturb by the norm of its own part: use FSDP2 (torch.distributed.fsdp.fully_shard)"
"""Why parameters that are sharded otherwise than as DTensors are refused, and what to do."""


def is_fsdp1(param: Tensor) -> bool:
    """Return whether ``param`` is a shard of FullyShardedDataParallel's, flattened or (``use_orig_params``) not."""
    return getattr(param, "_fsdp_flattened", False)


def refuse_fsdp1(model: nn.Module | None) -> None:
    """Raise TypeError where ``model`` is, or has in it, a FullyShardedDataParallel."""
    kind = _imported("fsdp", "FullyShardedDataParallel")
    if kind is not None and model is not None and any(isinstance(module, kind) for module in model.modules()):
        raise TypeError(f"model has a FullyShardedDataParallel (FSDP1) in it: {OWN_NORM}")


# ---- DTensors


def local(tensor: Any) -> Any:
    """Return this rank's shard of a DTensor, anything else as it is."""
    if not (isinstance(tensor, Tensor) and is_dtensor(tensor)):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()  # type: ignore[attr-defined]


def like(shard: Tensor, param: Any) -> Any:
    """Return the DTensor of which ``shard`` is this rank's part, placed as ``param`` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def shard_groups(param: Any) -> tuple[Any, ...]:
    """Return the process groups, one after the other, over which sums over ``param``'s shards are to be added up."""
    if not is_dtensor(param):
        return ()
    mesh, placements = param.device_mesh, param.placements
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def shard_index(param: Any) -> int:
    """Return which of all shards this rank's is: 0 to their number."""
    index = 0
    for group in shard_groups(param):
        index = index * dist.get_world_size(group) + dist.get_rank(group)
    return index


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 keeps gathered, so that it gathers them anew: the shards were written."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def averaging_group(sync: Sync, model: nn.Module | None) -> Any:
    """Return the process group of a DistributedDataParallel where ``sync`` is "last", None where it is "every".

    Raises:
        ValueError: ``sync`` is neither, or ``model`` is no DistributedDataParallel, or one of a static graph; why, and
            what to do.
    """
    if checks.choice("sync", sync, Sync) == "every":
        return None
    if isinstance(model, nn.parallel.DistributedDataParallel):
        if model.static_graph:
            raise ValueError(
                'sync="last" with DistributedDataParallel(static_graph=True), which counts on every pass being reduced '
                'alike: leave out static_graph, or use sync="every"'
            )
        return model.process_group
    uninitialised = "" if dist.is_available() and dist.is_initialized() else (
        " (torch.distributed is not initialised: start with torchrun, and call init_process_group() first)"
    )  # fmt: skip
    raise ValueError(
        f'sync="last" with model={type(model).__name__}: pass model=DistributedDataParallel(...), whose gradients to '
        f"keep local until the last pass{uninitialised}"
    )


def average(buffer: Tensor, group: Any) -> None:
    """Add up every rank's share of a mean, in place, the same bits on all ranks.

    Raises:
        RuntimeError: a rank did not take part.
    """
    try:
        dist.all_reduce(buffer, group=group)
    except RuntimeError as error:
        raise _absent(error) from error


def _absent(error: RuntimeError) -> RuntimeError:
    return RuntimeError(
        "a rank did not take part in the optimizer's collective: it raised, ended, or called other phases; see its own "
        f"error. restore() gives up this step. ({error})"
    )


class Exchange:
    """A row of numbers from every rank of a group, of which the last must be the same on all.

    On a CPU a disagreement raises. On a GPU, which is not waited for, all rows become NaN, so that every rank skips
    its step, and a later call raises, when the host has learned of it.

    Args:
        group: the process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.ranks = dist.get_world_size(group)
        self._told: deque[tuple[Any, Tensor, Sequence[str]]] = deque()  # on its way from a GPU: arrival, which differ

    def __call__(self, row: Tensor, alike: Sequence[Tensor | float], meaning: Sequence[str]) -> Tensor:
        """Return every rank's row: (ranks, len(row)), the same bits on all ranks.

        Args:
            row: float64, of one length on all ranks.
            alike: numbers that must be the same on all ranks; NaN is the same as any.
            meaning: of each, what a difference means.

        Raises:
            RuntimeError: ranks differ in ``alike``, on each of them; or a rank did not take part within the group's
                timeout (with NCCL, torch's watchdog ends the process instead).
        """
        self._raise_what_came()
        tail = [x if isinstance(x, Tensor) else row.new_full((), x) for x in alike]
        rows = self._gather(torch.cat([row, torch.stack(tail)]))
        said = rows[:, len(row) :]
        differ = (said != said[0]) & ~said.isnan() & ~said[0].isnan()
        if rows.is_cpu:
            self._raise(differ.any(0).tolist(), meaning)
            return rows[:, : len(row)]
        arrived = torch.empty(len(alike), dtype=torch.bool, device="cpu", pin_memory=True)
        event = torch.cuda.Event()
        arrived.copy_(differ.any(0), non_blocking=True)
        event.record(torch.cuda.current_stream(rows.device))
        self._told.append((event, arrived, meaning))
        return rows[:, : len(row)].masked_fill(differ.any(), torch.nan)

    def _gather(self, row: Tensor) -> Tensor:
        # One buffer for all, and no copy out of it; so it was called before torch 2.13.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        rows = row.new_empty(self.ranks * len(row))
        try:
            gather(rows, row, group=self.group)
        except RuntimeError as error:
            raise _absent(error) from error
        return rows.view(self.ranks, len(row))

    def _raise_what_came(self) -> None:
        while self._told and self._told[0][0].query():
            _, arrived, meaning = self._told.popleft()
            self._raise(arrived.tolist(), meaning)

    def _raise(self, differ: Sequence[bool], meaning: Sequence[str]) -> None:
        wrong = "; ".join(what for found, what in zip(differ, meaning, strict=True) if found)
        if wrong:
            raise RuntimeError(f"the {self.ranks} ranks disagree: {wrong}")
