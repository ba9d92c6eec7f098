"""Stochastic rounding of bfloat16 and float16 in plain torch: the twin of csrc/rounding.h, bit for bit.

32-bit unsigned integers are int64 tensors here, or Python's.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

TO_MAX, TO_MIN, WEIGHT, FIRST_STATE, SECOND_STATE, TO_HISTORY = range(6)
"""What is rounded in a step, each with bits of its own."""

_GOLDEN = 0x9E3779B9
_WORD = 0xFFFFFFFF
Word = TypeVar("Word", int, Tensor)


def _mixed(x: Word) -> Word:
    """Return a bijection that looks random: lowbias32, of https://nullprogram.com/blog/2018/07/31/."""
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15) * 0x846CA68B & _WORD
    return x ^ x >> 16


def tensor_key(seed: int, group: int, index: int) -> int:
    """Return the key of a parameter, by its param group and its index there."""
    return _mixed(_mixed(_mixed(seed + _GOLDEN & _WORD) + group & _WORD) + index & _WORD)


def random_bits(key: int, step: Tensor, operand: int, i: Tensor) -> Tensor:
    """Return 32 random bits for each element ``i`` (in memory order) of an operand of a parameter, in a step.

    Args:
        key: the parameter's, of `tensor_key`.
        step: int64 (): steps before this one.
        operand: `TO_MAX` and its like.
        i: int64, any shape.
    """
    first = _mixed(_mixed(key + step & _WORD) + operand & _WORD)
    second = _mixed(first + _GOLDEN & _WORD)
    x = (i & _WORD) ^ first
    x = (x ^ x >> 16) * 0x7FEB352D & _WORD
    x = (x ^ x >> 15 ^ second) * 0x846CA68B & _WORD
    return x ^ x >> 16


def update_start(weight: Tensor, master: Tensor) -> Tensor:
    """Return master weights, but a weight itself where it is not the master's rounding: somebody has set it since."""
    same = master.to(weight.dtype).view(torch.int16) == weight.view(torch.int16)
    return torch.where(same, master, weight.to(master.dtype))


def rounded(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Return float32 ``x`` as bfloat16 or float16: up with probability (x − a) / (b − a) between neighbours a, b.

    From the largest finite number on, and for NaN, to nearest. ``random``: of `random_bits`, in x's shape.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    magnitude = x.abs()
    bits = magnitude.view(torch.int32).to(torch.int64) + (random >> (32 - dropped))
    up = (bits >> dropped << dropped).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:  # subnormal results are multiples of 2^-24
        subnormal = (magnitude * 2.0**24 + (random >> 19) * 2.0**-13).floor() * 2.0**-24
        up = torch.where(magnitude < 2.0**-14, subnormal, up)
    return torch.where(magnitude < torch.finfo(dtype).max, torch.copysign(up, x), x).to(dtype)
