"""Stochastic rounding of bfloat16 and float16 for Triton: csrc/rounding.h's twin, bit for bit, under the same names."""

from __future__ import annotations

import triton
import triton.language as tl

from bsam_fused.ops import rounding

TO_MAX = tl.constexpr(rounding.TO_MAX)
TO_MIN = tl.constexpr(rounding.TO_MIN)
WEIGHT = tl.constexpr(rounding.WEIGHT)
FIRST_STATE = tl.constexpr(rounding.FIRST_STATE)
SECOND_STATE = tl.constexpr(rounding.SECOND_STATE)
TO_HISTORY = tl.constexpr(rounding.TO_HISTORY)


@triton.jit
def word(x: tl.tensor) -> tl.tensor:
    """x modulo 2^32."""
    return x.to(tl.uint32)


@triton.jit
def mixed(x: tl.tensor) -> tl.tensor:
    """A bijection that looks random: lowbias32, of https://nullprogram.com/blog/2018/07/31/."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def step_key(tensor_key: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Of a parameter in a step, the count of steps before it."""
    return mixed(word(tensor_key) + word(step))


@triton.jit
def draw(step_key: tl.tensor, operand: tl.tensor) -> tl.tuple:
    """Of an operand: two keys, so that no two streams are the same numbers in another order."""
    first = mixed(step_key + tl.full((), operand, tl.uint32))
    return first, mixed(first + tl.full((), 0x9E3779B9, tl.uint32))


@triton.jit
def random_bits(step_key: tl.tensor, operand: tl.tensor, i: tl.tensor) -> tl.tensor:
    """32 bits, of which the upper ones are used, for the i-th element in memory order (modulo 2^32)."""
    first, second = draw(step_key, operand)
    x = word(i) ^ first
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15) ^ second) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def stochastic(x: tl.tensor, random: tl.tensor, S: tl.constexpr) -> tl.tensor:
    """float32 x as S, up with probability (x − a) / (b − a) between neighbours a, b.

    From the largest finite number on, rounding is to nearest; NaN stays NaN.
    """
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if tl.bfloat16 == S:
        up = ((magnitude + (random >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        largest = 0x7F7F0000
    else:
        up = ((magnitude + (random >> 19)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Subnormal results are multiples of 2^-24.
        small = tl.where(magnitude < 0x38800000, tl.abs(x), 0.0)
        share = (random >> 19).to(tl.int32).to(tl.float32) * (1.0 / 8192)
        subnormal = (small * 16777216.0 + share).to(tl.int32).to(tl.float32) * (1.0 / 16777216)
        up = tl.where(magnitude < 0x38800000, subnormal, up)
        largest = 0x477FE000
    chosen = (up.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(magnitude < largest, chosen, x).to(S)


@triton.jit
def update_start(weight: tl.tensor, master: tl.tensor) -> tl.tensor:
    """The master weight, but the weight itself where it is not the master's rounding: somebody has set it since."""
    same = master.to(weight.dtype).to(tl.int16, bitcast=True) == weight.to(tl.int16, bitcast=True)
    return tl.where(same, master, weight.to(tl.float32))


@triton.jit
def rounded(
    x: tl.tensor,
    operand: tl.constexpr,
    key: tl.tensor,
    step_count: tl.tensor,
    begin: tl.tensor,
    S: tl.constexpr,
    CHUNK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> tl.tensor:
    """x, whose first element is the tensor's `begin`-th, as S."""
    if STOCHASTIC:
        i = word(begin) + word(tl.arange(0, CHUNK))
        return stochastic(x, random_bits(step_key(key, tl.load(step_count)), operand, i), S)
    else:
        return x.to(S)
