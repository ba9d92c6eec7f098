// The CUDA kernels: math.h's formulas over the tensors of a launch. No torch.
//
// A kernel first loads all that its thread works on in a chunk, in 128-bit accesses where pointers allow, then
// computes, then stores: so that many loads are under way at once.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda.h"
#include "cuda_launch.cuh"
#include "cuda_pieces.cuh"
#include "math.h"
#include "rounding.h"
#include "scalar.h"

namespace bsam {
namespace cuda {
namespace {

template <class T>
struct Reach {
  T step, eta;
  bool adaptive;

  __device__ T adaptivity(T w, T g) const { return adaptive ? bsam::adaptivity<true, T>(w, g, eta) : T(1); }
  template <class S>
  __device__ T perturbed(T w, T g) const {
    return bsam::perturbed<T>(w, g, adaptivity(w, g), step, Arithmetic<S>::kMost);
  }
};

template <class T>
__device__ Reach<T> reach(const double* groups, uint32_t group, double sum, double norm_eps) {
  const RadiusGroup o = RadiusGroup::from(groups + RadiusGroup::kOptions * group);
  return {T(step_length(o.radius, sum, norm_eps)), T(o.eta), o.adaptive};
}

// Whether a phase's step lengths are beyond its limit.
__device__ bool is_out_of_reach(const Reaching& r, double sum) {
  return bsam::is_out_of_reach(RadiusGroup::from(r.groups), sum, r.norm_eps, r.limit);
}

// How an operand of a piece is stored, element by element of its tensor.
template <class S>
struct Rounder {
  bool stochastic;
  uint32_t begin;
  Draw bits;

  __device__ Rounder(const Rounding& rounding, const Piece<S>& p, Operand operand)
      : stochastic(rounding.keys != nullptr),
        begin(p.begin),
        bits(stochastic ? draw(step_key(rounding.keys[p.tensor], *rounding.step_count), operand) : Draw{}) {}

  __device__ void operator()(S& to, float x, int i) const {
    if (stochastic)
      store_stochastic(to, x, random_bits(bits, begin + uint32_t(i)));
    else
      bsam::store(to, x);
  }
};

// What is computed with as it is stored has nothing to round.
template <class S>
struct Exact {
  __device__ Exact(const Rounding&, const Piece<S>&, Operand) {}
  __device__ void operator()(S& to, S x, int) const { to = x; }
};
template <>
struct Rounder<float> : Exact<float> {
  using Exact<float>::Exact;
};
template <>
struct Rounder<double> : Exact<double> {
  using Exact<double>::Exact;
};

struct SquareNorm {
  const double* groups;
  Totals<1> total;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    double sum = 0;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      const Reach<T> o = groups ? reach<T>(groups, p.group, 0, 1) : Reach<T>{};
      Vector<S> w[kVectors<S>], g[kVectors<S>];
      for_vectors<S>(p.count, [&](int k, int i, int valid) {
        g[k] = load(p.now, i, valid);
        if (o.adaptive) w[k] = load(p.w, i, valid);
      });
      for_vectors<S>(p.count, [&](int k, int, int) {
        if (o.adaptive)
          for_lanes<S>([&](int j) {
            const T slope = value(g[k].lane[j]);
            sum = plus_square<T>(sum, slope, o.adaptivity(value(w[k].lane[j]), slope));
          });
        else  // one conversion to double an element, of which GPUs make few at a time
          for_lanes<S>([&](int j) { sum = plus_square<T>(sum, value(g[k].lane[j]), T(1)); });
      });
    });
    add_up(total, {sum}, rows.begin == 0);
  }
};

struct DirectionSums {
  Totals<kTerms> totals;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    double squares_min = 0, squares = 0, products = 0;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      Vector<S> s[kVectors<S>], g_min[kVectors<S>];
      for_vectors<S>(p.count, [&](int k, int i, int valid) {
        s[k] = load(p.g, i, valid);
        g_min[k] = load(p.now, i, valid);
      });
      for_vectors<S>(p.count, [&](int k, int, int) {
        for_lanes<S>([&](int j) {
          const T so_far = value(s[k].lane[j]), last = value(g_min[k].lane[j]);
          squares_min = plus_product<T>(squares_min, last, last);
          squares = plus_product<T>(squares, so_far, so_far);
          products = plus_product<T>(products, so_far, last);
        });
      });
    });
    add_up(totals, {squares_min, squares, products}, rows.begin == 0);
  }
};

struct Ascend {
  Reaching reaching;
  void* saved;
  Rounding rounding;
  double* own;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    const double sum = reaching.sums[kAscent];
    const bool beyond = Shared<bool>()(0, [&] { return is_out_of_reach(reaching, sum); });
    const bool finite = is_finite(sum) && !beyond;
    // A block that reads it from here on finds a sum that is not finite, and leaves w alone as well.
    if (beyond && threadIdx.x == 0) *own = nan("");
    Shared<Reach<T>> shared;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      const Reach<T> o = shared(p.group, [&] { return reach<T>(reaching.groups, p.group, sum, reaching.norm_eps); });
      const Rounder<S> round(rounding, p, kToMax);
      Vector<S> w[kVectors<S>], g[kVectors<S>];
      for_vectors<S>(p.count, [&](int k, int i, int valid) {
        w[k] = load(p.w, i, valid);
        g[k] = load(p.now, i, valid);
      });
      for_vectors<S>(p.count, [&](int k, int i, int valid) {
        store(static_cast<S*>(saved) + p.flat, i, w[k], valid);
        if (p.g) store(p.g, i, g[k], valid);
        if (!finite) return;
        for_lanes<S>([&](int j) {
          round(w[k].lane[j], o.template perturbed<S>(value(w[k].lane[j]), value(g[k].lane[j])), i + j);
        });
        store(p.w, i, w[k], valid);
      });
    });
  }
};

struct Descend {
  Reaching reaching;
  const void* saved;
  Rounding rounding;
  Totals<1> total;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    const double sum_ascent = reaching.sums[kAscent];
    bool beyond = Shared<bool>()(0, [&] { return is_out_of_reach(reaching, sum_ascent); });
    const bool finite = is_finite(sum_ascent) && !beyond;
    Shared<Reach<T>> shared;
    double sum = 0;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      const Reach<T> o =
          shared(p.group, [&] { return reach<T>(reaching.groups, p.group, sum_ascent, reaching.norm_eps); });
      const Rounder<S> round(rounding, p, kToMin);
      Vector<S> w[kVectors<S>], g[kVectors<S>], g_max[kVectors<S>];
      for_vectors<S>(p.count, [&](int k, int i, int valid) {
        g_max[k] = load(p.now, i, valid);
        if (!p.perturbed) return;
        w[k] = load(static_cast<const S*>(saved) + p.flat, i, valid);
        g[k] = load(p.g, i, valid);
      });
      for_vectors<S>(p.count, [&](int k, int i, int valid) {
        for_lanes<S>([&](int j) { sum = plus_square<T>(sum, value(g_max[k].lane[j]), T(1)); });
        if (!p.perturbed) {
          if (p.g) store(p.g, i, g_max[k], valid);
          return;
        }
        for_lanes<S>([&](int j) {
          const T slope = value(g[k].lane[j]);
          if (finite) round(w[k].lane[j], o.template perturbed<S>(value(w[k].lane[j]), slope), i + j);
          bsam::store(g[k].lane[j], direction_so_far<T>(slope, value(g_max[k].lane[j])));
          beyond |= is_too_long<T>(value(g[k].lane[j]));
        });
        store(p.w, i, w[k], valid);
        store(p.g, i, g[k], valid);
      });
    });
    add_up(total, {beyond ? nan("") : sum}, rows.begin == 0);
  }
};

struct Direction {
  const double* sums;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    Shared<T> shared;
    const T c = shared(0, [&] { return T(bilateral_coefficient(sums[kMax], sums[kMin])); });
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      Vector<S> g[kVectors<S>], g_min[kVectors<S>];
      for_vectors<S>(p.count, [&](int k, int i, int valid) {
        g[k] = load(p.g, i, valid);
        g_min[k] = load(p.now, i, valid);
      });
      for_vectors<S>(p.count, [&](int k, int i, int valid) {
        for_lanes<S>([&](int j) {
          const T d = bilateral_direction<T>(value(g[k].lane[j]), value(g_min[k].lane[j]), c);
          bsam::store(g[k].lane[j], d);
        });
        store(p.g, i, g[k], valid);
      });
    });
  }
};

struct Restore {
  const void* saved;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      Vector<S> w[kVectors<S>];
      for_vectors<S>(p.count,
                     [&](int k, int i, int valid) { w[k] = load(static_cast<const S*>(saved) + p.flat, i, valid); });
      for_vectors<S>(p.count, [&](int k, int i, int valid) { store(p.w, i, w[k], valid); });
    });
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
  static __device__ Scalars<T> scalars(const SgdGroup& o, float steps, double factor) {
    return {sgd_rule<T>(o.lr, o.momentum, o.dampening, o.weight_decay, o.nesterov, o.maximize, steps == 0, factor),
            o.momentum != 0};
  }
};

struct AdamBase {
  using Group = AdamGroup;
  static constexpr int kStates = 2;

  template <class T>
  struct Scalars {
    Adam<T> rule;

    __device__ bool stateful() const { return true; }
    __device__ T operator()(T w, T d, T* state) const { return bsam::adam<T>(rule, w, d, state[0], state[1]); }
  };

  template <class T>
  static __device__ Scalars<T> scalars(const AdamGroup& o, float steps, double factor) {
    return {adam_rule<T>(o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.decoupled, o.maximize, double(steps) + 1,
                         factor)};
  }
};

// As many master weights as a vector of 16-bit elements has.
template <class S>
struct Masters {
  static constexpr int kParts = kLanes<S> / kLanes<float>;
  Vector<float> part[kParts];

  __device__ void load(const float* from, int64_t i, int valid) {
#pragma unroll
    for (int h = 0; h < kParts; ++h) part[h] = cuda::load(from, i + h * kLanes<float>, valid - h * kLanes<float>);
  }
  __device__ void store(float* to, int64_t i, int valid) const {
#pragma unroll
    for (int h = 0; h < kParts; ++h) cuda::store(to, i + h * kLanes<float>, part[h], valid - h * kLanes<float>);
  }
  __device__ float& operator[](int j) { return part[j / kLanes<float>].lane[j % kLanes<float>]; }
};

template <class Base>
struct Step {
  Update u;
  void* state[Base::kStates];
  unsigned* ticket;
  uint32_t tensors;

  template <class T>
  struct Scalars {
    typename Base::template Scalars<T> base;
    T c;
  };

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    const bool finite = Shared<bool>()(0, [&] { return can_update(u.sums, u.bilateral, u.max_norm, u.limit); });
    Shared<Scalars<arithmetic_t<S>>> shared;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      if (finite)
        update<S>(p, shared);
      else if (p.perturbed)
        put_back<S>(p);
    });
    if (!is_last_block(ticket)) return;  // all others have read the steps
    for (uint32_t i = threadIdx.x; i < rows.count; i += kThreads)
      if (rows.row[i].flags & kCounted) u.steps[rows.begin + i] += finite;
    if (threadIdx.x != 0) return;
    if (rows.begin == 0) *u.skipped += !finite;
    if (rows.begin + rows.count == tensors) ++*u.step_count;  // all parts of the launch have read it
  }

  template <class S, class T = arithmetic_t<S>>
  __device__ void update(const Piece<S>& p, Shared<Scalars<T>>& shared) const {
    const float steps = u.steps[p.tensor];
    const Scalars<T> o = shared(uint64_t(p.group) << 32 | bit_cast<uint32_t>(steps), [&] {
      const auto group = Base::Group::from(u.groups + Base::Group::kOptions * p.group);
      const auto scales = DirectionScales::from(u.sums, u.bilateral, u.max_norm);
      return Scalars<T>{Base::template scalars<T>(group, steps, scales.factor), T(scales.c)};
    });
    const S* from = u.from_saved && p.perturbed ? static_cast<const S*>(u.saved) + p.flat : p.w;
    Vector<S> w[kVectors<S>], g[kVectors<S>], last[kVectors<S>], held[Base::kStates][kVectors<S>];
    constexpr bool narrow = sizeof(S) == 2;
    Masters<std::conditional_t<narrow, S, float>> master[kVectors<S>];
    for_vectors<S>(p.count, [&](int k, int i, int valid) {
      w[k] = load(from, i, valid);
      if (narrow && u.master) master[k].load(u.master + p.flat, i, valid);
      if (u.bilateral) g[k] = load(p.g, i, valid);
      last[k] = load(p.now, i, valid);
      if (!o.base.stateful()) return;
#pragma unroll
      for (int s = 0; s < Base::kStates; ++s) held[s][k] = load(static_cast<const S*>(state[s]) + p.flat, i, valid);
    });
    for_vectors<S>(p.count, [&](int k, int i, int valid) {
      for_lanes<S>([&](int j) {
        const T g_last = value(last[k].lane[j]);
        const T d = u.bilateral ? bilateral_direction<T>(value(g[k].lane[j]), g_last, o.c) : g_last;
        T kept[Base::kStates];
#pragma unroll
        for (int s = 0; s < Base::kStates; ++s) kept[s] = value(held[s][k].lane[j]);
        if constexpr (narrow) {
          if (u.master) {
            master[k][j] = o.base(update_start(w[k].lane[j], master[k][j]), d, kept);
            bsam::store(w[k].lane[j], master[k][j]);
          }
        }
        if (!narrow || !u.master)
          Rounder<S>(u.rounding, p, kWeight)(w[k].lane[j], o.base(value(w[k].lane[j]), d, kept), i + j);
#pragma unroll
        for (int s = 0; s < Base::kStates; ++s)
          Rounder<S>(u.rounding, p, Operand(kFirstState + s))(held[s][k].lane[j], kept[s], i + j);
      });
      store(p.w, i, w[k], valid);
      if (narrow && u.master) master[k].store(u.master + p.flat, i, valid);
      if (!o.base.stateful()) return;
#pragma unroll
      for (int s = 0; s < Base::kStates; ++s) store(static_cast<S*>(state[s]) + p.flat, i, held[s][k], valid);
    });
  }

  template <class S>
  __device__ void put_back(const Piece<S>& p) const {
    for_vectors<S>(p.count, [&](int, int i, int valid) {
      store(p.w, i, load(static_cast<const S*>(u.saved) + p.flat, i, valid), valid);
    });
  }
};

struct Words {
  static constexpr size_t kCount = kFewBytes / sizeof(double);
  double word[kCount];
};

__global__ void write_words(double* to, const __grid_constant__ Words words, int count) {
  for (int i = int(threadIdx.x); i < count; i += kThreads) to[i] = words.word[i];
}

}  // namespace

void square_norm(const Context& context, const Items& items, const double* groups, double* to) {
  launch(context, items, SquareNorm{groups, {context.partials, context.ticket, {to}}});
}

void direction_sums(const Context& context, const Items& items, double* const (&to)[kTerms]) {
  launch(context, items, DirectionSums{{context.partials, context.ticket, {to[0], to[1], to[2]}}});
}

void ascend(const Context& context, const Items& items, const Reaching& reaching, void* saved, const Rounding& rounding,
            double* own) {
  launch(context, items, Ascend{reaching, saved, rounding, own});
}

void descend(const Context& context, const Items& items, const Reaching& reaching, const void* saved,
             const Rounding& rounding, double* to) {
  launch(context, items, Descend{reaching, saved, rounding, {context.partials, context.ticket, {to}}});
}

void direction(const Context& context, const Items& items, const double* sums) {
  launch(context, items, Direction{sums});
}

void restore(const Context& context, const Items& items, const void* saved) { launch(context, items, Restore{saved}); }

void sgd(const Context& context, const Items& items, const Update& update, void* momentum_buffer) {
  launch(context, items, Step<SgdBase>{update, {momentum_buffer}, context.ticket, uint32_t(items.size())});
}

void adam(const Context& context, const Items& items, const Update& update, void* exp_avg, void* exp_avg_sq) {
  launch(context, items, Step<AdamBase>{update, {exp_avg, exp_avg_sq}, context.ticket, uint32_t(items.size())});
}

void write(double* to, const double* values, size_t count, void* stream) {
  for (size_t done = 0; done < count; done += Words::kCount) {
    Words words;
    const size_t part = std::min(count - done, Words::kCount);
    std::copy_n(values + done, part, words.word);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1);
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, write_words, to + done, words, int(part)), "launching a kernel");
  }
}

std::string obstacle() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel<Restore, float, kMany>);
  cudaGetLastError();  // it is told here, and must not be found by the next launch
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "reading the stream's state");
  return status != cudaStreamCaptureStatusNone;
}

int most_blocks(int device) {
  const int threads = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
  return attribute(cudaDevAttrMultiProcessorCount, device) * std::max(1, threads / kThreads);
}

}  // namespace cuda
}  // namespace bsam
