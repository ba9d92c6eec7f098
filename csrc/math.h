// Every formula of bsam_fused, per element, on register values.
//
// Host and device; no torch, no indexing, no loops. T is the arithmetic type: float for float32, bfloat16
// and float16 parameters, double for float64. The symbols are the papers': SAM arXiv 2010.01412, ASAM
// 2102.11600, BSAM 2409.13173; the base updates are torch.optim's. Multiply-adds that may be fused are
// written `fmadd`, so that every compiler fuses the same ones (the build says -ffp-contract=off). Where a
// rule has cases they are coefficients, worked out once, and not branches: every element runs the same lines.
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
  return x - x == 0;
}

// ---- scalars of a step: in double, once a group or a step, never once an element

// Of a radius (ρ, −ρ_min, and their signs under `maximize`): the factor of T² g, radius / (‖T g‖ + norm_eps); 0
// where that divides by 0.
BSAM_INLINE double step_length(double radius, double sum_ascent, double norm_eps) {
  const double length = std::sqrt(sum_ascent) + norm_eps;
  return length == 0 ? 0.0 : radius / length;
}

// c = ‖g_max‖ / ‖g_min‖, and 0 where ‖g_min‖ = 0. From the sums of squares. BSAM.
BSAM_INLINE double bilateral_coefficient(double sum_max, double sum_min) {
  return sum_min > 0 ? std::sqrt(sum_max) / std::sqrt(sum_min) : 0.0;
}

// ‖d‖² of BSAM's d = s − c g_min, s = g + g_max. From Σ s², Σ s g_min and Σ g_min²; rounding takes it below 0 nowhere.
BSAM_INLINE double bilateral_square(double sum_so_far, double sum_cross, double sum_min, double c) {
  const double square = fmadd(c, fmadd(c, sum_min, -2 * sum_cross), sum_so_far);
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

// ---- directions (SAM's is g_max itself)

// The part of BSAM's d that is known before the last pass: g + g_max.
template <class T>
BSAM_INLINE T direction_so_far(T g, T g_max) {
  return g + g_max;
}

// Whether d may be beyond T, if c g_min is as long as T is wide at most half: from g + g_max, as it is stored.
template <class T>
BSAM_INLINE bool is_too_long(T g_plus_g_max) {
  return !is_finite(g_plus_g_max + g_plus_g_max);
}

// d = g + g_max − c g_min. BSAM.
template <class T>
BSAM_INLINE T bilateral_direction(T g_plus_g_max, T g_min, T c) {
  return fmadd(-c, g_min, g_plus_g_max);
}

// ---- base updates: torch.optim's rules from w with gradient d

// Weight decay's w: none where there is no decay, for 0 · ∞ is no number.
template <class T>
BSAM_INLINE T decaying(T weight_decay, T w) {
  return weight_decay == 0 ? T(0) : w;
}

// torch.optim.SGD, its cases as coefficients. Nesterov's step is d + μ m, the plain one m.
template <class T>
struct Sgd {
  T lr, weight_decay;
  T of_gradient;  // direction_factor, negative under maximize
  T keep, take;   // m = keep m + take d
  T of_d, of_m;   // the step: of_d d + of_m m
};

// `first`: the momentum starts as d, whatever the dampening. `factor`: of d.
template <class T>
BSAM_INLINE Sgd<T> sgd_rule(double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                            bool maximize, bool first, double factor) {
  return {T(lr),
          T(weight_decay),
          T(maximize ? -factor : factor),
          T(first ? 0 : momentum),
          T(first ? 1 : 1 - dampening),
          T(nesterov ? 1 : 0),
          T(nesterov ? momentum : 1)};
}

// Without momentum: w − lr (d + weight_decay w).
template <class T>
BSAM_INLINE T sgd(const Sgd<T>& o, T w, T d) {
  d = fmadd(o.weight_decay, decaying(o.weight_decay, w), o.of_gradient * d);
  return fmadd(-o.lr, d, w);
}

// With momentum: m = μ m + (1 − dampening) d;  w − lr m, or w − lr (d + μ m).
template <class T>
BSAM_INLINE T sgd(const Sgd<T>& o, T w, T d, T& m) {
  d = fmadd(o.weight_decay, decaying(o.weight_decay, w), o.of_gradient * d);
  m = fmadd(o.keep, m, o.take * d);
  return fmadd(-o.lr, fmadd(o.of_m, m, o.of_d * d), w);
}

// torch.optim.Adam, and AdamW (`decoupled`), its cases as coefficients.
template <class T>
struct Adam {
  T one_minus_beta1, beta2, one_minus_beta2, eps;
  T of_gradient;           // direction_factor, negative under maximize
  T weight_decay;          // Adam's, of the gradient
  T shrink;                // AdamW's, of the weight: 1 − lr weight_decay
  T step_size;             // lr / (1 − β1^t)
  T sqrt_bias_correction;  // √(1 − β2^t)
};

// 1 − β^t, exact also where β^t is nearly 1.
BSAM_INLINE double bias_correction(double beta, double t) { return -std::expm1(t * std::log(beta)); }

// Of step t. `factor`: of d.
template <class T>
BSAM_INLINE Adam<T> adam_rule(double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                              bool maximize, double t, double factor) {
  return {T(1 - beta1),
          T(beta2),
          T(1 - beta2),
          T(eps),
          T(maximize ? -factor : factor),
          T(decoupled ? 0 : weight_decay),
          T(decoupled ? 1 - lr * weight_decay : 1),
          T(lr / bias_correction(beta1, t)),
          T(std::sqrt(bias_correction(beta2, t)))};
}

// m = β1 m + (1 − β1) d;  v = β2 v + (1 − β2) d²;  w − lr m̂ / (√v̂ + eps), m̂ and v̂ bias-corrected.
template <class T>
BSAM_INLINE T adam(const Adam<T>& o, T w, T d, T& m, T& v) {
  d = fmadd(o.weight_decay, decaying(o.weight_decay, w), o.of_gradient * d);
  m = fmadd(o.one_minus_beta1, d - m, m);
  v = fmadd(o.beta2, v, o.one_minus_beta2 * d * d);
  return fmadd(-o.step_size, m / (std::sqrt(v) / o.sqrt_bias_correction + o.eps), o.shrink * w);
}

}  // namespace BSAM_ISA
}  // namespace bsam
