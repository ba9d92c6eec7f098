// Every formula of bsam_fused, per element, on register values.
//
// Host and device; no torch, no indexing, no loops. T is the arithmetic type: float for float32, bfloat16
// and float16 parameters, double for float64. The symbols are the papers': SAM arXiv 2010.01412, ASAM
// 2102.11600, BSAM 2409.13173, others' beside their rules; the base updates are torch.optim's. Multiply-adds that
// may be fused are written `fmadd`, so that every compiler fuses the same ones (the build says -ffp-contract=off).
// Where a rule has cases they are coefficients, worked out once, and not branches: every element runs the same lines.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define BSAM_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define BSAM_INLINE inline __attribute__((always_inline))
#else
#define BSAM_INLINE inline
#endif

// The CPU loops are compiled once per instruction set (cpu_avx2.cpp and its siblings), each into a namespace
// of its own: otherwise the linker would keep one copy of these functions, perhaps one this CPU cannot run.
#ifndef BSAM_ISA
#define BSAM_ISA generic
#endif

namespace bsam {
inline namespace BSAM_ISA {

// a b + c, in one rounding where the hardware can; plain where a fused one would be a library call.
template <class T>
BSAM_INLINE T fmadd(T a, T b, T c) {
#if defined(BSAM_HAS_FMA) || defined(__FMA__) || defined(__aarch64__) || defined(__CUDA_ARCH__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Whether x is a number: inf − inf and NaN − NaN are not 0.
template <class T>
BSAM_INLINE bool is_finite(T x) {
  return x - x == 0;  // NOLINT(misc-redundant-expression)
}

// ---- scalars of a step: in double, once a group or a step, never once an element

// Of a radius (ρ, −ρ_min, and their signs under `maximize`) and a loss budget σ, which cuts it to σ / ‖T g‖: the factor
// of T² g, radius / (‖T g‖ + norm_eps); 0 where that divides by 0. LE-SAM 2605.10183, where there is a budget.
BSAM_INLINE double step_length(double radius, double budget, double sum_ascent, double norm_eps) {
  const double norm = std::sqrt(sum_ascent), length = norm + norm_eps;
  const bool bounded = std::fabs(radius) * norm > budget;
  const double reach = bounded ? std::copysign(budget, radius) : radius;
  const double over = bounded ? norm * length : length;  // one division, of which GPUs make slow code
  return over == 0 ? 0.0 : reach / over;
}

// x / y from their squares, and 0 where y = 0.
BSAM_INLINE double norm_ratio(double square_x, double square_y) {
  return square_y > 0 ? std::sqrt(square_x) / std::sqrt(square_y) : 0.0;
}

// A direction d = kept · k + last · l of two vectors: k, what the phases before kept, and l, the last gradient.
struct Mix {
  double kept, last;
};

BSAM_INLINE Mix operator*(double factor, const Mix& mix) { return {factor * mix.kept, factor * mix.last}; }

// SAM: d = g_max.
BSAM_INLINE Mix last_alone() { return {0, 1}; }

// BSAM, of k = g + g_max and g_min: d = g + g_max − c g_min, c = ‖g_max‖ / ‖g_min‖.
BSAM_INLINE Mix bilateral(double c) { return {1, -c}; }

// The same of g and g_max, with ĝ_min = g − r (g_max − g) for g_min.
BSAM_INLINE Mix extrapolated(double c, double r) { return {1 - c * (1 + r), 1 + c * r}; }

// GSAM 2203.08065, of g and g_max: d = g_max − α g⊥, g⊥ = g − (⟨g, g_max⟩ / ‖g_max‖²) g_max, and 0 where g_max = 0.
BSAM_INLINE Mix surrogate_gap(double alpha, double product, double square_max) {
  return square_max > 0 ? Mix{-alpha, 1 + alpha * (product / square_max)} : last_alone();
}

// WSAM 2305.15817, of g and g_max: d = (1 − 2γ)/(1 − γ) g + γ/(1 − γ) g_max.
BSAM_INLINE Mix weighted(double gamma) {
  const double last = gamma / (1 - gamma);
  return {1 - last, last};
}

// LookSAM 2203.02714 between its k-th steps, of the v that these remembered and of g: d = g + α (‖g‖ / ‖v‖) v.
BSAM_INLINE Mix reused(double alpha, double square_g, double square_v) {
  return {alpha * norm_ratio(square_g, square_v), 1};
}

// What is remembered: kept · k + last · l + history · h, of what was kept, the last gradient and what it was before.
struct Memory {
  double kept, last, history;
};

// LookSAM's v, of g and g_max: g_max − (⟨g, g_max⟩ / ‖g‖²) g, the part of g_max that is orthogonal to g.
BSAM_INLINE Memory orthogonal(double product, double square_g) {
  return {square_g > 0 ? -product / square_g : 0.0, 1, 0};
}

// Friendly SAM 2403.12350: m = λ m + (1 − λ) g of q = g − σ m, which was kept; the first one, where m is 0, is g.
BSAM_INLINE Memory averaged(double sigma, double lambda, double square_m) {
  return square_m > 0 ? Memory{1 - lambda, 0, lambda + (1 - lambda) * sigma} : Memory{1, 0, 0};
}

// ‖d‖² of a mix, from ‖k‖², ⟨k, l⟩ and ‖l‖²; rounding takes it below 0 nowhere.
BSAM_INLINE double mixed_square(const Mix& mix, double square_kept, double product, double square_last) {
  const double of_last = fmadd(mix.last, square_last, 2 * mix.kept * product);
  const double square = fmadd(mix.last, of_last, mix.kept * mix.kept * square_kept);
  return square > 0 ? square : 0.0;
}

// The factor of d, whose square sum is `square`: 1 / scale where the loss was scaled (else scale is 0), and what
// clips ‖d‖ / scale to max_norm, as torch.nn.utils.clip_grad_norm_ has it.
BSAM_INLINE double direction_factor(double square, double scale, double max_norm) {
  const double unscaled = scale == 0 ? 1.0 : 1 / scale;
  const double clip = max_norm / (std::sqrt(square) * unscaled + 1e-6);
  return clip < 1 ? clip * unscaled : unscaled;
}

// ---- perturbations

// T: 1 (SAM, BSAM), or |w| + η (adaptive: ASAM). Where g is 0 nothing counts or moves, even if w is infinite: then 0.
template <bool adaptive, class T>
BSAM_INLINE T adaptivity(T w, T g, T eta) {
  return !adaptive ? T(1) : g == 0 ? T(0) : std::fabs(w) + eta;
}

// sum + a b, in double.
template <class T>
BSAM_INLINE double plus_product(double sum, T a, T b) {
  return fmadd(double(a), double(b), sum);
}

// sum + (T g)², in double: no float32 gradient overflows it or underflows to nothing.
template <class T>
BSAM_INLINE double plus_square(double sum, T g, T t) {
  const double x = double(t) * double(g);
  return plus_product(sum, x, x);
}

// w + step T² g: w_max with step = ρ / (n + norm_eps), w_min with step = −ρ_min / (n + norm_eps). w, where that is
// beyond `most`, the largest number as stored.
template <class T>
BSAM_INLINE T perturbed(T w, T g, T t, T step, T most) {
  const T moved = fmadd(step * t, t * g, w);
  return std::fabs(moved) <= most ? moved : w;
}

// ---- directions

// What exact BSAM keeps of the first two passes: g + g_max.
template <class T>
BSAM_INLINE T both_gradients(T g, T g_max) {
  return g + g_max;
}

// Whether d may be beyond T, if c g_min is as long as T is wide at most half: from g + g_max, as it is stored.
template <class T>
BSAM_INLINE bool is_too_long(T g_plus_g_max) {
  return !is_finite(g_plus_g_max + g_plus_g_max);
}

// ĝ_min = g − r (g_max − g): where the loss is quadratic g_min, of a descent r = ρ_min / ρ times as long as the ascent.
template <class T>
BSAM_INLINE T extrapolated_gradient(T g, T g_max, T r) {
  return fmadd(r, g - g_max, g);
}

// d = kept · k + last · l.
template <class T>
BSAM_INLINE T mixed(T kept, T k, T last, T l) {
  return fmadd(last, l, kept * k);
}

// A number as far as it can be stored: at most `most`, but where it is none.
template <class T>
BSAM_INLINE T bounded(T x, T most) {
  return std::fabs(x) > most && is_finite(x) ? std::copysign(most, x) : x;
}

// Friendly SAM's q = g − σ m, as far as it can be stored: g without the part that the batches have in common.
template <class T>
BSAM_INLINE T friendly_gradient(T g, T m, T sigma, T most) {
  return bounded(fmadd(-sigma, m, g), most);
}

// The history, as far as it can be stored: kept · k + last · l + history · h.
template <class T>
BSAM_INLINE T remembered(T kept, T k, T last, T l, T history, T h, T most) {
  return bounded(fmadd(history, h, mixed(kept, k, last, l)), most);
}

// ---- base updates: torch.optim's rules from w with gradient d, whose sign `maximize` has turned

// Weight decay's w: none where there is no decay, for 0 · ∞ is no number.
template <class T>
BSAM_INLINE T decaying(T weight_decay, T w) {
  return weight_decay == 0 ? T(0) : w;
}

// torch.optim.SGD, its cases as coefficients. Nesterov's step is d + μ m, the plain one m.
template <class T>
struct Sgd {
  T lr, weight_decay;
  T keep, take;  // m = keep m + take d
  T of_d, of_m;  // the step: of_d d + of_m m
};

// `first`: the momentum starts as d, whatever the dampening.
template <class T>
BSAM_INLINE Sgd<T> sgd_rule(double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                            bool first) {
  return {T(lr),
          T(weight_decay),
          T(first ? 0 : momentum),
          T(first ? 1 : 1 - dampening),
          T(nesterov ? 1 : 0),
          T(nesterov ? momentum : 1)};
}

// Without momentum: w − lr (d + weight_decay w).
template <class T>
BSAM_INLINE T sgd(const Sgd<T>& o, T w, T d) {
  d = fmadd(o.weight_decay, decaying(o.weight_decay, w), d);
  return fmadd(-o.lr, d, w);
}

// With momentum: m = μ m + (1 − dampening) d;  w − lr m, or w − lr (d + μ m).
template <class T>
BSAM_INLINE T sgd(const Sgd<T>& o, T w, T d, T& m) {
  d = fmadd(o.weight_decay, decaying(o.weight_decay, w), d);
  m = fmadd(o.keep, m, o.take * d);
  return fmadd(-o.lr, fmadd(o.of_m, m, o.of_d * d), w);
}

// torch.optim.Adam, and AdamW (`decoupled`), its cases as coefficients.
template <class T>
struct Adam {
  T one_minus_beta1, beta2, one_minus_beta2, eps;
  T weight_decay;          // Adam's, of the gradient
  T shrink;                // AdamW's, of the weight: 1 − lr weight_decay
  T step_size;             // lr / (1 − β1^t)
  T sqrt_bias_correction;  // √(1 − β2^t)
};

// 1 − β^t, exact also where β^t is nearly 1.
BSAM_INLINE double bias_correction(double beta, double t) { return -std::expm1(t * std::log(beta)); }

// Of step t.
template <class T>
BSAM_INLINE Adam<T> adam_rule(double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                              double t) {
  return {T(1 - beta1),
          T(beta2),
          T(1 - beta2),
          T(eps),
          T(decoupled ? 0 : weight_decay),
          T(decoupled ? 1 - lr * weight_decay : 1),
          T(lr / bias_correction(beta1, t)),
          T(std::sqrt(bias_correction(beta2, t)))};
}

// m = β1 m + (1 − β1) d;  v = β2 v + (1 − β2) d²;  w − lr m̂ / (√v̂ + eps), m̂ and v̂ bias-corrected.
template <class T>
BSAM_INLINE T adam(const Adam<T>& o, T w, T d, T& m, T& v) {
  d = fmadd(o.weight_decay, decaying(o.weight_decay, w), d);
  m = fmadd(o.one_minus_beta1, d - m, m);
  v = fmadd(o.beta2, v, o.one_minus_beta2 * d * d);
  return fmadd(-o.step_size, m / (std::sqrt(v) / o.sqrt_bias_correction + o.eps), o.shrink * w);
}

}  // namespace BSAM_ISA
}  // namespace bsam
