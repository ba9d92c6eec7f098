// How kernels round what they store: to nearest, or with random bits. No torch, no launches.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda.h"
#include "cuda_pieces.cuh"
#include "rounding.h"
#include "scalar.h"

namespace bsam {
namespace cuda {
namespace {

// Ways to round: of() knows how to store an operand of a piece, all elements that a thread works on at a time.
struct ToNearest {
  static constexpr bool kNarrow = false;  // of 16-bit types alone

  template <class S>
  static __device__ ToNearest of(const Rounding&, const Piece<S>&, Operand) {
    return {};
  }
  template <class S, class T, int count, class At>
  __device__ void operator()(Elements<S, count>& to, Elements<T, count>& x, At at) const {
    at.each([&](int j, int) { bsam::store(to[j], x[j]); });
  }
};

// Whether all magnitudes are less than bfloat16's largest: their sum is no less than any, and NaN if one is.
template <int count>
__device__ bool are_small(Elements<float, count>& x) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < count; ++j) sum += std::fabs(x[j]);
  return sum < Arithmetic<BFloat16>::kMost;
}

// Two at a time, in one instruction.
template <int count, class Make>
__device__ void store_upper_halves(Elements<BFloat16, count>& to, Make make) {
  if constexpr (count == 1) {
    to[0].bits = uint16_t(make(0) >> 16);
    return;
  }
#pragma unroll
  for (int j = 0; j + 1 < count; j += 2) {
    const uint32_t both = __byte_perm(make(j), make(j + 1), 0x7632);
    std::memcpy(&to[j], &both, sizeof both);
  }
}

struct Stochastic {
  static constexpr bool kNarrow = true;

  Draw bits;  // the keys, worked out once a piece
  uint32_t begin;

  template <class S>
  static __device__ Stochastic of(const Rounding& rounding, const Piece<S>& p, Operand operand) {
    return {draw(step_key(rounding.keys[p.tensor], *rounding.step_count + rounding.ahead), operand), p.begin};
  }
  // The random bits' first half is one for all elements of a vector, whose first one's index is a multiple of their
  // count. What is special about large numbers, and NaN, is left to a path that hardly any thread takes.
  template <class S, int count, class At>
  __device__ void operator()(Elements<S, count>& to, Elements<float, count>& x, At at) const {
    const uint32_t half = half_random(bits, begin + uint32_t(at.place(0)));
    const auto random = [&](int j) { return whole_random(bits, half ^ uint32_t(j)); };
    if constexpr (std::is_same_v<S, BFloat16>)
      if (are_small(x)) return store_upper_halves(to, [&](int j) { return small_stochastic(x[j], random(j)); });
    at.each([&](int j, int) { store_stochastic(to[j], x[j], random(j)); });
  }
};

// Calls launch_as(how), how 16 bits are rounded.
template <class Launch>
void by_rounding(const Rounding& rounding, Launch launch_as) {
  if (rounding.keys)
    launch_as(Stochastic{});
  else
    launch_as(ToNearest{});
}

}  // namespace
}  // namespace cuda
}  // namespace bsam
