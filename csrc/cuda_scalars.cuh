// What a block works out in double, once a param group or a step, and its threads then compute with. No torch, no
// launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda.h"
#include "cuda_pieces.cuh"
#include "math.h"
#include "scalar.h"

namespace bsam {
namespace cuda {
namespace {

template <class T>
struct Reach {
  T step, eta;
  bool adaptive;

  static __device__ Reach of(const RadiusGroup& o, double step) { return {T(step), T(o.eta), o.adaptive}; }
  __device__ T adaptivity(T w, T g) const { return adaptive ? bsam::adaptivity<true, T>(w, g, eta) : T(1); }
  template <class S>
  __device__ T perturbed(T w, T g) const {
    return bsam::perturbed<T>(w, g, adaptivity(w, g), step, Arithmetic<S>::kMost);
  }
};

__device__ RadiusGroup radius_of(const double* groups, uint32_t group) {
  return RadiusGroup::from(groups + RadiusGroup::kOptions * group);
}

template <class T>
__device__ Reach<T> reach(const Reaching& r, uint32_t group) {
  const RadiusGroup o = radius_of(r.groups, group);
  return Reach<T>::of(o, o.step(r.sums[kAscent], r.norm_eps));
}

// Whether a phase's step lengths are beyond its limit.
__device__ bool is_out_of_reach(const Reaching& r, double sum) {
  return bsam::is_out_of_reach(RadiusGroup::from(r.groups), sum, r.norm_eps, r.limit);
}

// A group's numbers of a direction's rule.
__device__ RuleGroup rule_of(const double* numbers, uint32_t group) {
  return numbers ? RuleGroup::from(numbers + RuleGroup::kOptions * group) : RuleGroup{};
}

// How the direction is mixed, by the numbers as they are now.
__device__ Direction as_written(const Mixing& m) {
  Direction by = m.by;
  by.largest = rule_of(m.numbers, 0).largest;
  return by;
}

// A mix as elements meet it.
template <class T>
struct MixOf {
  T kept, last;

  // Of a piece's tensor. `factor`: of d.
  template <class S>
  static __device__ MixOf of(const Mixing& m, const Piece<S>& p, double factor) {
    const Mix mix = factor * m.by.of(m.sums, rule_of(m.numbers, p.group).number, p.has_both());
    return {T(mix.kept), T(mix.last)};
  }
};

// What is remembered, as elements meet it.
template <class T>
struct MemoryOf {
  T kept, last, history;

  static __device__ MemoryOf of(const Mixing& m, uint32_t group) {
    const RuleGroup numbers = rule_of(m.numbers, group);
    const Memory memory = m.by.memory(m.sums, numbers.number, numbers.decay);
    return {T(memory.kept), T(memory.last), T(memory.history)};
  }
};

// The base optimizers: their scalars, of a group and the count of updates made so far, and their rule.
struct SgdBase {
  using Group = SgdGroup;
  static constexpr int kStates = 1;

  template <class T>
  struct Scalars {
    Sgd<T> rule;
    bool momentum;

    __device__ bool stateful() const { return momentum; }
    __device__ T operator()(T w, T d, T* state) const {
      return momentum ? bsam::sgd<T>(rule, w, d, state[0]) : bsam::sgd<T>(rule, w, d);
    }
  };

  template <class T>
  static __device__ Scalars<T> scalars(const SgdGroup& o, float steps) {
    return {sgd_rule<T>(o.lr, o.momentum, o.dampening, o.weight_decay, o.nesterov, steps == 0), o.momentum != 0};
  }
};

struct AdamBase {
  using Group = AdamGroup;
  static constexpr int kStates = 2;

  template <class T>
  struct Scalars {
    Adam<T> rule;

    __device__ bool stateful() const { return true; }
    __device__ T operator()(T w, T d, T* state) const {
      asm volatile("");  // else nvcc makes all elements' divisions twice, with weight decay and without
      return bsam::adam<T>(rule, w, d, state[0], state[1]);
    }
  };

  template <class T>
  static __device__ Scalars<T> scalars(const AdamGroup& o, float steps) {
    return {adam_rule<T>(o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.decoupled, double(steps) + 1)};
  }
};

}  // namespace
}  // namespace cuda
}  // namespace bsam
