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

_HALF = torch.finfo(torch.float16).max


def average(
    flats: Sequence[FlatParams], sums: Sequence[Tensor], mixing: Mixing, summed: bool, rows: Tensor, group: Any
) -> Tensor | None:
    """Make the mean of all ranks' d the gradients of ``flats``, and `MAX` the sum of its squares.

    Float16 may not hold d, mixed of gradients that it just holds, at the scale of the loss. There it is averaged at a
    lower one.

    Args:
        flats: all FlatParams, at least one.
        sums: of each, this rank's: a copy, with what a user's own rule gives.
        mixing: of d.
        summed: whether the sums are by `direction_sums`.
        rows: every rank's ``sums``, (ranks, `SLOTS`), the same bits on all.
        group: of the ranks.

    Returns:
        The scale that these gradients have, where there are float16 ones; else it is as it was.
    """
    room = None
    if any(flat.params[0].dtype == torch.float16 for flat in flats):
        largest = max(number.largest for number in mixing.numbers)
        room = Direction(mixing.rule, summed, math.inf, _HALF, largest).headroom(rows.T)
    for flat, total in zip(flats, sums, strict=True):
        total[SCALE] = 0.0 if room is None else room
        distributed.average(flat.merge(total, 1 / len(rows)), group)
        flat.read_gradients()
        flat.square_norm(MAX, [Radius(0.0)] * len(mixing.numbers))
    scale = flats[0].sums[SCALE]
    return None if room is None else torch.where(scale == 0, 1.0, scale) / room
