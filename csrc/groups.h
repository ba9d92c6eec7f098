// What comes with a phase: element types, sums, the options of a param group. No torch, no formulas.
#pragma once

#include <cstdint>

#include "math.h"

namespace bsam {

enum class Dtype { float32, float64, bfloat16, float16 };

// The sums: Σ (T g)², Σ g_max², Σ g_min²; what the loss was scaled by, 0 where it was not; of a direction d = a x + b y
// Σ x² and Σ x y, where they are asked for (DirectionSums); and the coefficients that a user's own rule gives.
enum Slot { kAscent, kMax, kMin, kScale, kSquare, kProduct, kGivenKept, kGivenLast };
constexpr int kSlots = 8;

// Whether the step's sums are numbers: else it is skipped.
BSAM_INLINE bool all_finite(const double* sums) {
  return is_finite(sums[kAscent]) && is_finite(sums[kMax]) && is_finite(sums[kMin]) && is_finite(sums[kScale]);
}

// How a direction is mixed of what was kept and the last gradient: math.h's function of this name, or the coefficients
// given in the sums. Two are of the last gradient alone, too, but remember a history, and one mixes that with it.
enum class Rule { last_alone, bilateral, extrapolated, surrogate_gap, weighted, given, orthogonal, reused, friendly };

// Whether a step writes the history.
BSAM_INLINE bool remembers(Rule rule) { return rule == Rule::orthogonal || rule == Rule::friendly; }

// Whether d is not the last gradient alone.
BSAM_INLINE bool mixes(Rule rule) { return rule != Rule::last_alone && !remembers(rule); }

// Whether `ascend` keeps g.
BSAM_INLINE bool keeps(Rule rule) { return rule != Rule::last_alone && rule != Rule::reused && rule != Rule::friendly; }

// Where the sum of the last gradient's squares is.
BSAM_INLINE Slot last_slot(Rule rule) { return rule == Rule::bilateral ? kMin : kMax; }

// How an update's direction comes about, of all param groups: from the sums and a group's number, which is r, α or γ.
struct Direction {
  Rule rule;
  bool summed;             // kSquare and kProduct are of this step
  double max_norm, limit;  // of d; of what it is made of
  double largest = 0;      // of the groups' numbers, by which all decide alike

  // Of a tensor: `both` where it has what was kept and the last gradient. ĝ_min is 0 without.
  BSAM_INLINE Mix of(const double* sums, double number, bool both) const {
    switch (rule) {
      case Rule::bilateral:
        return bilateral(norm_ratio(sums[kMax], sums[kMin]));
      case Rule::extrapolated:
        return both ? extrapolated(norm_ratio(sums[kMax], sums[kMin]), number) : Mix{1, 1};
      case Rule::surrogate_gap:
        return surrogate_gap(number, sums[kProduct], sums[kMax]);
      case Rule::weighted:
        return weighted(number);
      case Rule::given:
        return {sums[kGivenKept], sums[kGivenLast]};
      case Rule::reused:
        return reused(number, sums[kMax], sums[kSquare]);
      default:
        return last_alone();
    }
  }

  // What all of d is multiplied by. With the extrapolated rule the sums are of s = g + g_max and ĝ_min, as if that was
  // measured; the others' are of one mix, as groups' numbers may differ only where d is not clipped.
  BSAM_INLINE double factor(const double* sums) const {
    const bool extrapolates = rule == Rule::extrapolated;
    const Mix mix = extrapolates ? bilateral(norm_ratio(sums[kMax], sums[kMin])) : of(sums, largest, true);
    const double last = sums[extrapolates ? kMin : last_slot(rule)];
    const double square = mixes(rule) ? mixed_square(mix, sums[kSquare], sums[kProduct], last) : last;
    return direction_factor(square, sums[kScale], max_norm);
  }

  // Whether an update can be made, with this factor: else the step is skipped.
  BSAM_INLINE bool can_update(const double* sums) const { return can_update(sums, factor(sums)); }
  BSAM_INLINE bool can_update(const double* sums, double f) const { return all_finite(sums) && within(sums, f); }

  // Whether neither a coefficient nor d, of any group, can be beyond the limit. Coefficients are monotonous in the
  // number.
  BSAM_INLINE bool within(const double* sums, double f) const {
    const double longest_last = std::sqrt(sums[last_slot(rule)]);
    if (!mixes(rule)) return (f <= 1 || f * longest_last <= limit) && (!remembers(rule) || can_remember(sums));
    const Mix most = f * of(sums, largest, true), least = f * of(sums, 0, rule != Rule::extrapolated);
    const double a = std::fmax(std::fabs(most.kept), std::fabs(least.kept));
    const double b = std::fmax(std::fabs(most.last), std::fabs(least.last));
    const bool is_norm = f > 0;  // ‖d‖, by which d is clipped, is not beyond double
    return is_norm && a <= limit && b <= limit && longest_kept(sums, a) + b * longest_last <= limit;
  }

  // What the history becomes, of a group's number and decay. Of what came, whatever d was scaled by.
  BSAM_INLINE Memory memory(const double* sums, double number, double decay) const {
    return rule == Rule::orthogonal ? orthogonal(sums[kProduct], sums[kSquare])
                                    : averaged(number, decay, sums[kSquare]);
  }

  // Whether neither its coefficients nor it can be beyond the limit, of any group: λ is at most 1.
  BSAM_INLINE bool can_remember(const double* sums) const {
    if (rule == Rule::friendly)
      return std::sqrt(sums[kProduct]) + std::fmax(largest, 1) * std::sqrt(sums[kSquare]) <= limit;
    const double kept = std::fabs(memory(sums, 0, 0).kept);
    return kept <= limit && kept * std::sqrt(sums[kSquare]) + std::sqrt(sums[kMax]) <= limit;
  }

  // What no element of a x, x what was kept, can be beyond. Of exact BSAM's x descend saw to limit / 2, which is enough
  // but where the loss was scaled below 1: then a is above 1.
  BSAM_INLINE double longest_kept(const double* sums, double a) const {
    const double square = sums[summed ? kSquare : kAscent];
    if (rule == Rule::bilateral) return a <= 1 ? a * (limit / 2) : a * (std::sqrt(square) + std::sqrt(sums[kMax]));
    return a * std::sqrt(rule == Rule::extrapolated ? square + sums[kMax] + sums[kMin] : square);
  }
};

// The options of a param group, in the order of contract.py's tuples, which come as doubles.
struct RadiusGroup {
  static constexpr int kOptions = 5;
  double radius;
  bool adaptive;
  double eta;
  double largest;  // |radius| of all groups, by which all decide alike
  double budget;   // what the loss may rise by to first order

  static BSAM_INLINE RadiusGroup from(const double* o) { return {o[0], o[1] != 0, o[2], o[3], o[4]}; }
  BSAM_INLINE double step(double sum_ascent, double norm_eps) const {
    return step_length(radius, budget, sum_ascent, norm_eps);
  }
};

// Whether a step length is beyond `limit`: nothing is perturbed then, and the step will be skipped.
BSAM_INLINE bool is_out_of_reach(const RadiusGroup& any, double sum_ascent, double norm_eps, double limit) {
  return step_length(any.largest, HUGE_VAL, sum_ascent, norm_eps) > limit;
}

// The numbers of a direction's rule.
struct RuleGroup {
  static constexpr int kOptions = 3;
  double number;
  double largest;  // of all groups
  double decay;    // Friendly SAM's λ

  static BSAM_INLINE RuleGroup from(const double* o) { return {o[0], o[1], o[2]}; }
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

// Whether the update keeps state.
BSAM_INLINE bool keeps_state(const SgdGroup& o) { return o.momentum != 0; }
BSAM_INLINE bool keeps_state(const AdamGroup&) { return true; }

}  // namespace bsam
