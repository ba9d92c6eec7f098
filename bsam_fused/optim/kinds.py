"""Which parameters are in one FlatParams: those of a kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bsam_fused import distributed
from bsam_fused.ops import contract
from bsam_fused.ops.memory import is_in_storage
from bsam_fused.optim.groups import takes_part

Groups = Sequence[dict[str, Any]]
Kind = tuple[Any, ...]
"""Device, dtype, whether they are DTensors, the process groups of the shards, and whether they are exempt."""


def by_kind(
    groups: Groups, exempt: Sequence[bool], known: set[int]
) -> tuple[dict[Kind, tuple[list[Tensor], list[tuple[int, int]]]], list[Tensor]]:
    """Return the parameters of each kind with their places, and those that are frozen; none that is ``known``.

    Raises:
        RuntimeError: one is uninitialized, or on meta.
    """
    kinds: dict[Kind, tuple[list[Tensor], list[tuple[int, int]]]] = {}
    frozen = []
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            if id(param) in known:
                continue
            if not takes_part(param):
                frozen.append(param)
                continue
            if torch.nn.parameter.is_lazy(param):
                raise RuntimeError(f"{contract.describe(param, (i, j))}: run a forward pass before the first step")
            if param.is_meta:
                raise RuntimeError(
                    f"{contract.describe(param, (i, j))} is on meta, without values: build the optimizer after the "
                    "model has its memory, as to_empty() makes new parameters; or put those into param_groups"
                )
            kind = param.device, param.dtype, distributed.is_dtensor(param), distributed.shard_groups(param), exempt[i]
            params, places = kinds.setdefault(kind, ([], []))
            params.append(param)
            places.append((i, j))
    return kinds, frozen


def check_memory(kinds: Iterable[tuple[Sequence[Tensor], Sequence[tuple[int, int]]]]) -> None:
    """Raise where two parameters share memory: perturbing both would perturb it twice.

    Looks at parameters that have memory, which their elements fill; interleaved ones (columns of one matrix) are taken
    as they are.

    Args:
        kinds: the parameters of each, and their places.

    Raises:
        ValueError: two of them overlap, or one overlaps itself (expanded).
    """
    named = [(distributed.local(p), place) for kind in kinds for p, place in zip(*kind, strict=True)]
    for param, place in named:
        if any(size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)):
            raise ValueError(f"{contract.describe(param, place)} is expanded, its elements share memory: clone() it")

    spans = sorted(
        (str(param.device), param.data_ptr(), param.data_ptr() + param.nbytes, i)
        for i, (param, _) in enumerate(named)
        if param.numel() and _is_dense(param) and is_in_storage(param)
    )
    for (device, _, end, i), (other, begin, _, j) in pairwise(spans):
        if device == other and begin < end:
            raise ValueError(
                f"{contract.describe(*named[j])} shares memory with {contract.describe(*named[i])}: tie weights by "
                "using one Parameter in both places, not by sharing .data"
            )


def _is_dense(param: Tensor) -> bool:
    return torch.empty_like(param, device="meta").stride() == param.stride()
