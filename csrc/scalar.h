// The element types as stored, and their values as computed with.
//
// bfloat16 and float16 are stored in 16 bits and computed with in float; conversions are branch-free so that
// compilers vectorise them, and round to nearest even. GPUs have instructions for them. No torch header: cuda.cu
// includes this file too.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "math.h"

namespace bsam {
inline namespace BSAM_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that a stored S is computed with, and the largest number that S can store; and what a finite number of that
// type must be kept within: the same, but infinity where the types are one, for compilers to see that nothing is
// beyond.
template <class S>
struct Arithmetic {
  using type = S;
  static constexpr type kMost = std::numeric_limits<S>::max();
  static constexpr type kBound = std::numeric_limits<S>::infinity();
};
template <>
struct Arithmetic<BFloat16> {
  using type = float;
  static constexpr type kMost = 0x1.fep127f;
  static constexpr type kBound = kMost;
};
template <>
struct Arithmetic<Float16> {
  using type = float;
  static constexpr type kMost = 65504;
  static constexpr type kBound = kMost;
};
template <class S>
using arithmetic_t = typename Arithmetic<S>::type;

template <class To, class From>
BSAM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

BSAM_INLINE float value(float x) { return x; }
BSAM_INLINE double value(double x) { return x; }
BSAM_INLINE float value(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

BSAM_INLINE float value(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // Exponents differ in bias by 112; the multiplication also normalises subnormals. Inf and NaN keep all
  // ones.
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(sign | special | bit_cast<uint32_t>(scaled));
#endif
}

BSAM_INLINE void store(float& to, float x) { to = x; }
BSAM_INLINE void store(double& to, double x) { to = x; }

BSAM_INLINE void store(BFloat16& to, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = uint16_t(nan ? 0x7fc0u : rounded);
#endif
}

BSAM_INLINE void store(Float16& to, float x) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: round the 13 bits that fall off, then rebias. Subnormal ones: adding 0.5 leaves the
  // result's bits at the bottom of the sum, rounded by the addition itself.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  to.bits = uint16_t((bits >> 16 & 0x8000u) | (magnitude >= 0x477ff000u ? special : finite));
#endif
}

}  // namespace BSAM_ISA
}  // namespace bsam
