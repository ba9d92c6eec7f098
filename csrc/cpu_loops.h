// The CPU loops over one segment: pointers meet math.h's formulas here.
//
// Included once by each of cpu_baseline.cpp, cpu_avx2.cpp and cpu_avx512.cpp, which compile it for their
// instruction sets; no intrinsics but the streaming stores, the compiler vectorises the rest. A segment is
// worked through in tiles that stay in the first-level cache from one loop to the next.
#include <cstring>
#include <type_traits>

#include "cpu.h"
#include "math.h"
#include "rounding.h"
#include "scalar.h"

// Elements of one index only meet each other, so a loop may be vectorised even where it works in place.
#if defined(__clang__)
#define BSAM_ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define BSAM_ELEMENTWISE _Pragma("GCC ivdep")
#else
#define BSAM_ELEMENTWISE
#endif

namespace bsam {
inline namespace BSAM_ISA {

constexpr int64_t kTile = 1024;
constexpr int64_t kLanes = 16;  // of a sum; the same for every instruction set, so that all add in one order

BSAM_INLINE int64_t tile_at(int64_t i, int64_t n) { return n - i < kTile ? n - i : kTile; }

// Copies; `stream` writes around the cache, so that a line that is only written is not read first.
template <class S>
BSAM_INLINE void copy_elements(S* to_, const S* from_, bool stream, int64_t n) {
  char* to = reinterpret_cast<char*>(to_);
  const char* from = reinterpret_cast<const char*>(from_);
  const int64_t bytes = n * int64_t(sizeof(S));
  int64_t done = 0;
#if defined(__x86_64__)
  if (stream) {
#if defined(BSAM_AVX512)
    for (; done + 64 <= bytes; done += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_loadu_si512(from + done));
#elif defined(BSAM_AVX2)
    for (; done + 32 <= bytes; done += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + done),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + done)));
#else
    for (; done + 16 <= bytes; done += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + done),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + done)));
#endif
  }
#endif
  if (done < bytes) std::memcpy(to + done, from + done, size_t(bytes - done));
}

// Streaming stores want whole, aligned cache lines.
BSAM_INLINE bool can_stream(const void* to, bool wanted) { return wanted && reinterpret_cast<uintptr_t>(to) % 64 == 0; }

// How weights and state are stored: a policy of the loops, made for an operand of a site; i is an element's index.
template <class S>
struct Nearest {
  BSAM_INLINE Nearest(uint32_t, Operand) {}
  BSAM_INLINE void operator()(S& to, arithmetic_t<S> x, uint32_t) const { store(to, x); }
};
template <class S>
struct Stochastic {
  Draw draw_;
  BSAM_INLINE Stochastic(uint32_t key, Operand operand) : draw_(draw(key, operand)) {}
  BSAM_INLINE void operator()(S& to, float x, uint32_t i) const { store_stochastic(to, x, random_bits(draw_, i)); }
};

struct Exact {
  template <class T>
  BSAM_INLINE void operator()(T& to, T x, uint32_t) const {
    to = x;
  }
};

// w is read where adaptive.
template <bool adaptive, class S>
BSAM_INLINE arithmetic_t<S> adaptivity_at(const S* w, const S* g, arithmetic_t<S> eta, int64_t i) {
  using T = arithmetic_t<S>;
  return adaptive ? adaptivity<true, T>(value(w[i]), value(g[i]), eta) : T(1);
}

// Σ (T g)².
template <bool adaptive, class S>
BSAM_INLINE double square_sum(const S* w, const S* g, double eta, int64_t n) {
  using T = arithmetic_t<S>;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j)
      lanes[j] = plus_square<T>(lanes[j], value(g[i + j]), adaptivity_at<adaptive>(w, g, T(eta), i + j));
  for (int64_t j = 0; i < n; ++i, ++j)
    lanes[j] = plus_square<T>(lanes[j], value(g[i]), adaptivity_at<adaptive>(w, g, T(eta), i));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

template <class T, bool extrapolated>
struct DirectionLanes {
  double last[kLanes] = {}, square[kLanes] = {}, product[kLanes] = {}, min[kLanes] = {};

  BSAM_INLINE void add(int64_t j, T k, T l, T r) {
    const T x = extrapolated ? both_gradients(k, l) : k, y = extrapolated ? extrapolated_gradient(k, l, r) : l;
    last[j] = plus_product<T>(last[j], l, l);
    square[j] = plus_product<T>(square[j], x, x);
    product[j] = plus_product<T>(product[j], x, y);
    if (extrapolated) min[j] = plus_product<T>(min[j], y, y);
  }
};

// Adds Σ last², Σ x² and Σ x y of a direction d = a x + b y: x and y are kept and last, or where g_min is extrapolated
// g + g_max and ĝ_min, and then Σ y², too.
template <bool extrapolated, class S>
BSAM_INLINE void add_direction_sums(const S* kept, const S* last, double r, double* sums, int64_t n) {
  using T = arithmetic_t<S>;
  DirectionLanes<T, extrapolated> lanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes.add(j, value(kept[i + j]), value(last[i + j]), T(r));
  for (int64_t j = 0; i < n; ++i, ++j) lanes.add(j, value(kept[i]), value(last[i]), T(r));
  for (int64_t j = 0; j < kLanes; ++j) {
    sums[0] += lanes.last[j];
    sums[1] += lanes.square[j];
    sums[2] += lanes.product[j];
    if (extrapolated) sums[3] += lanes.min[j];
  }
}

// to = from + step T² g; `first`: the index of the first element.
template <bool adaptive, class S, class Round>
BSAM_INLINE void perturb(S* to, const S* from, const S* g, const Reach& reach, const Round& round, uint32_t first,
                         int64_t n) {
  using T = arithmetic_t<S>;
  const T step = T(reach.step), eta = T(reach.eta);
  BSAM_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    const T w = value(from[i]), slope = value(g[i]), t = adaptivity<adaptive, T>(w, slope, eta);
    round(to[i], perturbed<T>(w, slope, t, step, Arithmetic<S>::kMost), first + uint32_t(i));
  }
}

template <class S, class Round>
BSAM_INLINE void perturb(S* to, const S* from, const S* g, const Reach& reach, const Round& round, uint32_t first,
                         int64_t n) {
  if (reach.adaptive)
    perturb<true>(to, from, g, reach, round, first, n);
  else
    perturb<false>(to, from, g, reach, round, first, n);
}

// g = g + g_max; Σ g_max², or NaN where d may then be too long.
template <class S>
BSAM_INLINE double keep_both_gradients(S* g, const S* g_max, int64_t n) {
  using T = arithmetic_t<S>;
  const double sum = square_sum<false>(g, g_max, 0, n);
  int too_long = 0;
  BSAM_ELEMENTWISE
  for (int64_t i = 0; i < n; ++i) {
    store(g[i], both_gradients<T>(value(g[i]), value(g_max[i])));
    too_long |= is_too_long<T>(value(g[i]));
  }
  return too_long ? std::numeric_limits<double>::quiet_NaN() : sum;
}

// The direction: a mix of what was kept, where it `keeps`, and the last gradient.
template <class T>
struct MixOf {
  T of_kept, of_last;

  template <bool keeps, class S>
  BSAM_INLINE T at(const S* kept, const S* last, int64_t i) const {
    return keeps ? mixed<T>(of_kept, value(kept[i]), of_last, value(last[i])) : of_last * value(last[i]);
  }
};

// The base updates of a tile, whose first element is the segment's i-th, and its tensor's `first`-th. Structs and
// not lambdas: GCC's target pragma does not reach into lambdas.
template <class S, class Round>
struct SgdRule {
  using T = arithmetic_t<S>;
  Sgd<T> sgd_;
  S* momentum_buffer;  // null without momentum
  Round of_m;

  template <bool keeps, class W, class RoundW>
  BSAM_INLINE void tile(W* to, const W* from, const RoundW& round_w, const S* kept, const S* last, const MixOf<T>& mix_,
                        int64_t i, uint32_t first, int64_t n) const {
    const MixOf<T> mix = mix_;
    const Sgd<T> o = sgd_;
    const Round round_m = of_m;
    if (momentum_buffer == nullptr) {
      BSAM_ELEMENTWISE
      for (int64_t j = 0; j < n; ++j)
        round_w(to[j], sgd<T>(o, value(from[j]), mix.template at<keeps>(kept, last, j)), first + uint32_t(j));
      return;
    }
    S* m = momentum_buffer + i;
    BSAM_ELEMENTWISE
    for (int64_t j = 0; j < n; ++j) {
      T momentum = value(m[j]);
      round_w(to[j], sgd<T>(o, value(from[j]), mix.template at<keeps>(kept, last, j), momentum), first + uint32_t(j));
      round_m(m[j], momentum, first + uint32_t(j));
    }
  }
};

template <class S, class Round>
struct AdamRule {
  using T = arithmetic_t<S>;
  Adam<T> adam_;
  S *exp_avg, *exp_avg_sq;
  Round of_m, of_v;

  template <bool keeps, class W, class RoundW>
  BSAM_INLINE void tile(W* to, const W* from, const RoundW& round_w, const S* kept, const S* last, const MixOf<T>& mix_,
                        int64_t i, uint32_t first, int64_t n) const {
    const MixOf<T> mix = mix_;
    const Adam<T> o = adam_;
    const Round round_m = of_m, round_v = of_v;
    S *m = exp_avg + i, *v = exp_avg_sq + i;
    BSAM_ELEMENTWISE
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t at = first + uint32_t(j);
      T mean = value(m[j]), square = value(v[j]);
      round_w(to[j], adam<T>(o, value(from[j]), mix.template at<keeps>(kept, last, j), mean, square), at);
      round_m(m[j], mean, at);
      round_v(v[j], square, at);
    }
  }
};

template <class S, class Round>
struct SegmentLoops {
  using T = arithmetic_t<S>;

  static double square_norm(const void* w_, const void* g_, const Reach& reach, int64_t n) {
    const S *w = static_cast<const S*>(w_), *g = static_cast<const S*>(g_);
    return reach.adaptive ? square_sum<true>(w, g, reach.eta, n) : square_sum<false>(w, g, 0, n);
  }

  static void direction_sums(const void* kept, const void* last, double* sums, int64_t n) {
    add_direction_sums<false>(static_cast<const S*>(kept), static_cast<const S*>(last), 0, sums, n);
  }

  static void extrapolated_sums(const void* g, const void* g_max, double r, double* sums, int64_t n) {
    add_direction_sums<true>(static_cast<const S*>(g), static_cast<const S*>(g_max), r, sums, n);
  }

  static void ascend(void* w_, const void* g_, void* saved_, const Reach& reach, const Site& site, bool stream,
                     int64_t n) {
    S *w = static_cast<S*>(w_), *saved = static_cast<S*>(saved_);
    const S* g = static_cast<const S*>(g_);
    const Round round(site.key, kToMax);
    stream = can_stream(saved, stream);
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t count = tile_at(i, n);
      copy_elements(saved + i, w + i, stream, count);
      perturb(w + i, w + i, g + i, reach, round, uint32_t(site.begin + i), count);
    }
  }

  static double descend(void* w_, void* g_, const void* g_max_, const void* saved_, const Reach& reach,
                        const Site& site, bool stream, int64_t n) {
    S *w = static_cast<S*>(w_), *g = static_cast<S*>(g_);
    const S *g_max = static_cast<const S*>(g_max_), *saved = static_cast<const S*>(saved_);
    const Round round(site.key, kToMin);
    stream = can_stream(w, stream);
    double sum = 0;
    alignas(64) S tile[kTile];
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t count = tile_at(i, n);
      perturb(stream ? tile : w + i, saved + i, g + i, reach, round, uint32_t(site.begin + i), count);
      if (stream) copy_elements(w + i, tile, true, count);
      sum += keep_both_gradients(g + i, g_max + i, count);
    }
    return sum;
  }

  static double keep_both(void* g, const void* g_max, int64_t n) {
    return keep_both_gradients(static_cast<S*>(g), static_cast<const S*>(g_max), n);
  }

  static void direction(void* kept_, const void* last_, const Mix& mix_, int64_t n) {
    S* kept = static_cast<S*>(kept_);
    const S* last = static_cast<const S*>(last_);
    const MixOf<T> mix{T(mix_.kept), T(mix_.last)};
    BSAM_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) store(kept[i], mix.template at<true>(kept, last, i));
  }

  static void mix(void* q_, const void* g_, const void* m_, const void* w_, double sigma, const Reach& reach,
                  double* sums, int64_t n) {
    S* q = static_cast<S*>(q_);
    const S *g = static_cast<const S*>(g_), *m = static_cast<const S*>(m_), *w = static_cast<const S*>(w_);
    BSAM_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i)
      store(q[i], friendly_gradient<T>(value(g[i]), value(m[i]), T(sigma), Arithmetic<S>::kBound));
    sums[0] += square_norm(w, q, reach, n);
    sums[1] += square_sum<false>(m, m, 0, n);
    sums[2] += square_sum<false>(q, q, 0, n);
  }

  static void remember(const Remembering& r) {
    const S *kept = static_cast<const S*>(r.kept), *last = static_cast<const S*>(r.last),
            *history = static_cast<const S*>(r.history);
    S* to = static_cast<S*>(r.to);
    const T a = T(r.memory.kept), b = T(r.memory.last), c = T(r.memory.history);
    const Round round(r.site.key, kToHistory);
    BSAM_ELEMENTWISE
    for (int64_t i = 0; i < r.count; ++i) {
      const T x = remembered<T>(a, value(kept[i]), b, value(last[i]), c, value(history[i]), Arithmetic<S>::kBound);
      round(to[i], x, uint32_t(r.site.begin + i));
    }
  }

  static void copy(void* to, const void* from, bool stream, int64_t n) {
    copy_elements(static_cast<S*>(to), static_cast<const S*>(from), can_stream(to, stream), n);
  }

  static void sgd(const Update& u, const SgdGroup& group, void* momentum_buffer, bool first) {
    const Sgd<T> o = sgd_rule<T>(group.lr, group.momentum, group.dampening, group.weight_decay, group.nesterov, first);
    update(u, SgdRule<S, Round>{o, static_cast<S*>(momentum_buffer), {u.site.key, kFirstState}});
  }

  static void adam(const Update& u, const AdamGroup& group, void* exp_avg, void* exp_avg_sq, double t) {
    const Adam<T> o =
        adam_rule<T>(group.lr, group.beta1, group.beta2, group.eps, group.weight_decay, group.decoupled, t);
    update(u, AdamRule<S, Round>{o,
                                 static_cast<S*>(exp_avg),
                                 static_cast<S*>(exp_avg_sq),
                                 {u.site.key, kFirstState},
                                 {u.site.key, kSecondState}});
  }

 private:
  // Applies the rule tile by tile, and writes the weights out.
  template <class Rule>
  static BSAM_INLINE void update(const Update& u, const Rule& rule) {
    S* w = static_cast<S*>(u.w);
    const S* from = static_cast<const S*>(u.from);
    const Round round(u.site.key, kWeight);
    const bool stream = can_stream(w, u.stream);
    alignas(64) S out[kTile];
    for (int64_t i = 0; i < u.count; i += kTile) {
      const int64_t n = tile_at(i, u.count);
      S* to = stream ? out : w + i;
      if (sizeof(S) == 2 && u.master)
        update_master(u, rule, to, i, n);
      else
        tile(u, rule, to, from + i, round, i, n);
      if (stream) copy_elements(w + i, out, true, n);
    }
  }

  template <class Rule>
  static BSAM_INLINE void update_master(const Update& u, const Rule& rule, S* to, int64_t i, int64_t n) {
    if constexpr (sizeof(S) == 2) {
      const S* from = static_cast<const S*>(u.from) + i;
      float* master = u.master + i;
      BSAM_ELEMENTWISE
      for (int64_t j = 0; j < n; ++j) master[j] = update_start(from[j], master[j]);
      tile(u, rule, master, static_cast<const float*>(master), Exact{}, i, n);
      BSAM_ELEMENTWISE
      for (int64_t j = 0; j < n; ++j) store(to[j], master[j]);
    }
  }

  template <class Rule, class W, class RoundW>
  static BSAM_INLINE void tile(const Update& u, const Rule& rule, W* to, const W* from, const RoundW& round, int64_t i,
                               int64_t n) {
    const S *kept = static_cast<const S*>(u.kept), *last = static_cast<const S*>(u.last) + i;
    const MixOf<T> mix{T(u.mix.kept), T(u.mix.last)};
    const uint32_t first = uint32_t(u.site.begin + i);
    if (kept)
      rule.template tile<true>(to, from, round, kept + i, last, mix, i, first, n);
    else
      rule.template tile<false>(to, from, round, nullptr, last, mix, i, first, n);
  }
};

template <class S, template <class> class Round>
constexpr Loops loops_of() {
  using L = SegmentLoops<S, Round<S>>;
  return {L::square_norm,
          L::direction_sums,
          L::extrapolated_sums,
          L::ascend,
          L::descend,
          L::keep_both,
          L::direction,
          L::mix,
          L::remember,
          L::copy,
          L::sgd,
          L::adam};
}

const Loops& loops(Dtype dtype, bool stochastic) {
  static constexpr Loops nearest[] = {loops_of<float, Nearest>(), loops_of<double, Nearest>(),
                                      loops_of<BFloat16, Nearest>(), loops_of<Float16, Nearest>()};
  static constexpr Loops random[] = {nearest[0], nearest[1], loops_of<BFloat16, Stochastic>(),
                                     loops_of<Float16, Stochastic>()};
  return (stochastic ? random : nearest)[int(dtype)];
}

}  // namespace BSAM_ISA
}  // namespace bsam
