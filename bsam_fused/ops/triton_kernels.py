"""The Triton kernels: triton_math.py's formulas over all tensors of a launch.

S is the type as stored, T the one computed with; triton_pieces.py has what chunks, addresses and WHOLE are. Elements
are loaded before scalars are worked out, so that the one does not wait for the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bsam_fused.ops import contract
from bsam_fused.ops.triton_math import (
    adam,
    adam_rule,
    adaptivity,
    bilateral_coefficient,
    bilateral_direction,
    bilateral_square,
    direction_factor,
    direction_so_far,
    is_finite,
    is_too_long,
    perturbed,
    plus_product,
    plus_square,
    sgd,
    sgd_rule,
    step_length,
)
from bsam_fused.ops.triton_pieces import (
    COUNTED,
    PARTIALS,
    PERTURBED,
    ROW,
    added_up,
    is_last,
    is_variant,
    load,
    only_if,
    partial,
    piece,
    store,
)
from bsam_fused.ops.triton_rounding import (
    FIRST_STATE,
    SECOND_STATE,
    TO_MAX,
    TO_MIN,
    WEIGHT,
    random_bits,
    step_key,
    stochastic,
    update_start,
    word,
)

# Options come in float64 rows, a param group each.
RADIUS_OPTIONS = tl.constexpr(6)  # radius, adaptive, eta, largest, norm_eps, limit
SGD_OPTIONS = tl.constexpr(8)  # lr, momentum, dampening, weight_decay, nesterov, maximize, max_norm, limit
ADAM_OPTIONS = tl.constexpr(9)  # lr, beta1, beta2, eps, weight_decay, decoupled, maximize, max_norm, limit

ASCENT = tl.constexpr(contract.ASCENT)
MAX = tl.constexpr(contract.MAX)
MIN = tl.constexpr(contract.MIN)
SCALE = tl.constexpr(contract.SCALE)
SO_FAR = tl.constexpr(contract.SO_FAR)
CROSS = tl.constexpr(contract.CROSS)

NOT_SPECIALIZED = ["chunks", "count", "slot"]

# ---- the scalars of a step


@triton.jit
def _reach(options: tl.tensor, group: tl.tensor, sum_ascent: tl.tensor, T: tl.constexpr) -> tl.tuple:
    """Return step, η and whether T is adaptive, of a param group."""
    o = options + RADIUS_OPTIONS * group
    step = step_length(tl.load(o), sum_ascent, tl.load(o + 4))
    return step.to(T), tl.load(o + 2).to(T), tl.load(o + 1) != 0


@triton.jit
def _is_out_of_reach(options: tl.tensor, sum_ascent: tl.tensor) -> tl.tensor:
    """Whether a step length is beyond the limit: nothing is perturbed then, and the step will be skipped."""
    return step_length(tl.load(options + 3), sum_ascent, tl.load(options + 4)) > tl.load(options + 5)


@triton.jit
def _all_finite(sums: tl.tensor) -> tl.tensor:
    """Whether the step's sums are numbers: else it is skipped."""
    both = is_finite(tl.load(sums + ASCENT)) & is_finite(tl.load(sums + MAX))
    return both & is_finite(tl.load(sums + MIN)) & is_finite(tl.load(sums + SCALE))


@triton.jit
def _direction_scales(sums: tl.tensor, options: tl.tensor, BILATERAL: tl.constexpr) -> tl.tuple:
    """Return whether an update can be made, and what it multiplies by: g_min by c (BSAM), and all of d by a factor.

    It cannot where the sums are not finite, or these, or d, may be beyond the limit: |c g_min,i| ≤ ‖g_max‖, and descend
    saw to g + g_max. options: max_norm, limit.
    """
    max_norm, limit = tl.load(options), tl.load(options + 1)
    norm_max = tl.sqrt(tl.load(sums + MAX))
    if BILATERAL:
        c = bilateral_coefficient(tl.load(sums + MAX), tl.load(sums + MIN))
        square = bilateral_square(tl.load(sums + SO_FAR), tl.load(sums + CROSS), tl.load(sums + MIN), c)
        factor = direction_factor(square, tl.load(sums + SCALE), max_norm)
        within = (c <= limit) & (2 * tl.maximum(factor, 1.0) * norm_max <= limit)
    else:
        c = tl.full((), 0.0, tl.float64)
        factor = direction_factor(tl.load(sums + MAX), tl.load(sums + SCALE), max_norm)
        within = (factor <= 1) | (factor * norm_max <= limit)
    return _all_finite(sums) & within, c, factor


@triton.jit
def _rounded(
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


# ---- the operators


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def square_norm(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    options: tl.tensor,
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
        _, eta, adaptive = _reach(options, group, 0.0, T)  # w is not read where it is not needed
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                slope = load(now, count, S, CHUNK, WHOLE).to(T)
                x = load(only_if(adaptive, w), count, S, CHUNK, WHOLE).to(T)
                total = plus_square(total, slope, adaptivity(x, slope, eta, adaptive))
    partial(total, partials, 0)
    if is_last(ticket):
        tl.store(sums + slot, added_up(partials, 0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def direction_sums(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    sums: tl.tensor,
    partials: tl.tensor,
    ticket: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Σ g_min², Σ s², Σ s g_min; s = g + g_max in g, g_min in `now`."""
    of_min = tl.zeros((CHUNK,), tl.float64)
    so_far = tl.zeros((CHUNK,), tl.float64)
    cross = tl.zeros((CHUNK,), tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, _, _, _, _, count, _, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                s = load(g, count, S, CHUNK, WHOLE).to(T)
                g_min = load(now, count, S, CHUNK, WHOLE).to(T)
                of_min = plus_product(of_min, g_min, g_min)
                so_far = plus_product(so_far, s, s)
                cross = plus_product(cross, s, g_min)
    partial(of_min, partials, 0)
    partial(so_far, partials, 1)
    partial(cross, partials, 2)
    if is_last(ticket):
        tl.store(sums + MIN, added_up(partials, 0))
        tl.store(sums + SO_FAR, added_up(partials, 1))
        tl.store(sums + CROSS, added_up(partials, 2))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def ascend(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    options: tl.tensor,
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
    beyond = _is_out_of_reach(options, sum_ascent)
    finite = is_finite(sum_ascent) & (beyond == 0)
    # A program that reads it from here on finds a sum that is not finite, and leaves w alone as well.
    tl.store(own_sums + ASCENT, float("nan"), mask=beyond)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, key, _, begin, count, flat, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                before = load(w, count, S, CHUNK, WHOLE)
                slope = load(now, count, S, CHUNK, WHOLE)
                step, eta, adaptive = _reach(options, group, sum_ascent, T)
                store(saved + flat, before, count, S, CHUNK, WHOLE)
                store(g, slope, count, S, CHUNK, WHOLE)
                x, slope = before.to(T), slope.to(T)
                x = perturbed(x, slope, adaptivity(x, slope, eta, adaptive), step, MOST)
                x = _rounded(x, TO_MAX, key, step_count, begin, S, CHUNK, STOCHASTIC)
                store(only_if(finite, w), x, count, S, CHUNK, WHOLE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def descend(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    options: tl.tensor,
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
    """w = w_min from saved, g += g_max in `now`, Σ g_max². Of what is not perturbed g_max is copied into g."""
    sum_ascent = tl.load(sums + ASCENT)
    # Where w is out of reach the step length becomes NaN, and w stays, as where the sum is not finite.
    sum_ascent = tl.where(_is_out_of_reach(options, sum_ascent), float("nan"), sum_ascent)
    sum_max = tl.zeros((CHUNK,), tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, key, flags, begin, count, flat, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        moved = (flags & PERTURBED) != 0
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                x = load(only_if(moved, saved + flat), count, S, CHUNK, WHOLE).to(T)
                slope = load(only_if(moved, g), count, S, CHUNK, WHOLE).to(T)
                g_max = load(now, count, S, CHUNK, WHOLE).to(T)
                step, eta, adaptive = _reach(options, group, sum_ascent, T)
                x = perturbed(x, slope, adaptivity(x, slope, eta, adaptive), step, MOST)
                x = _rounded(x, TO_MIN, key, step_count, begin, S, CHUNK, STOCHASTIC)
                store(only_if(moved, w), x, count, S, CHUNK, WHOLE)
                s = direction_so_far(slope, g_max).to(S)
                store(g, s, count, S, CHUNK, WHOLE)
                g_max = tl.where(is_too_long(s.to(T)), float("nan"), g_max)
                sum_max = plus_product(sum_max, g_max, g_max)
    partial(sum_max, partials, 0)
    if is_last(ticket):
        beyond = _is_out_of_reach(options, tl.load(sums + ASCENT))
        tl.store(own_sums + MAX, tl.where(beyond, float("nan"), added_up(partials, 0)))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def direction(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    options: tl.tensor,
    sums: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    BILATERAL: tl.constexpr,
) -> None:
    """d, into what stands for w: g + g_max − c g_min, or g_max (SAM), times its factor; options: max_norm, limit."""
    _finite, c, factor = _direction_scales(sums, options, BILATERAL)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, _, _, _, _, count, _, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                d = _direction(g, now, c.to(T), count, S, T, CHUNK, WHOLE, BILATERAL)
                store(w, factor.to(T) * d, count, S, CHUNK, WHOLE)


@triton.jit
def _direction(
    g: tl.tensor,
    now: tl.tensor,
    c: tl.tensor,
    count: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    WHOLE: tl.constexpr,
    BILATERAL: tl.constexpr,
) -> tl.tensor:
    last = load(now, count, S, CHUNK, WHOLE).to(T)
    if BILATERAL:
        return bilateral_direction(load(g, count, S, CHUNK, WHOLE).to(T), last, c)
    else:
        return last


@triton.jit
def _count(
    pointers: tl.tensor,
    count: tl.tensor,
    finite: tl.tensor,
    step_count: tl.tensor,
    steps: tl.tensor,
    skipped: tl.tensor,
) -> None:
    """Count a step: of each tensor with state and in all, or as skipped."""
    for first in range(0, count, PARTIALS):
        i = first + tl.arange(0, PARTIALS)
        flags = tl.load(pointers + ROW * i + 3, mask=i < count, other=0)
        counted = (flags & COUNTED) != 0
        made = tl.load(steps + i, mask=counted, other=0.0)
        tl.store(steps + i, made + tl.where(finite, 1.0, 0.0), mask=counted)
    tl.store(step_count, tl.load(step_count) + 1)
    tl.store(skipped, tl.load(skipped) + tl.where(finite, 0, 1))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def update_sgd(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    options: tl.tensor,
    sums: tl.tensor,
    saved: tl.tensor,
    master: tl.tensor,
    step_count: tl.tensor,
    steps: tl.tensor,
    skipped: tl.tensor,
    ticket: tl.tensor,
    momentum_buffer: tl.tensor,
    count: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASTER: tl.constexpr,
    BILATERAL: tl.constexpr,
    FROM_SAVED: tl.constexpr,
) -> None:
    """torch.optim.SGD's rule, from saved where perturbed and FROM_SAVED, else from w; where skipped, w = saved.

    With MASTER from float32 master weights and to them, w their rounding to nearest.
    """
    finite, c, factor = _direction_scales(sums, options + 6, BILATERAL)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor, group, key, flags, begin, n, flat, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        master_at = master + 2 * flat  # float32 takes twice the bytes of 16-bit parameters
        moved = (flags & PERTURBED) != 0
        back = moved if FROM_SAVED else moved & (finite == 0)  # where the step starts from
        m_at = only_if((flags & COUNTED) != 0, momentum_buffer + flat)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, n, w, g, now, CHUNK):
                start = load(tl.where(back, saved + flat, w), n, S, CHUNK, WHOLE)
                x = update_start(start, load(master_at, n, T, CHUNK, WHOLE)) if MASTER else start.to(T)
                d = _direction(g, now, c.to(T), n, S, T, CHUNK, WHOLE, BILATERAL)
                m = load(m_at, n, S, CHUNK, WHOLE).to(T)
                o = options + SGD_OPTIONS * group
                of_gradient, keep, take, of_d, of_m = sgd_rule(
                    tl.load(o + 1),
                    tl.load(o + 2),
                    tl.load(o + 4) != 0,
                    tl.load(o + 5) != 0,
                    tl.load(steps + tensor) == 0,
                    factor,
                )
                new, m = sgd(
                    x,
                    d,
                    m,
                    tl.load(o).to(T),
                    tl.load(o + 3).to(T),
                    of_gradient.to(T),
                    keep.to(T),
                    take.to(T),
                    of_d.to(T),
                    of_m.to(T),
                )
                if MASTER:
                    store(only_if(finite, master_at), new, n, T, CHUNK, WHOLE)
                new = tl.where(finite, new, x)
                new = _rounded(new, WEIGHT, key, step_count, begin, S, CHUNK, STOCHASTIC and not MASTER)
                m = _rounded(m, FIRST_STATE, key, step_count, begin, S, CHUNK, STOCHASTIC)
                store(only_if(finite | moved, w), new, n, S, CHUNK, WHOLE)
                store(only_if(finite, m_at), m, n, S, CHUNK, WHOLE)
    if is_last(ticket):
        _count(pointers, count, finite, step_count, steps, skipped)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def update_adam(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    options: tl.tensor,
    sums: tl.tensor,
    saved: tl.tensor,
    master: tl.tensor,
    step_count: tl.tensor,
    steps: tl.tensor,
    skipped: tl.tensor,
    ticket: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    count: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MASTER: tl.constexpr,
    BILATERAL: tl.constexpr,
    FROM_SAVED: tl.constexpr,
) -> None:
    """torch.optim.Adam's and AdamW's rule, otherwise as `update_sgd`."""
    finite, c, factor = _direction_scales(sums, options + 7, BILATERAL)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        tensor, group, key, flags, begin, n, flat, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        master_at = master + 2 * flat  # float32 takes twice the bytes of 16-bit parameters
        moved = (flags & PERTURBED) != 0
        back = moved if FROM_SAVED else moved & (finite == 0)
        m_at, v_at = exp_avg + flat, exp_avg_sq + flat
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, n, w, g, now, CHUNK):
                start = load(tl.where(back, saved + flat, w), n, S, CHUNK, WHOLE)
                x = update_start(start, load(master_at, n, T, CHUNK, WHOLE)) if MASTER else start.to(T)
                d = _direction(g, now, c.to(T), n, S, T, CHUNK, WHOLE, BILATERAL)
                m = load(m_at, n, S, CHUNK, WHOLE).to(T)
                v = load(v_at, n, S, CHUNK, WHOLE).to(T)
                o = options + ADAM_OPTIONS * group
                beta1, beta2 = tl.load(o + 1), tl.load(o + 2)
                of_gradient, weight_decay, shrink, step_size, sqrt_bias_correction = adam_rule(
                    tl.load(o),
                    beta1,
                    beta2,
                    tl.load(o + 4),
                    tl.load(o + 5) != 0,
                    tl.load(o + 6) != 0,
                    tl.load(steps + tensor).to(tl.float64) + 1,
                    factor,
                )
                new, m, v = adam(
                    x,
                    d,
                    m,
                    v,
                    (1 - beta1).to(T),
                    beta2.to(T),
                    (1 - beta2).to(T),
                    tl.load(o + 3).to(T),
                    of_gradient.to(T),
                    weight_decay.to(T),
                    shrink.to(T),
                    step_size.to(T),
                    sqrt_bias_correction.to(T),
                )
                if MASTER:
                    store(only_if(finite, master_at), new, n, T, CHUNK, WHOLE)
                new = tl.where(finite, new, x)
                new = _rounded(new, WEIGHT, key, step_count, begin, S, CHUNK, STOCHASTIC and not MASTER)
                m = _rounded(m, FIRST_STATE, key, step_count, begin, S, CHUNK, STOCHASTIC)
                v = _rounded(v, SECOND_STATE, key, step_count, begin, S, CHUNK, STOCHASTIC)
                store(only_if(finite | moved, w), new, n, S, CHUNK, WHOLE)
                store(only_if(finite, m_at), m, n, S, CHUNK, WHOLE)
                store(only_if(finite, v_at), v, n, S, CHUNK, WHOLE)
    if is_last(ticket):
        _count(pointers, count, finite, step_count, steps, skipped)
