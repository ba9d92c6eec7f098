"""Every formula of bsam_fused for Triton: csrc/math.h's twin, function by function, under the same names.

Scalars of a step are float64, elements float32 (float64 of float64 parameters). The symbols are the papers': SAM arXiv
2010.01412, ASAM 2102.11600, BSAM 2409.13173, others' beside their rules; the base updates are torch.optim's. Kernels
are compiled with ``enable_fp_fusion=False``: what is fused is written ``tl.fma``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- numbers


@triton.jit
def is_finite(x: tl.tensor) -> tl.tensor:
    """Whether x is a number: inf − inf and NaN − NaN are not 0."""
    return x - x == 0


@triton.jit
def divided(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x / y, correctly rounded: Triton's own division of float32 is not."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x: tl.tensor) -> tl.tensor:
    """√x, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


# ---- scalars of a step: in float64


@triton.jit
def step_length(radius: tl.tensor, budget: tl.tensor, sum_ascent: tl.tensor, norm_eps: tl.tensor) -> tl.tensor:
    """radius / (‖T g‖ + norm_eps), the factor of T² g; 0 where that divides by 0.

    A loss budget cuts the radius to budget / ‖T g‖. LE-SAM 2605.10183, where there is one.
    """
    norm = tl.sqrt(sum_ascent)
    length = norm + norm_eps
    bounded = tl.abs(radius) * norm > budget
    reach = tl.where(bounded, tl.where(radius < 0, -budget, budget), radius)
    over = tl.where(bounded, norm * length, length)
    return tl.where(over == 0, 0.0, reach / tl.where(over == 0, 1.0, over))


@triton.jit
def norm_ratio(square_x: tl.tensor, square_y: tl.tensor) -> tl.tensor:
    """x / y from their squares, and 0 where y = 0."""
    return tl.where(square_y > 0, tl.sqrt(square_x) / tl.sqrt(tl.where(square_y > 0, square_y, 1.0)), 0.0)


# A direction d = kept · x + last · y of two vectors, x, what the phases before kept, and y, the last gradient: a rule
# returns `kept` and `last`.


@triton.jit
def last_alone() -> tl.tuple:
    """SAM: d = g_max."""
    return 0.0, 1.0


@triton.jit
def bilateral(c: tl.tensor) -> tl.tuple:
    """BSAM, of x = g + g_max and y = g_min: d = g + g_max − c g_min, c = ‖g_max‖ / ‖g_min‖."""
    return 1.0, -c


@triton.jit
def extrapolated(c: tl.tensor, r: tl.tensor) -> tl.tuple:
    """The same of g and g_max, with ĝ_min = g − r (g_max − g) for g_min."""
    return 1 - c * (1 + r), 1 + c * r


@triton.jit
def surrogate_gap(alpha: tl.tensor, product: tl.tensor, square_max: tl.tensor) -> tl.tuple:
    """GSAM 2203.08065: d = g_max − α g⊥, g⊥ = g − (⟨g, g_max⟩ / ‖g_max‖²) g_max, and 0 where g_max = 0."""
    there = square_max > 0
    along = product / tl.where(there, square_max, 1.0)
    return tl.where(there, -alpha, 0.0), tl.where(there, 1 + alpha * along, 1.0)


@triton.jit
def weighted(gamma: tl.tensor) -> tl.tuple:
    """WSAM 2305.15817: d = (1 − 2γ)/(1 − γ) g + γ/(1 − γ) g_max."""
    last = gamma / (1 - gamma)
    return 1 - last, last


@triton.jit
def reused(alpha: tl.tensor, square_g: tl.tensor, square_v: tl.tensor) -> tl.tuple:
    """LookSAM 2203.02714 between its k-th steps, of the v that these remembered and of g: d = g + α (‖g‖ / ‖v‖) v."""
    return alpha * norm_ratio(square_g, square_v), 1.0


# What is remembered: kept · x + last · y + history · h, of what was kept, the last gradient and what it was before.


@triton.jit
def orthogonal(product: tl.tensor, square_g: tl.tensor) -> tl.tuple:
    """LookSAM's v, of g and g_max: g_max − (⟨g, g_max⟩ / ‖g‖²) g, the part of g_max that is orthogonal to g."""
    there, one, none = square_g > 0, tl.full((), 1.0, tl.float64), tl.full((), 0.0, tl.float64)
    return tl.where(there, -product / tl.where(there, square_g, 1.0), 0.0), one, none


@triton.jit
def averaged(sigma: tl.tensor, decay: tl.tensor, square_m: tl.tensor) -> tl.tuple:
    """Friendly SAM 2403.12350: m = λ m + (1 − λ) g of q = g − σ m, which was kept; the first, where m is 0, is g."""
    there, none = square_m > 0, tl.full((), 0.0, tl.float64)
    return tl.where(there, 1 - decay, 1.0), none, tl.where(there, decay + (1 - decay) * sigma, 0.0)


@triton.jit
def mixed_square(
    kept: tl.tensor, last: tl.tensor, square_kept: tl.tensor, product: tl.tensor, square_last: tl.tensor
) -> tl.tensor:
    """‖d‖² of a mix, from ‖x‖², ⟨x, y⟩ and ‖y‖²; rounding takes it below 0 nowhere."""
    square = tl.fma(last, tl.fma(last, square_last, 2 * kept * product), kept * kept * square_kept)
    return tl.where(square > 0, square, 0.0)


@triton.jit
def direction_factor(square: tl.tensor, scale: tl.tensor, max_norm: tl.tensor) -> tl.tensor:
    """The factor of d, whose square sum is `square`: 1 / scale, and what clips ‖d‖ / scale to max_norm.

    The loss was multiplied by scale, if that is not 0. As torch.nn.utils.clip_grad_norm_ has it.
    """
    unscaled = tl.where(scale == 0, 1.0, 1 / tl.where(scale == 0, 1.0, scale))
    clip = max_norm / (tl.sqrt(square) * unscaled + 1e-6)
    return tl.where(clip < 1, clip * unscaled, unscaled)


# ---- perturbations


@triton.jit
def adaptivity(w: tl.tensor, g: tl.tensor, eta: tl.tensor, adaptive: tl.tensor) -> tl.tensor:
    """T: 1 (SAM, BSAM), or |w| + η (adaptive: ASAM); where g is 0 nothing counts or moves, even if w is infinite: 0."""
    return tl.where(adaptive, tl.where(g == 0, 0.0, tl.abs(w) + eta), 1.0)


@triton.jit
def plus_product(total: tl.tensor, a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """total + a b, in float64."""
    return tl.fma(a.to(tl.float64), b.to(tl.float64), total)


@triton.jit
def plus_square(total: tl.tensor, g: tl.tensor, t: tl.tensor) -> tl.tensor:
    """total + (T g)², in float64: no float32 gradient overflows it or underflows to nothing."""
    x = t.to(tl.float64) * g.to(tl.float64)
    return plus_product(total, x, x)


@triton.jit
def perturbed(w: tl.tensor, g: tl.tensor, t: tl.tensor, step: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """w + step T² g: w_max with step = ρ / (n + norm_eps), w_min with step = −ρ_min / (n + norm_eps).

    w, where that is beyond MOST, the largest number as stored.
    """
    moved = tl.fma(step * t, t * g, w)
    return tl.where(tl.abs(moved) <= MOST, moved, w)


# ---- directions


@triton.jit
def both_gradients(g: tl.tensor, g_max: tl.tensor) -> tl.tensor:
    """What exact BSAM keeps of the first two passes: g + g_max."""
    return g + g_max


@triton.jit
def is_too_long(g_plus_g_max: tl.tensor) -> tl.tensor:
    """Whether d may be beyond its type, if c g_min is at most half as long as that: from g + g_max, as it is stored."""
    return is_finite(g_plus_g_max + g_plus_g_max) == 0


@triton.jit
def extrapolated_gradient(g: tl.tensor, g_max: tl.tensor, r: tl.tensor) -> tl.tensor:
    """ĝ_min = g − r (g_max − g): where the loss is quadratic g_min, of a descent r times as long as the ascent."""
    return tl.fma(r, g - g_max, g)


@triton.jit
def mixed(kept: tl.tensor, x: tl.tensor, last: tl.tensor, y: tl.tensor) -> tl.tensor:
    """d = kept · x + last · y."""
    return tl.fma(last, y, kept * x)


@triton.jit
def bounded(x: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """A number as far as it can be stored: at most MOST, but where it is none."""
    return tl.where(is_finite(x) & (tl.abs(x) > MOST), tl.where(x < 0, -MOST, MOST), x)


@triton.jit
def friendly_gradient(g: tl.tensor, m: tl.tensor, sigma: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """Friendly SAM's q = g − σ m, as far as it can be stored: g without the part that the batches have in common."""
    return bounded(tl.fma(-sigma, m, g), MOST)


@triton.jit
def remembered(
    kept: tl.tensor,
    x: tl.tensor,
    last: tl.tensor,
    y: tl.tensor,
    history: tl.tensor,
    h: tl.tensor,
    MOST: tl.constexpr,
) -> tl.tensor:
    """The history, as far as it can be stored: kept · x + last · y + history · h."""
    return bounded(tl.fma(history, h, mixed(kept, x, last, y)), MOST)


# ---- base updates: torch.optim's rules from w with gradient d, which has maximize's sign; cases are coefficients


@triton.jit
def decaying(weight_decay: tl.tensor, w: tl.tensor) -> tl.tensor:
    """Weight decay's w: none where there is no decay, for 0 · ∞ is no number."""
    return tl.where(weight_decay == 0, 0.0, w)


@triton.jit
def sgd_rule(momentum: tl.tensor, dampening: tl.tensor, nesterov: tl.tensor, first: tl.tensor) -> tl.tuple:
    """Return the coefficients of `sgd`: keep, take, of d, of m.

    The step is d + μ m with nesterov, d without momentum, else m. `first`: the momentum starts as d, whatever the
    dampening.
    """
    plain = momentum == 0
    keep = tl.where(first, 0.0, momentum)
    take = tl.where(plain, 0.0, tl.where(first, 1.0, 1 - dampening))
    of_d = tl.where(plain | nesterov, 1.0, 0.0)
    of_m = tl.where(plain, 0.0, tl.where(nesterov, momentum, 1.0))
    return keep, take, of_d, of_m


@triton.jit
def sgd(
    w: tl.tensor,
    d: tl.tensor,
    m: tl.tensor,
    lr: tl.tensor,
    weight_decay: tl.tensor,
    keep: tl.tensor,
    take: tl.tensor,
    of_d: tl.tensor,
    of_m: tl.tensor,
) -> tl.tuple:
    """m = μ m + (1 − dampening) d;  (w − lr m, or w − lr (d + μ m), or w − lr d; m)."""
    d = tl.fma(weight_decay, decaying(weight_decay, w), d)
    m = tl.fma(keep, m, take * d)
    return tl.fma(-lr, tl.fma(of_m, m, of_d * d), w), m


@triton.jit
def bias_correction(beta: tl.tensor, t: tl.tensor) -> tl.tensor:
    """1 − β^t = −expm1(t log β), exact also where β^t is nearly 1.

    Triton's language has no expm1: this is Kahan's (u − 1) x / log u, u = exp x, in which the errors of u cancel.
    """
    x = t * tl.log(beta)
    u = tl.exp(x)
    between = (u > 0) & (u < 1)
    return tl.where(between, (1 - u) * x / tl.log(tl.where(between, u, 0.5)), tl.where(u > 0, -x, 1.0))


@triton.jit
def adam_rule(
    lr: tl.tensor,
    beta1: tl.tensor,
    beta2: tl.tensor,
    weight_decay: tl.tensor,
    decoupled: tl.tensor,
    t: tl.tensor,
) -> tl.tuple:
    """Return the coefficients of `adam` in step t: weight decay of the gradient, shrink, step size, √(1 − β2^t).

    The weight is shrunk by 1 − lr weight_decay in AdamW (`decoupled`).
    """
    decay = tl.where(decoupled, 0.0, weight_decay)
    shrink = tl.where(decoupled, 1 - lr * weight_decay, 1.0)
    return decay, shrink, lr / bias_correction(beta1, t), tl.sqrt(bias_correction(beta2, t))


@triton.jit
def adam(
    w: tl.tensor,
    d: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    one_minus_beta1: tl.tensor,
    beta2: tl.tensor,
    one_minus_beta2: tl.tensor,
    eps: tl.tensor,
    weight_decay: tl.tensor,
    shrink: tl.tensor,
    step_size: tl.tensor,
    sqrt_bias_correction: tl.tensor,
) -> tl.tuple:
    """m = β1 m + (1 − β1) d;  v = β2 v + (1 − β2) d²;  (w − lr m̂ / (√v̂ + eps); m; v), m̂ and v̂ bias-corrected."""
    d = tl.fma(weight_decay, decaying(weight_decay, w), d)
    m = tl.fma(one_minus_beta1, d - m, m)
    v = tl.fma(beta2, v, one_minus_beta2 * d * d)
    denominator = divided(square_root(v), sqrt_bias_correction) + eps
    return tl.fma(-step_size, divided(m, denominator), shrink * w), m, v
