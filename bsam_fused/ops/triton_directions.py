"""How an update's direction comes about: groups.h's Direction for Triton, from the sums and a param group's number.

RULE is a `contract.Rule`. What comes as `numbers` is a table of float64 rows, a param group each: the number, the
largest of all groups, by which all decide alike, the decay, and nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bsam_fused.ops import contract
from bsam_fused.ops.contract import Rule
from bsam_fused.ops.triton_math import (
    averaged,
    bilateral,
    direction_factor,
    extrapolated,
    is_finite,
    last_alone,
    mixed,
    mixed_square,
    norm_ratio,
    orthogonal,
    reused,
    surrogate_gap,
    weighted,
)
from bsam_fused.ops.triton_pieces import ASCENDED, load

ASCENT = tl.constexpr(contract.ASCENT)
MAX = tl.constexpr(contract.MAX)
MIN = tl.constexpr(contract.MIN)
SCALE = tl.constexpr(contract.SCALE)
SQUARE = tl.constexpr(contract.SQUARE)
PRODUCT = tl.constexpr(contract.PRODUCT)
GIVEN_KEPT = tl.constexpr(contract.GIVEN_KEPT)
GIVEN_LAST = tl.constexpr(contract.GIVEN_LAST)

BILATERAL = tl.constexpr(Rule.BILATERAL.value)
EXTRAPOLATED = tl.constexpr(Rule.EXTRAPOLATED.value)
SURROGATE_GAP = tl.constexpr(Rule.SURROGATE_GAP.value)
WEIGHTED = tl.constexpr(Rule.WEIGHTED.value)
GIVEN = tl.constexpr(Rule.GIVEN.value)
ORTHOGONAL = tl.constexpr(Rule.ORTHOGONAL.value)
REUSED = tl.constexpr(Rule.REUSED.value)
FRIENDLY = tl.constexpr(Rule.FRIENDLY.value)

# Of each rule.
MIXES = tl.constexpr(tuple(rule.mixes for rule in Rule))
REMEMBERS = tl.constexpr(tuple(rule.remembers for rule in Rule))
HAS_NUMBER = tl.constexpr(
    tuple(rule not in {Rule.LAST_ALONE, Rule.BILATERAL, Rule.GIVEN, Rule.ORTHOGONAL} for rule in Rule)
)

NUMBERS = tl.constexpr(4)  # a row's length: the address of others takes registers, which updates of float64 lack


@triton.jit
def last_slot(RULE: tl.constexpr) -> tl.constexpr:
    """Where the sum of the last gradient's squares is."""
    if RULE == BILATERAL:
        return MIN
    else:
        return MAX


@triton.jit
def has_both(flags: tl.tensor, now: tl.tensor) -> tl.tensor:
    """Whether a tensor has a gradient of the first pass, and one of the last."""
    return ((flags & ASCENDED) != 0) & (now != 0)


@triton.jit
def rule_number(at: tl.tensor, RULE: tl.constexpr) -> tl.tensor:
    """A number of the rule's, which is not read where it has none."""
    if HAS_NUMBER[RULE]:
        return tl.load(at)
    else:
        return tl.full((), 0.0, tl.float64)


@triton.jit
def ratio_of(sums: tl.tensor, RULE: tl.constexpr) -> tl.tensor:
    """c = ‖g_max‖ / ‖g_min‖, or of ĝ_min, worked out once a program; where the rule has none 0."""
    if RULE == BILATERAL or RULE == EXTRAPOLATED:  # noqa: SIM109  Triton knows no `in`
        return norm_ratio(tl.load(sums + MAX), tl.load(sums + MIN))
    else:
        return tl.full((), 0.0, tl.float64)


@triton.jit
def mix_of(sums: tl.tensor, c: tl.tensor, number: tl.tensor, both: tl.tensor, RULE: tl.constexpr) -> tl.tuple:
    """The coefficients of what was kept and of the last gradient, of a tensor that has `both`, or not: ĝ_min is 0."""
    if RULE == BILATERAL:
        return bilateral(c)
    elif RULE == EXTRAPOLATED:
        kept, last = extrapolated(c, number)
        return tl.where(both, kept, 1.0), tl.where(both, last, 1.0)
    elif RULE == SURROGATE_GAP:
        return surrogate_gap(number, tl.load(sums + PRODUCT), tl.load(sums + MAX))
    elif RULE == WEIGHTED:
        return weighted(number)
    elif RULE == GIVEN:
        return tl.load(sums + GIVEN_KEPT), tl.load(sums + GIVEN_LAST)
    elif RULE == REUSED:
        return reused(number, tl.load(sums + MAX), tl.load(sums + SQUARE))
    else:
        return last_alone()


@triton.jit
def factor_of(sums: tl.tensor, c: tl.tensor, largest: tl.tensor, max_norm: tl.tensor, RULE: tl.constexpr) -> tl.tensor:
    """What all of d is multiplied by.

    With the extrapolated rule the sums are of g + g_max and ĝ_min, as if that was measured; the others' are of one mix,
    as groups' numbers may differ only where d is not clipped.
    """
    square = tl.load(sums + last_slot(RULE))
    if MIXES[RULE]:
        if RULE == EXTRAPOLATED:
            kept, last = bilateral(c)
            square = tl.load(sums + MIN)
        else:
            kept, last = mix_of(sums, c, largest, True, RULE)
        square = mixed_square(kept, last, tl.load(sums + SQUARE), tl.load(sums + PRODUCT), square)
    return direction_factor(square, tl.load(sums + SCALE), max_norm)


@triton.jit
def all_finite(sums: tl.tensor) -> tl.tensor:
    """Whether the step's sums are numbers: else it is skipped."""
    both = is_finite(tl.load(sums + ASCENT)) & is_finite(tl.load(sums + MAX))
    return both & is_finite(tl.load(sums + MIN)) & is_finite(tl.load(sums + SCALE))


@triton.jit
def memory_of(sums: tl.tensor, number: tl.tensor, decay: tl.tensor, RULE: tl.constexpr) -> tl.tuple:
    """The coefficients of what was kept, the last gradient and the history, in what that becomes."""
    if RULE == ORTHOGONAL:
        return orthogonal(tl.load(sums + PRODUCT), tl.load(sums + SQUARE))
    else:
        return averaged(number, decay, tl.load(sums + SQUARE))


@triton.jit
def can_remember(sums: tl.tensor, largest: tl.tensor, limit: tl.tensor, RULE: tl.constexpr) -> tl.tensor:
    """Whether neither coefficients of the history nor it can be beyond the limit, of any group: λ is at most 1."""
    norm = tl.sqrt(tl.load(sums + SQUARE))
    if RULE == FRIENDLY:
        return tl.sqrt(tl.load(sums + PRODUCT)) + tl.maximum(largest, 1.0) * norm <= limit
    else:
        kept, _, _ = memory_of(sums, largest, largest, RULE)
        kept = tl.abs(kept)
        return (kept <= limit) & (kept * norm + tl.sqrt(tl.load(sums + MAX)) <= limit)


@triton.jit
def longest_kept(
    sums: tl.tensor, a: tl.tensor, square_slot: tl.tensor, limit: tl.tensor, RULE: tl.constexpr
) -> tl.tensor:
    """What no element of a x, x what was kept, can be beyond.

    Of exact BSAM's x descend saw to limit / 2, which is enough but where the loss was scaled below 1: a is above 1.
    """
    square = tl.load(sums + square_slot)
    if RULE == BILATERAL:
        norms = tl.sqrt(square) + tl.sqrt(tl.load(sums + MAX))
        return a * tl.where(a <= 1, limit / 2, norms)
    else:
        if RULE == EXTRAPOLATED:
            square += tl.load(sums + MAX) + tl.load(sums + MIN)
        return a * tl.sqrt(square)


@triton.jit
def direction_of(
    sums: tl.tensor, numbers: tl.tensor, rows: tl.tensor, square_slot: tl.tensor, RULE: tl.constexpr
) -> tl.tuple:
    """Return whether an update can be made, c, and what all of d is multiplied by.

    It cannot where the sums are not finite, or a coefficient or d, of any group, may be beyond the limit: they are
    monotonous in the number. rows: max_norm, limit. `square_slot`: where a sum of what was kept is.
    """
    limit = tl.load(rows + 1)
    c, largest = ratio_of(sums, RULE), rule_number(numbers + 1, RULE)
    factor = factor_of(sums, c, largest, tl.load(rows), RULE)
    longest_last = tl.sqrt(tl.load(sums + last_slot(RULE)))
    if not MIXES[RULE]:
        within = (factor <= 1) | (factor * longest_last <= limit)
        if REMEMBERS[RULE]:
            within = within & can_remember(sums, largest, limit, RULE)
    else:
        most_kept, most_last = mix_of(sums, c, largest, True, RULE)
        least_kept, least_last = mix_of(sums, c, tl.full((), 0.0, tl.float64), RULE != EXTRAPOLATED, RULE)
        a = tl.maximum(tl.abs(factor * most_kept), tl.abs(factor * least_kept))
        b = tl.maximum(tl.abs(factor * most_last), tl.abs(factor * least_last))
        longest = longest_kept(sums, a, square_slot, limit, RULE) + b * longest_last
        within = (factor > 0) & (a <= limit) & (b <= limit) & (longest <= limit)  # 0: ‖d‖ is beyond float64
    return all_finite(sums) & within, c, factor


# ---- elements


@triton.jit
def gradients(
    g: tl.tensor,
    now: tl.tensor,
    count: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    RULE: tl.constexpr,
) -> tl.tuple:
    """What was kept, or where d is of nothing kept the last gradient, and that."""
    last = load(now, count, S, CHUNK, WHOLE).to(T)
    if MIXES[RULE]:
        return load(g, count, S, CHUNK, WHOLE).to(T), last
    else:
        return last, last


@triton.jit
def mixed_of(
    kept: tl.tensor, x: tl.tensor, last: tl.tensor, y: tl.tensor, T: tl.constexpr, RULE: tl.constexpr
) -> tl.tensor:
    """d of elements, from the coefficients `kept` and `last`."""
    if MIXES[RULE]:
        return mixed(kept.to(T), x, last.to(T), y)
    else:
        return last.to(T) * y
