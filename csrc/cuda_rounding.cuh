// How kernels round what they store: to nearest, or with random bits. No torch, no launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda.h"
#include "cuda_pieces.cuh"
#include "rounding.h"
#include "scalar.h"

namespace bsam {
namespace cuda {
namespace {

// Ways to round: of() knows how to store an operand of a piece, element by element.
struct ToNearest {
  static constexpr bool kNarrow = false;  // of 16-bit types alone

  template <class S>
  static __device__ ToNearest of(const Rounding&, const Piece<S>&, Operand) {
    return {};
  }
  template <class S>
  __device__ void operator()(S& to, arithmetic_t<S> x, int) const {
    bsam::store(to, x);
  }
};

struct Stochastic {
  static constexpr bool kNarrow = true;

  Draw bits;  // the keys, worked out once a piece
  uint32_t begin;

  template <class S>
  static __device__ Stochastic of(const Rounding& rounding, const Piece<S>& p, Operand operand) {
    return {draw(step_key(rounding.keys[p.tensor], *rounding.step_count + rounding.ahead), operand), p.begin};
  }
  template <class S>
  __device__ void operator()(S& to, float x, int i) const {
    store_stochastic(to, x, random_bits(bits, begin + uint32_t(i)));
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
