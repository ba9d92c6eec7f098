// The CUDA kernels: math.h's formulas over the tensors of a launch. No torch.
//
// A kernel first loads all that its thread works on at a time (cuda_pieces.cuh: `at`), then computes, then stores: so
// that many loads are under way at once.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
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
    return {draw(step_key(rounding.keys[p.tensor], *rounding.step_count), operand), p.begin};
  }
  template <class S>
  __device__ void operator()(S& to, float x, int i) const {
    store_stochastic(to, x, random_bits(bits, begin + uint32_t(i)));
  }
};

// w = saved.
template <class S>
__device__ void put_back(const Piece<S>& p, const void* saved) {
  for_elements(p, [&](auto at) { at.store(p.w, at.load(static_cast<const S*>(saved) + p.flat)); });
}

struct SquareNorm {
  static constexpr Order kOrder = Order::makes_sums;
  static constexpr int kBlocks = 8;
  const double* groups;
  Totals<1> total;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    double sum = 0;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      const Reach<T> o = groups ? reach<T>(groups, p.group, 0, 1) : Reach<T>{};
      for_elements(p, [&](auto at) {
        auto g = at.load(p.now);
        if (!o.adaptive)  // one conversion to double an element, of which GPUs make few at a time
          return at.each([&](int j, int) { sum = plus_square<T>(sum, value(g[j]), T(1)); });
        auto w = at.load(p.w);
        at.each([&](int j, int) { sum = plus_square<T>(sum, value(g[j]), o.adaptivity(value(w[j]), value(g[j]))); });
      });
    });
    add_up(total, {sum}, rows.begin == 0);
  }
};

struct DirectionSums {
  static constexpr Order kOrder = Order::makes_sums;
  static constexpr int kBlocks = 5;
  Totals<kTerms> totals;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    double squares_min = 0, squares = 0, products = 0;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      for_elements(p, [&](auto at) {
        auto s = load_if_any(at, p.g), g_min = load_if_any(at, p.now);
        at.each([&](int j, int) {
          const T so_far = value(s[j]), last = value(g_min[j]);
          squares_min = plus_product<T>(squares_min, last, last);
          squares = plus_product<T>(squares, so_far, so_far);
          products = plus_product<T>(products, so_far, last);
        });
      });
    });
    add_up(totals, {squares_min, squares, products}, rows.begin == 0);
  }
};

template <class How>
struct Ascend {
  static constexpr Order kOrder = Order::uses_sums;
  static constexpr int kBlocks = 5;
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
    for_pieces<S, Walk::backwards>(rows, [&](const Piece<S>& p) {
      const Reach<T> o = shared(p.group, [&] { return reach<T>(reaching.groups, p.group, sum, reaching.norm_eps); });
      const How round = How::of(rounding, p, kToMax);
      for_elements(p, [&](auto at) {
        auto w = at.load(p.w), g = at.load(p.now);
        at.store(static_cast<S*>(saved) + p.flat, w);
        if (p.g) at.store(p.g, g);
        if (!finite) return;
        at.each([&](int j, int i) { round(w[j], o.template perturbed<S>(value(w[j]), value(g[j])), i); });
        at.store(p.w, w);
      });
    });
  }
};

template <class How>
struct Descend {
  static constexpr Order kOrder = Order::alone;
  static constexpr int kBlocks = 4;
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
    for_pieces<S, Walk::backwards>(rows, [&](const Piece<S>& p) {
      const Reach<T> o =
          shared(p.group, [&] { return reach<T>(reaching.groups, p.group, sum_ascent, reaching.norm_eps); });
      const How round = How::of(rounding, p, kToMin);
      for_elements(p, [&](auto at) {
        auto g_max = load_if_any(at, p.now);
        const auto add_squares = [&] {
          at.each([&](int j, int) { sum = plus_square<T>(sum, value(g_max[j]), T(1)); });
        };
        if (!p.perturbed) {
          if (p.g) at.store(p.g, g_max);
          return add_squares();
        }
        auto w = at.load(static_cast<const S*>(saved) + p.flat), g = at.load(p.g);
        add_squares();
        at.each([&](int j, int i) {
          const T slope = value(g[j]);
          if (finite) round(w[j], o.template perturbed<S>(value(w[j]), slope), i);
          bsam::store(g[j], direction_so_far<T>(slope, value(g_max[j])));
          beyond |= is_too_long<T>(value(g[j]));
        });
        at.store(p.w, w);
        at.store(p.g, g);
      });
    });
    add_up(total, {beyond ? nan("") : sum}, rows.begin == 0);
  }
};

struct Direction {
  static constexpr Order kOrder = Order::alone;
  static constexpr int kBlocks = 8;
  const double* sums;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    Shared<T> shared;
    const T c = shared(0, [&] { return T(bilateral_coefficient(sums[kMax], sums[kMin])); });
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      for_elements(p, [&](auto at) {
        auto g = at.load(p.g), g_min = at.load(p.now);
        at.each([&](int j, int) { bsam::store(g[j], bilateral_direction<T>(value(g[j]), value(g_min[j]), c)); });
        at.store(p.g, g);
      });
    });
  }
};

struct Restore {
  static constexpr Order kOrder = Order::alone;
  static constexpr int kBlocks = 8;
  const void* saved;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    for_pieces<S>(rows, [&](const Piece<S>& p) { put_back(p, saved); });
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
    __device__ T operator()(T w, T d, T* state) const {
      asm volatile("");  // else nvcc makes all elements' divisions twice, with weight decay and without
      return bsam::adam<T>(rule, w, d, state[0], state[1]);
    }
  };

  template <class T>
  static __device__ Scalars<T> scalars(const AdamGroup& o, float steps, double factor) {
    return {adam_rule<T>(o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.decoupled, o.maximize, double(steps) + 1,
                         factor)};
  }
};

// `masters`: whether 16-bit weights have master weights.
template <class Base, class How, bool masters>
struct Step {
  static constexpr Order kOrder = Order::uses_sums;
  static constexpr int kBlocks = 3;
  Update u;
  std::array<void*, Base::kStates> state;
  unsigned* ticket;
  uint32_t tensors;

  // Of the step, and of a param group.
  struct Decision {
    DirectionScales scales;
    bool update;
  };
  template <class T>
  struct Scalars {
    typename Base::template Scalars<T> base;
    T c;
  };

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    Shared<Decision> once;
    const Decision& decision = once(0, [&] {
      const auto scales = DirectionScales::from(u.sums, u.bilateral, u.max_norm);
      return Decision{scales, scales.can_update(u.sums, u.bilateral, u.limit)};
    });
    const bool finite = decision.update;
    Shared<Scalars<arithmetic_t<S>>> shared;
    for_pieces<S, Walk::backwards>(rows, [&](const Piece<S>& p) {
      if (finite)
        update<S>(p, decision.scales, shared);
      else if (p.perturbed)
        put_back(p, u.saved);
    });
    if (!is_last_block(ticket)) return;  // all others have read the steps
    for (uint32_t i = threadIdx.x; i < rows.count; i += kThreads)
      if (rows.row[i].flags & kCounted) u.steps[rows.begin + i] += finite;
    if (threadIdx.x != 0) return;
    if (rows.begin == 0) *u.skipped += !finite;
    if (rows.begin + rows.count == tensors) ++*u.step_count;  // all parts of the launch have read it
  }

  template <class S, class T = arithmetic_t<S>>
  __device__ void update(const Piece<S>& p, const DirectionScales& scales, Shared<Scalars<T>>& shared) const {
    const float steps = u.steps[p.tensor];
    const Scalars<T> o = shared(uint64_t(p.group) << 32 | bit_cast<uint32_t>(steps), [&] {
      const auto group = Base::Group::from(u.groups + Base::Group::kOptions * p.group);
      return Scalars<T>{Base::template scalars<T>(group, steps, scales.factor), T(scales.c)};
    });
    const bool stateful = o.base.stateful();
    const How round = How::of(u.rounding, p, kWeight);
    How round_state[Base::kStates];
#pragma unroll
    for (int s = 0; s < Base::kStates; ++s) round_state[s] = How::of(u.rounding, p, Operand(kFirstState + s));
    const S* from = u.from_saved && p.perturbed ? static_cast<const S*>(u.saved) + p.flat : p.w;
    for_elements(p, [&](auto at) {
      auto w = at.load(from), last = load_if_any(at, p.now), g = load_if_any(at, u.bilateral ? p.g : nullptr);
      decltype(w) held[Base::kStates];
#pragma unroll
      for (int s = 0; s < Base::kStates; ++s)
        held[s] = load_if_any(at, stateful ? static_cast<const S*>(state[s]) + p.flat : nullptr);
      decltype(at.load(u.master)) master;
      if constexpr (masters) master = at.load(u.master + p.flat);
      Elements<T, decltype(at)::kCount> d;  // at once: one by one between divisions they take more registers
      at.each([&](int j, int) {
        const T g_last = value(last[j]);
        d[j] = u.bilateral ? bilateral_direction<T>(value(g[j]), g_last, o.c) : g_last;
      });
      at.each([&](int j, int i) {
        T kept[Base::kStates];
#pragma unroll
        for (int s = 0; s < Base::kStates; ++s) kept[s] = value(held[s][j]);
        if constexpr (masters) {
          master[j] = o.base(update_start(w[j], master[j]), d[j], kept);
          bsam::store(w[j], master[j]);
        } else {
          round(w[j], o.base(value(w[j]), d[j], kept), i);
        }
#pragma unroll
        for (int s = 0; s < Base::kStates; ++s) round_state[s](held[s][j], kept[s], i);
      });
      at.store(p.w, w);
      if constexpr (masters) at.store(u.master + p.flat, master);
      if (!stateful) return;
#pragma unroll
      for (int s = 0; s < Base::kStates; ++s) at.store(static_cast<S*>(state[s]) + p.flat, held[s]);
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

// Calls launch_as(how), how 16 bits are rounded.
template <class Launch>
void by_rounding(const Rounding& rounding, Launch launch_as) {
  if (rounding.keys)
    launch_as(Stochastic{});
  else
    launch_as(ToNearest{});
}

template <class Base>
void step(const Context& context, const Items& items, const Update& u, const std::array<void*, Base::kStates>& state) {
  by_rounding(u.rounding, [&](auto how) {
    using How = decltype(how);
    const auto tensors = uint32_t(items.size());
    if (u.master)
      launch<true>(context, items, Step<Base, How, true>{u, state, context.ticket, tensors});
    else
      launch<How::kNarrow>(context, items, Step<Base, How, false>{u, state, context.ticket, tensors});
  });
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
  by_rounding(rounding, [&](auto how) {
    using How = decltype(how);
    launch<How::kNarrow>(context, items, Ascend<How>{reaching, saved, rounding, own});
  });
}

void descend(const Context& context, const Items& items, const Reaching& reaching, const void* saved,
             const Rounding& rounding, double* to) {
  by_rounding(rounding, [&](auto how) {
    using How = decltype(how);
    const Totals<1> total{context.partials, context.ticket, {to}};
    launch<How::kNarrow>(context, items, Descend<How>{reaching, saved, rounding, total});
  });
}

void direction(const Context& context, const Items& items, const double* sums) {
  launch(context, items, Direction{sums});
}

void restore(const Context& context, const Items& items, const void* saved) { launch(context, items, Restore{saved}); }

void sgd(const Context& context, const Items& items, const Update& update, void* momentum_buffer) {
  step<SgdBase>(context, items, update, {momentum_buffer});
}

void adam(const Context& context, const Items& items, const Update& update, void* exp_avg, void* exp_avg_sq) {
  step<AdamBase>(context, items, update, {exp_avg, exp_avg_sq});
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
