"""The Triton kernels that perturb, and that sum: triton_math.py's formulas over all tensors of a launch.

S is the type as stored, T the one computed with; triton_pieces.py has what chunks, addresses and WHOLE are. Elements
are loaded before scalars are worked out, so that the one does not wait for the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bsam_fused.ops.triton_directions import (
    ASCENT,
    EXTRAPOLATED,
    MAX,
    MIN,
    NUMBERS,
    PRODUCT,
    SQUARE,
    has_both,
    last_slot,
)
from bsam_fused.ops.triton_math import (
    adaptivity,
    both_gradients,
    extrapolated_gradient,
    friendly_gradient,
    is_finite,
    is_too_long,
    perturbed,
    plus_product,
    plus_square,
    step_length,
)
from bsam_fused.ops.triton_pieces import (
    ASCENDED,
    PERTURBED,
    added_up,
    is_last,
    is_variant,
    load,
    only_if,
    partial,
    piece,
    store,
)
from bsam_fused.ops.triton_rounding import TO_MAX, TO_MIN, rounded

# Options come in float64 rows, a param group each: radius, adaptive, eta, largest, budget, norm_eps, limit.
RADIUS_OPTIONS = tl.constexpr(7)

NOT_SPECIALIZED = ["chunks", "slot"]

# ---- the scalars of a step


@triton.jit
def _reach(rows: tl.tensor, group: tl.tensor, sum_ascent: tl.tensor, T: tl.constexpr) -> tl.tuple:
    """Return step, η and whether T is adaptive, of a param group."""
    o = rows + RADIUS_OPTIONS * group
    step = step_length(tl.load(o), tl.load(o + 4), sum_ascent, tl.load(o + 5))
    return step.to(T), tl.load(o + 2).to(T), tl.load(o + 1) != 0


@triton.jit
def _is_out_of_reach(rows: tl.tensor, sum_ascent: tl.tensor) -> tl.tensor:
    """Whether a step length is beyond the limit: nothing is perturbed then, and the step will be skipped."""
    return step_length(tl.load(rows + 3), float("inf"), sum_ascent, tl.load(rows + 5)) > tl.load(rows + 6)


# ---- the operators


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def square_norm(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    sums: tl.tensor,
    slot: tl.tensor,
    partials: tl.tensor,
    ticket: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """sums[slot] = Σ (T g)², g in `now`."""
    total = tl.zeros((CHUNK,), tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, _, _, _, count, _, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        _, eta, adaptive = _reach(rows, group, 0.0, T)  # w is not read where it is not needed
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                slope = load(now, count, S, CHUNK, WHOLE).to(T)
                x = load(only_if(adaptive, w), count, S, CHUNK, WHOLE).to(T)
                total = plus_square(total, slope, adaptivity(x, slope, eta, adaptive))
    partial(total, partials, 0)
    if is_last(ticket):
        tl.store(sums + slot, added_up(partials, 0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def mix(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    numbers: tl.tensor,
    sums: tl.tensor,
    history: tl.tensor,
    partials: tl.tensor,
    ticket: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """q = g − σ m, g in `now`, into g; Σ (T q)², Σ m², Σ q²."""
    total = tl.zeros((CHUNK,), tl.float64)
    squares = tl.zeros((CHUNK,), tl.float64)
    of_q = tl.zeros((CHUNK,), tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, _, _, _, count, flat, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        _, eta, adaptive = _reach(rows, group, 0.0, T)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                slope = load(now, count, S, CHUNK, WHOLE).to(T)
                m = load(history + flat, count, S, CHUNK, WHOLE).to(T)
                x = load(only_if(adaptive, w), count, S, CHUNK, WHOLE).to(T)
                q = friendly_gradient(slope, m, tl.load(numbers + NUMBERS * group).to(T), MOST).to(S)
                store(g, q, count, S, CHUNK, WHOLE)
                q = q.to(T)
                total = plus_square(total, q, adaptivity(x, q, eta, adaptive))
                squares = plus_product(squares, m, m)
                of_q = plus_product(of_q, q, q)
    partial(total, partials, 0)
    partial(squares, partials, 1)
    partial(of_q, partials, 2)
    if is_last(ticket):
        tl.store(sums + ASCENT, added_up(partials, 0))
        tl.store(sums + SQUARE, added_up(partials, 1))
        tl.store(sums + PRODUCT, added_up(partials, 2))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def direction_sums(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    sums: tl.tensor,
    numbers: tl.tensor,
    partials: tl.tensor,
    ticket: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    RULE: tl.constexpr,
) -> None:
    """Σ y², Σ x², Σ x y of d = a x + b y, x in g, y in `now`; Σ g_max² and Σ ĝ_min², where that is extrapolated."""
    of_last = tl.zeros((CHUNK,), tl.float64)
    squares = tl.zeros((CHUNK,), tl.float64)
    products = tl.zeros((CHUNK,), tl.float64)
    of_min = tl.zeros((CHUNK,), tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, _, flags, _, count, _, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        both = has_both(flags, now)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                x = load(g, count, S, CHUNK, WHOLE).to(T)
                y = load(now, count, S, CHUNK, WHOLE).to(T)
                of_last = plus_product(of_last, y, y)
                if RULE == EXTRAPOLATED:
                    r = tl.load(numbers + NUMBERS * group).to(T)
                    y_min = tl.where(both, extrapolated_gradient(x, y, r), 0.0)
                    x, y = both_gradients(x, y), y_min
                    of_min = plus_product(of_min, y, y)
                squares = plus_product(squares, x, x)
                products = plus_product(products, x, y)
    partial(of_last, partials, 0)
    partial(squares, partials, 1)
    partial(products, partials, 2)
    if RULE == EXTRAPOLATED:
        partial(of_min, partials, 3)
    if is_last(ticket):
        tl.store(sums + last_slot(RULE), added_up(partials, 0))
        tl.store(sums + SQUARE, added_up(partials, 1))
        tl.store(sums + PRODUCT, added_up(partials, 2))
        if RULE == EXTRAPOLATED:
            tl.store(sums + MIN, added_up(partials, 3))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def ascend(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    sums: tl.tensor,
    own_sums: tl.tensor,
    saved: tl.tensor,
    step_count: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """saved = w, w = w_max; `now`, g at w, is copied into g where that is there. Σ (T g)² = NaN where out of reach."""
    sum_ascent = tl.load(sums + ASCENT)
    beyond = _is_out_of_reach(rows, sum_ascent)
    finite = is_finite(sum_ascent) & (beyond == 0)
    # A program that reads it from here on finds a sum that is not finite, and leaves w alone as well.
    tl.store(own_sums + ASCENT, float("nan"), mask=beyond)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, key, _, begin, count, flat, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                before = load(w, count, S, CHUNK, WHOLE)
                slope = load(now, count, S, CHUNK, WHOLE)
                step, eta, adaptive = _reach(rows, group, sum_ascent, T)
                store(saved + flat, before, count, S, CHUNK, WHOLE)
                store(g, slope, count, S, CHUNK, WHOLE)
                x, slope = before.to(T), slope.to(T)
                x = perturbed(x, slope, adaptivity(x, slope, eta, adaptive), step, MOST)
                x = rounded(x, TO_MAX, key, step_count, begin, S, CHUNK, STOCHASTIC)
                store(only_if(finite, w), x, count, S, CHUNK, WHOLE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def descend(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    sums: tl.tensor,
    own_sums: tl.tensor,
    saved: tl.tensor,
    step_count: tl.tensor,
    partials: tl.tensor,
    ticket: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    """w = w_min from saved, g += g_max in `now`, Σ g_max². Of what did not ascend g_max is copied into g."""
    sum_ascent = tl.load(sums + ASCENT)
    # Where w is out of reach the step length becomes NaN, and w stays, as where the sum is not finite.
    sum_ascent = tl.where(_is_out_of_reach(rows, sum_ascent), float("nan"), sum_ascent)
    sum_max = tl.zeros((CHUNK,), tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, key, flags, begin, count, flat, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        moved, ascended = (flags & PERTURBED) != 0, (flags & ASCENDED) != 0
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                x = load(only_if(moved, saved + flat), count, S, CHUNK, WHOLE).to(T)
                slope = load(only_if(ascended, g), count, S, CHUNK, WHOLE).to(T)
                g_max = load(now, count, S, CHUNK, WHOLE).to(T)
                step, eta, adaptive = _reach(rows, group, sum_ascent, T)
                x = perturbed(x, slope, adaptivity(x, slope, eta, adaptive), step, MOST)
                x = rounded(x, TO_MIN, key, step_count, begin, S, CHUNK, STOCHASTIC)
                store(only_if(moved, w), x, count, S, CHUNK, WHOLE)
                s = both_gradients(slope, g_max).to(S)
                store(g, s, count, S, CHUNK, WHOLE)
                g_max = tl.where(is_too_long(s.to(T)), float("nan"), g_max)
                sum_max = plus_product(sum_max, g_max, g_max)
    partial(sum_max, partials, 0)
    if is_last(ticket):
        beyond = _is_out_of_reach(rows, tl.load(sums + ASCENT))
        tl.store(own_sums + MAX, tl.where(beyond, float("nan"), added_up(partials, 0)))
