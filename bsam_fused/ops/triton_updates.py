"""The Triton kernels that end a step: the bases' updates, what is remembered, the direction alone.

Otherwise as triton_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bsam_fused.ops.triton_directions import (
    NUMBERS,
    direction_of,
    factor_of,
    gradients,
    has_both,
    memory_of,
    mix_of,
    mixed_of,
    ratio_of,
    rule_number,
)
from bsam_fused.ops.triton_math import adam, adam_rule, remembered, sgd, sgd_rule
from bsam_fused.ops.triton_pieces import (
    COUNTED,
    PARTIALS,
    PERTURBED,
    ROW,
    is_last,
    is_variant,
    load,
    only_if,
    piece,
    store,
)
from bsam_fused.ops.triton_rounding import FIRST_STATE, SECOND_STATE, TO_HISTORY, WEIGHT, rounded, update_start

# Options come in float64 rows, a param group each.
SGD_OPTIONS = tl.constexpr(8)  # lr, momentum, dampening, weight_decay, nesterov, maximize, max_norm, limit
ADAM_OPTIONS = tl.constexpr(9)  # lr, beta1, beta2, eps, weight_decay, decoupled, maximize, max_norm, limit

NOT_SPECIALIZED = ["chunks", "count", "square_slot"]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def direction(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    numbers: tl.tensor,
    sums: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    RULE: tl.constexpr,
) -> None:
    """d, into what stands for w; rows: max_norm, limit."""
    c = ratio_of(sums, RULE)
    factor = factor_of(sums, c, rule_number(numbers + 1, RULE), tl.load(rows), RULE)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, _, flags, _, count, _, w, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, count, w, g, now, CHUNK):
                kept, last = gradients(g, now, count, S, T, CHUNK, WHOLE, RULE)
                number = rule_number(numbers + NUMBERS * group, RULE)
                of_kept, of_last = mix_of(sums, c, number, has_both(flags, now), RULE)
                d = mixed_of(factor * of_kept, kept, factor * of_last, last, T, RULE)
                store(w, d, count, S, CHUNK, WHOLE)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def remember(
    tensors: tl.tensor,
    pointers: tl.tensor,
    map: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    numbers: tl.tensor,
    sums: tl.tensor,
    square_slot: tl.tensor,
    history: tl.tensor,
    step_count: tl.tensor,
    S: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MOST: tl.constexpr,
    RULE: tl.constexpr,
) -> None:
    """What the history becomes, into what stands for w, where the step is made; rows: max_norm, limit.

    An operand that does not count is not read: 0 · ∞ is no number. step_count: with this step.
    """
    finite = direction_of(sums, numbers, rows, square_slot, RULE)[0]
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        _, group, key, _, begin, n, flat, to, g, now = piece(tensors, pointers, map, chunk, S, CHUNK)
        for WHOLE in tl.static_range(2):
            if is_variant(WHOLE, n, to, g, now, CHUNK):
                o = numbers + NUMBERS * group
                of_kept, of_last, of_history = memory_of(sums, rule_number(o, RULE), tl.load(o + 2), RULE)
                kept = load(only_if(of_kept != 0, g), n, S, CHUNK, WHOLE).to(T)
                last = load(only_if(of_last != 0, now), n, S, CHUNK, WHOLE).to(T)
                h = load(only_if(of_history != 0, history + flat), n, S, CHUNK, WHOLE).to(T)
                h = remembered(of_kept.to(T), kept, of_last.to(T), last, of_history.to(T), h, MOST)
                h = rounded(h, TO_HISTORY, key, step_count, begin, S, CHUNK, STOCHASTIC)
                store(only_if(finite, to), h, n, S, CHUNK, WHOLE)


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
    rows: tl.tensor,
    numbers: tl.tensor,
    sums: tl.tensor,
    square_slot: tl.tensor,
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
    RULE: tl.constexpr,
    FROM_SAVED: tl.constexpr,
) -> None:
    """torch.optim.SGD's rule, from saved where perturbed and FROM_SAVED, else from w; where skipped, w = saved.

    With MASTER from float32 master weights and to them, w their rounding to nearest.
    """
    finite, c, factor = direction_of(sums, numbers, rows + 6, square_slot, RULE)
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
                kept, last = gradients(g, now, n, S, T, CHUNK, WHOLE, RULE)
                m = load(m_at, n, S, CHUNK, WHOLE).to(T)
                o = rows + SGD_OPTIONS * group
                number = rule_number(numbers + NUMBERS * group, RULE)
                of_kept, of_last = mix_of(sums, c, number, has_both(flags, now), RULE)
                signed = tl.where(tl.load(o + 5) != 0, -factor, factor)
                d = mixed_of(signed * of_kept, kept, signed * of_last, last, T, RULE)
                keep, take, of_d, of_m = sgd_rule(
                    tl.load(o + 1), tl.load(o + 2), tl.load(o + 4) != 0, tl.load(steps + tensor) == 0
                )
                new, m = sgd(
                    x,
                    d,
                    m,
                    tl.load(o).to(T),
                    tl.load(o + 3).to(T),
                    keep.to(T),
                    take.to(T),
                    of_d.to(T),
                    of_m.to(T),
                )
                if MASTER:
                    store(only_if(finite, master_at), new, n, T, CHUNK, WHOLE)
                new = tl.where(finite, new, x)
                new = rounded(new, WEIGHT, key, step_count, begin, S, CHUNK, STOCHASTIC and not MASTER)
                m = rounded(m, FIRST_STATE, key, step_count, begin, S, CHUNK, STOCHASTIC)
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
    rows: tl.tensor,
    numbers: tl.tensor,
    sums: tl.tensor,
    square_slot: tl.tensor,
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
    RULE: tl.constexpr,
    FROM_SAVED: tl.constexpr,
) -> None:
    """torch.optim.Adam's and AdamW's rule, otherwise as `update_sgd`."""
    finite, c, factor = direction_of(sums, numbers, rows + 7, square_slot, RULE)
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
                kept, last = gradients(g, now, n, S, T, CHUNK, WHOLE, RULE)
                m = load(m_at, n, S, CHUNK, WHOLE).to(T)
                v = load(v_at, n, S, CHUNK, WHOLE).to(T)
                o = rows + ADAM_OPTIONS * group
                beta1, beta2 = tl.load(o + 1), tl.load(o + 2)
                number = rule_number(numbers + NUMBERS * group, RULE)
                of_kept, of_last = mix_of(sums, c, number, has_both(flags, now), RULE)
                signed = tl.where(tl.load(o + 6) != 0, -factor, factor)
                d = mixed_of(signed * of_kept, kept, signed * of_last, last, T, RULE)
                weight_decay, shrink, step_size, sqrt_bias_correction = adam_rule(
                    tl.load(o),
                    beta1,
                    beta2,
                    tl.load(o + 4),
                    tl.load(o + 5) != 0,
                    tl.load(steps + tensor).to(tl.float64) + 1,
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
                    weight_decay.to(T),
                    shrink.to(T),
                    step_size.to(T),
                    sqrt_bias_correction.to(T),
                )
                if MASTER:
                    store(only_if(finite, master_at), new, n, T, CHUNK, WHOLE)
                new = tl.where(finite, new, x)
                new = rounded(new, WEIGHT, key, step_count, begin, S, CHUNK, STOCHASTIC and not MASTER)
                m = rounded(m, FIRST_STATE, key, step_count, begin, S, CHUNK, STOCHASTIC)
                v = rounded(v, SECOND_STATE, key, step_count, begin, S, CHUNK, STOCHASTIC)
                store(only_if(finite | moved, w), new, n, S, CHUNK, WHOLE)
                store(only_if(finite, m_at), m, n, S, CHUNK, WHOLE)
                store(only_if(finite, v_at), v, n, S, CHUNK, WHOLE)
    if is_last(ticket):
        _count(pointers, count, finite, step_count, steps, skipped)
