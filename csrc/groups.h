// What comes with a phase: element types, sums, the options of a param group. No torch, no formulas.
#pragma once

#include <cstdint>

#include "math.h"

namespace bsam {

enum class Dtype { float32, float64, bfloat16, float16 };

// Which sum of squares: Σ (T g)², Σ g_max², Σ g_min².
enum Slot { kAscent = 0, kMax = 1, kMin = 2 };
constexpr int kSlots = 3;

// The options of a param group, in the order of contract.py's tuples, which come as doubles.
struct RadiusGroup {
  static constexpr int kOptions = 3;
  double radius;
  bool adaptive;
  double eta;

  static BSAM_INLINE RadiusGroup from(const double* o) { return {o[0], o[1] != 0, o[2]}; }
};

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

}  // namespace bsam
