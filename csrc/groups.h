// What comes with a phase: element types, sums, the options of a param group. No torch, no formulas.
#pragma once

#include <cstdint>

#include "math.h"

namespace bsam {

enum class Dtype { float32, float64, bfloat16, float16 };

// The sums: Σ (T g)², Σ g_max², Σ g_min²; what the loss was scaled by, 0 where it was not; and where BSAM's ‖d‖ is
// asked for, of s = g + g_max, Σ s² and Σ s g_min.
enum Slot { kAscent = 0, kMax = 1, kMin = 2, kScale = 3, kSoFar = 4, kCross = 5 };
constexpr int kSlots = 6;

// Whether the step's sums are numbers: else it is skipped.
BSAM_INLINE bool all_finite(const double* sums) {
  return is_finite(sums[kAscent]) && is_finite(sums[kMax]) && is_finite(sums[kMin]) && is_finite(sums[kScale]);
}

// What the update multiplies by: g_min by c (BSAM), and all of d by factor.
struct DirectionScales {
  double c, factor;

  // Whether an update can be made with them: else the step is skipped.
  BSAM_INLINE bool can_update(const double* sums, bool bilateral, double limit) const {
    return all_finite(sums) && within(sums, bilateral, limit);
  }

  // Whether neither they nor d can be beyond `limit`: |factor g_max,i| ≤ factor ‖g_max‖, and |c g_min,i| ≤ ‖g_max‖ is
  // at most half of it, as descend saw to for g + g_max.
  BSAM_INLINE bool within(const double* sums, bool bilateral, double limit) const {
    const double norm_max = std::sqrt(sums[kMax]);
    if (!bilateral) return factor <= 1 || factor * norm_max <= limit;
    return c <= limit && 2 * (factor > 1 ? factor : 1) * norm_max <= limit;
  }

  static BSAM_INLINE DirectionScales from(const double* sums, bool bilateral, double max_norm) {
    const double c = bilateral ? bilateral_coefficient(sums[kMax], sums[kMin]) : 0.0;
    const double square = bilateral ? bilateral_square(sums[kSoFar], sums[kCross], sums[kMin], c) : sums[kMax];
    return {c, direction_factor(square, sums[kScale], max_norm)};
  }
};

// The options of a param group, in the order of contract.py's tuples, which come as doubles.
struct RadiusGroup {
  static constexpr int kOptions = 4;
  double radius;
  bool adaptive;
  double eta;
  double largest;  // |radius| of all groups, by which all decide alike

  static BSAM_INLINE RadiusGroup from(const double* o) { return {o[0], o[1] != 0, o[2], o[3]}; }
};

// Whether a step length is beyond `limit`: nothing is perturbed then, and the step will be skipped.
BSAM_INLINE bool is_out_of_reach(const RadiusGroup& any, double sum_ascent, double norm_eps, double limit) {
  return step_length(any.largest, sum_ascent, norm_eps) > limit;
}

struct SgdGroup {
  static constexpr int kOptions = 6;
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;

  static BSAM_INLINE SgdGroup from(const double* o) { return {o[0], o[1], o[2], o[3], o[4] != 0, o[5] != 0}; }
};

struct AdamGroup {
  static constexpr int kOptions = 7;
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;

  static BSAM_INLINE AdamGroup from(const double* o) { return {o[0], o[1], o[2], o[3], o[4], o[5] != 0, o[6] != 0}; }
};

// Whether the update keeps state.
BSAM_INLINE bool keeps_state(const SgdGroup& o) { return o.momentum != 0; }
BSAM_INLINE bool keeps_state(const AdamGroup&) { return true; }

}  // namespace bsam
