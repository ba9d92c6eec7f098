"""The mean over ranks of directions, of which each has mixed its own: what is left to reduce with local passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bsam_fused import distributed
from bsam_fused.ops.contract import MAX, SCALE, FlatParams, Mixing, Radius
from bsam_fused.ops.directions import Direction


def average(flats: Sequence[FlatParams], sums: Sequence[Tensor], mixing: Mixing, rows: Tensor, group: Any) -> bool:
    """Make the mean of all ranks' d the gradients of ``flats``, and `MAX` the sum of its squares.

    Float16 does not hold d where it is mixed of gradients that it just holds, at the scale of the loss. Such d are
    averaged at a lower one, which joins the sums.

    Args:
        flats: all FlatParams, at least one.
        sums: of each, this rank's: a copy, with what a user's own rule gives.
        mixing: of d.
        rows: every rank's ``sums``, (ranks, `SLOTS`), the same bits on all.
        group: of the ranks.

    Returns:
        Whether there is a scale in the sums now.
    """
    lowered = any(param.dtype == torch.float16 for flat in flats for param in flat.params)
    largest = max(number.largest for number in mixing.numbers)
    room = Direction(mixing.rule, True, math.inf, math.inf, largest).headroom(rows.T) if lowered else 0.0
    for flat, total in zip(flats, sums, strict=True):
        total[SCALE] = room
        distributed.average(flat.merge(total, 1 / len(rows)), group)
        flat.read_gradients()
        flat.square_norm(MAX, [Radius(0.0)] * len(mixing.numbers))
    if lowered:
        noted = flats[0].sums
        noted[SCALE] = torch.where(noted[SCALE] == 0, 1.0, noted[SCALE]) / room
    return lowered
