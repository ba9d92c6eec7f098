// Stochastic rounding of bfloat16 and float16: random bits, and stores that round with them.
//
// A value x between neighbours a < b becomes b with probability (x − a) / (b − a), so that what nearest rounding would
// lose is kept in the mean. The bits are a function of the seed, the parameter, the step, the operand and the element,
// in 32-bit integer operations alone: the same on every backend, for any number of threads, and after a resume. No
// torch.
#pragma once

#include <cstdint>

#include "scalar.h"

namespace bsam {
inline namespace BSAM_ISA {

// What is rounded in a step, each with bits of its own.
enum Operand : uint32_t { kToMax = 0, kToMin = 1, kWeight = 2, kFirstState = 3, kSecondState = 4, kToHistory = 5 };

constexpr uint32_t kGolden = 0x9e3779b9u;

// A bijection that looks random: lowbias32, of https://nullprogram.com/blog/2018/07/31/.
BSAM_INLINE uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// Of a parameter, by its param group and its index there.
BSAM_INLINE uint32_t tensor_key(uint32_t seed, uint32_t group, uint32_t index) {
  return mixed(mixed(mixed(seed + kGolden) + group) + index);
}

// Of a parameter in a step, the count of steps before it.
BSAM_INLINE uint32_t step_key(uint32_t tensor_key, int64_t step) { return mixed(tensor_key + uint32_t(step)); }

// Of an operand: two keys, so that no two streams are the same numbers in another order.
struct Draw {
  uint32_t first, second;
};
BSAM_INLINE Draw draw(uint32_t step_key, Operand operand) {
  const uint32_t first = mixed(step_key + operand);
  return {first, mixed(first + kGolden)};
}

// 32 bits, of which the upper ones are used, for the i-th element in memory order (modulo 2^32). In two parts: for
// i + j, where i is a multiple of 2^n and j < 2^n ≤ 2^16, the first one is half_random(draw, i) ^ j.
BSAM_INLINE uint32_t half_random(Draw draw, uint32_t i) {
  const uint32_t x = i ^ draw.first;
  return x ^ x >> 16;
}
BSAM_INLINE uint32_t whole_random(Draw draw, uint32_t half) {
  uint32_t x = half * 0x7feb352du;
  x = (x ^ x >> 15 ^ draw.second) * 0x846ca68bu;
  return x ^ x >> 16;
}
BSAM_INLINE uint32_t random_bits(Draw draw, uint32_t i) { return whole_random(draw, half_random(draw, i)); }

// From the largest finite number on, rounding is to nearest; NaN stays NaN.
BSAM_INLINE void store_stochastic(BFloat16& to, float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t noise = magnitude < 0x7f7f0000u ? random >> 16 : 0x7fffu + (bits >> 16 & 1u);
  to.bits = uint16_t(magnitude > 0x7f800000u ? 0x7fc0u : (bits + noise) >> 16);
}

// The same where the magnitude is less than that: in the upper half.
BSAM_INLINE uint32_t small_stochastic(float x, uint32_t random) { return bit_cast<uint32_t>(x) + (random >> 16); }

BSAM_INLINE void store_stochastic(Float16& to, float x, uint32_t random) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t noise = magnitude < 0x477fe000u ? random >> 19 : 0xfffu + (magnitude >> 13 & 1u);
  const uint32_t normal = (magnitude + noise - 0x38000000u) >> 13;
  // Subnormal results are multiples of 2^-24.
  const float small = magnitude < 0x38800000u ? bit_cast<float>(magnitude) : 0.0f;
  const float share = float(int32_t(random >> 19)) * 0x1p-13f;
  const uint32_t subnormal = uint32_t(int32_t(small * 0x1p24f + share));
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to.bits = uint16_t((bits >> 16 & 0x8000u) | (magnitude >= 0x477ff000u ? special : finite));
}

// Where an update starts that keeps master weights: from the master, whose rounding to nearest the weight is; where it
// is not, as in the first step, somebody has set the weight since, and it counts.
template <class S>
BSAM_INLINE float update_start(S weight, float master) {
  S rounded;
  store(rounded, master);
  return rounded.bits == weight.bits ? master : value(weight);
}

}  // namespace BSAM_ISA
}  // namespace bsam
