"""Which parameters are in one FlatParams: those of a kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsam_fused import distributed
from bsam_fused.ops import contract
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
