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
#include "cuda_rounding.cuh"
#include "cuda_scalars.cuh"
#include "math.h"
#include "rounding.h"
#include "scalar.h"

namespace bsam {
namespace cuda {
namespace {

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
      const auto o = groups ? Reach<T>::of(radius_of(groups, p.group), 0) : Reach<T>{};
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

// Where g_min is extrapolated x is g + g_max and y ĝ_min, whose Σ y² is a term more.
template <bool extrapolated>
struct DirectionSums {
  static constexpr Order kOrder = Order::makes_sums;
  static constexpr int kBlocks = 5;
  static constexpr int kTerms = extrapolated ? 4 : 3;
  const double* numbers;
  Totals<kTerms> totals;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    double sums[kTerms] = {};
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      const bool both = p.has_both();
      const T r = T(rule_of(numbers, p.group).number);
      for_elements(p, [&](auto at) {
        auto kept = load_if_any(at, p.g), last = load_if_any(at, p.now);
        at.each([&](int j, int) {
          const T k = value(kept[j]), l = value(last[j]);
          T x = k, y = l;
          if constexpr (extrapolated) {
            x = both_gradients<T>(k, l);
            y = both ? extrapolated_gradient<T>(k, l, r) : T(0);
            sums[3] = plus_product<T>(sums[3], y, y);
          }
          sums[0] = plus_product<T>(sums[0], l, l);
          sums[1] = plus_product<T>(sums[1], x, x);
          sums[2] = plus_product<T>(sums[2], x, y);
        });
      });
    });
    add_up(totals, sums, rows.begin == 0);
  }
};

// Friendly SAM's q, along which the ascent goes, as it is stored.
struct MixFriendly {
  static constexpr Order kOrder = Order::makes_sums;
  static constexpr int kBlocks = 5;
  const double *groups, *numbers;
  const void* history;
  Totals<3> totals;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    double sums[3] = {};
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      const auto o = groups ? Reach<T>::of(radius_of(groups, p.group), 0) : Reach<T>{};
      const T sigma = T(rule_of(numbers, p.group).number);
      for_elements(p, [&](auto at) {
        auto q = at.load(p.now), m = at.load(static_cast<const S*>(history) + p.flat);
        auto w = at.load(p.w, o.adaptive);
        at.each([&](int j, int) {
          const T h = value(m[j]);
          bsam::store(q[j], friendly_gradient<T>(value(q[j]), h, sigma, Arithmetic<S>::kBound));
          const T x = value(q[j]);
          sums[0] = plus_square<T>(sums[0], x, o.adaptivity(value(w[j]), x));
          sums[1] = plus_product<T>(sums[1], h, h);
          sums[2] = plus_product<T>(sums[2], x, x);
        });
        at.store(p.g, q);
      });
    });
    add_up(totals, sums, rows.begin == 0);
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
      const Reach<T> o = shared(p.group, [&] { return reach<T>(reaching, p.group); });
      const How round = How::of(rounding, p, kToMax);
      for_elements(p, [&](auto at) {
        auto w = at.load(p.w), g = at.load(p.now);
        at.store(static_cast<S*>(saved) + p.flat, w);
        if (p.g) at.store(p.g, g);
        if (!finite) return;
        Elements<T, decltype(at)::kCount> w_max;
        at.each([&](int j, int) { w_max[j] = o.template perturbed<S>(value(w[j]), value(g[j])); });
        round(w, w_max, at);
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
      const Reach<T> o = shared(p.group, [&] { return reach<T>(reaching, p.group); });
      const How round = How::of(rounding, p, kToMin);
      for_elements(p, [&](auto at) {
        auto g_max = load_if_any(at, p.now);
        const auto add_squares = [&] {
          at.each([&](int j, int) { sum = plus_square<T>(sum, value(g_max[j]), T(1)); });
        };
        if (!p.ascended) {
          if (p.g) at.store(p.g, g_max);
          return add_squares();
        }
        auto w = at.load(static_cast<const S*>(saved) + p.flat, p.perturbed), g = at.load(p.g);
        add_squares();
        if (finite) {
          Elements<T, decltype(at)::kCount> w_min;
          at.each([&](int j, int) { w_min[j] = o.template perturbed<S>(value(w[j]), value(g[j])); });
          round(w, w_min, at);
        }
        at.each([&](int j, int) {
          bsam::store(g[j], both_gradients<T>(value(g[j]), value(g_max[j])));
          beyond |= is_too_long<T>(value(g[j]));
        });
        if (p.perturbed) at.store(p.w, w);
        at.store(p.g, g);
      });
    });
    add_up(total, {beyond ? nan("") : sum}, rows.begin == 0);
  }
};

struct MakeDirection {
  static constexpr Order kOrder = Order::alone;
  static constexpr int kBlocks = 8;
  Mixing mixing;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    Shared<double> once;
    const double& factor = once(0, [&] { return as_written(mixing).factor(mixing.sums); });
    Shared<MixOf<T>> shared;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      const MixOf<T> mix =
          shared(uint64_t(p.group) << 1 | p.has_both(), [&] { return MixOf<T>::of(mixing, p, factor); });
      for_elements(p, [&](auto at) {
        auto g = at.load(p.g), last = load_if_any(at, p.now);
        at.each([&](int j, int) { bsam::store(g[j], mixed<T>(mix.kept, value(g[j]), mix.last, value(last[j]))); });
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
    double factor;  // of d
    bool update;
  };
  template <class T>
  struct Scalars {
    typename Base::template Scalars<T> base;
    MixOf<T> mix;
  };

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    Shared<Decision> once;
    const Decision& decision = once(0, [&] {
      const Direction by = as_written(u.mixing);
      const double factor = by.factor(u.mixing.sums);
      return Decision{factor, by.can_update(u.mixing.sums, factor)};
    });
    const bool finite = decision.update;
    Shared<Scalars<arithmetic_t<S>>> shared;
    for_pieces<S, Walk::backwards>(rows, [&](const Piece<S>& p) {
      if (finite)
        update<S>(p, decision.factor, shared);
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
  __device__ void update(const Piece<S>& p, double factor, Shared<Scalars<T>>& shared) const {
    const float steps = u.steps[p.tensor];
    const uint64_t key = uint64_t(p.group) << 33 | uint64_t(p.has_both()) << 32 | bit_cast<uint32_t>(steps);
    const Scalars<T> o = shared(key, [&] {
      const auto group = Base::Group::from(u.groups + Base::Group::kOptions * p.group);
      const auto mix = MixOf<T>::of(u.mixing, p, group.maximize ? -factor : factor);
      return Scalars<T>{Base::template scalars<T>(group, steps), mix};
    });
    const bool stateful = o.base.stateful();
    const How round = How::of(u.rounding, p, kWeight);
    How round_state[Base::kStates];
#pragma unroll
    for (int s = 0; s < Base::kStates; ++s) round_state[s] = How::of(u.rounding, p, Operand(kFirstState + s));
    const S* from = u.from_saved && p.perturbed ? static_cast<const S*>(u.saved) + p.flat : p.w;
    for_elements(p, [&](auto at) {
      auto w = at.load(from), last = load_if_any(at, p.now), g = load_if_any(at, p.g);
      decltype(w) held[Base::kStates];
#pragma unroll
      for (int s = 0; s < Base::kStates; ++s) held[s] = at.load(static_cast<const S*>(state[s]) + p.flat, stateful);
      decltype(at.load(u.master)) master;
      if constexpr (masters) master = at.load(u.master + p.flat);
      Elements<T, decltype(at)::kCount> d;  // at once: one by one between divisions they take more registers
      at.each([&](int j, int) {
        const T l = value(last[j]);
        d[j] = p.g ? mixed<T>(o.mix.kept, value(g[j]), o.mix.last, l) : o.mix.last * l;
      });
      Elements<T, decltype(at)::kCount> next, next_state[Base::kStates];
      at.each([&](int j, int) {
        T kept[Base::kStates];
#pragma unroll
        for (int s = 0; s < Base::kStates; ++s) kept[s] = value(held[s][j]);
        if constexpr (masters)
          next[j] = o.base(update_start(w[j], master[j]), d[j], kept);
        else
          next[j] = o.base(value(w[j]), d[j], kept);
#pragma unroll
        for (int s = 0; s < Base::kStates; ++s) next_state[s][j] = kept[s];
      });
      if constexpr (masters) {
        master = next;
        ToNearest{}(w, next, at);
      } else {
        round(w, next, at);
      }
#pragma unroll
      for (int s = 0; s < Base::kStates; ++s) round_state[s](held[s], next_state[s], at);
      at.store(p.w, w);
      if constexpr (masters) at.store(u.master + p.flat, master);
      if (!stateful) return;
#pragma unroll
      for (int s = 0; s < Base::kStates; ++s) at.store(static_cast<S*>(state[s]) + p.flat, held[s]);
    });
  }
};

// From the first chunk on, with which an update ends: the cache has its gradients.
template <class How>
struct Remember {
  static constexpr Order kOrder = Order::alone;
  static constexpr int kBlocks = 5;
  Remembering r;

  template <class S, int capacity>
  __device__ void run(const Rows<capacity>& rows) const {
    using T = arithmetic_t<S>;
    if (!Shared<bool>()(0, [&] { return as_written(r.mixing).can_update(r.mixing.sums); })) return;
    Shared<MemoryOf<T>> shared;
    for_pieces<S>(rows, [&](const Piece<S>& p) {
      const MemoryOf<T> by = shared(p.group, [&] { return MemoryOf<T>::of(r.mixing, p.group); });
      const How round = How::of(r.rounding, p, kToHistory);
      const S* history = static_cast<const S*>(r.history) + p.flat;
      for_elements(p, [&](auto at) {  // what counts: 0 · ∞ is no number
        auto kept = load_if_any(at, by.kept != 0 ? p.g : nullptr);
        auto last = load_if_any(at, by.last != 0 ? p.now : nullptr);
        auto held = at.load(history, by.history != 0);
        Elements<T, decltype(at)::kCount> next;
        at.each([&](int j, int) {
          const T k = value(kept[j]), l = value(last[j]), h = value(held[j]);
          next[j] = remembered<T>(by.kept, k, by.last, l, by.history, h, Arithmetic<S>::kBound);
        });
        round(held, next, at);
        at.store(static_cast<S*>(r.to) + p.flat, held);
      });
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

void direction_sums(const Context& context, const Items& items, double* const (&to)[3]) {
  launch(context, items, DirectionSums<false>{nullptr, {context.partials, context.ticket, {to[0], to[1], to[2]}}});
}

void extrapolated_sums(const Context& context, const Items& items, const double* numbers, double* const (&to)[4]) {
  const Totals<4> totals{context.partials, context.ticket, {to[0], to[1], to[2], to[3]}};
  launch(context, items, DirectionSums<true>{numbers, totals});
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

void direction(const Context& context, const Items& items, const Mixing& mixing) {
  launch(context, items, MakeDirection{mixing});
}

void mix(const Context& context, const Items& items, const double* groups, const double* numbers, const void* history,
         double* const (&to)[3]) {
  const Totals<3> totals{context.partials, context.ticket, {to[0], to[1], to[2]}};
  launch(context, items, MixFriendly{groups, numbers, history, totals});
}

void remember(const Context& context, const Items& items, const Remembering& remembering) {
  by_rounding(remembering.rounding, [&](auto how) {
    using How = decltype(how);
    launch<How::kNarrow>(context, items, Remember<How>{remembering});
  });
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
