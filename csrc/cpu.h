// What the CPU loops offer: one table of functions an element type, compiled for several instruction sets.
#pragma once

#include <cstdint>

#include "groups.h"

namespace bsam {

// How far a param group is perturbed: `step` as math.h's step_length has it.
struct Reach {
  double step, eta;
  bool adaptive;
};

// Where a segment's elements are, for stochastic rounding: step_key of their tensor, and the first one's index in it.
struct Site {
  uint32_t key;
  int64_t begin;
};

// One segment of an update. `from`: where the update starts (saved, or the weights); w: where it is written;
// the direction is `mix` of kept, if that is not null, and last. `master`: where 16-bit weights have it, the
// update goes from and to it, and w is its rounding; else null. `stream`: write w around the cache.
struct Update {
  void* w;
  float* master;
  const void *from, *kept, *last;
  Mix mix;
  Site site;
  bool stream;
  int64_t count;
};

// One segment of the history: written `to` is what `memory` makes of kept, last and the history so far.
struct Remembering {
  void* to;
  const void *kept, *last, *history;
  Memory memory;
  Site site;
  int64_t count;
};

// Each works on one segment; formulas in math.h. Pointers are to the segment's first element, n its length.
struct Loops {
  double (*square_norm)(const void* w, const void* g, const Reach&, int64_t n);
  // Adds Σ last², Σ kept², Σ kept last.
  void (*direction_sums)(const void* kept, const void* last, double* sums, int64_t n);
  // Adds Σ g_max², Σ s², Σ s ĝ_min, Σ ĝ_min²; s is g + g_max.
  void (*extrapolated_sums)(const void* g, const void* g_max, double r, double* sums, int64_t n);
  void (*ascend)(void* w, const void* g, void* saved, const Reach&, const Site&, bool stream, int64_t n);
  // g becomes g + g_max; returns Σ g_max².
  double (*descend)(void* w, void* g, const void* g_max, const void* saved, const Reach&, const Site&, bool stream,
                    int64_t n);
  // Likewise, where nothing moves.
  double (*keep_both)(void* g, const void* g_max, int64_t n);
  // kept becomes d.
  void (*direction)(void* kept, const void* last, const Mix&, int64_t n);
  // q becomes g − σ m; adds Σ (T q)², Σ m², Σ q².
  void (*mix)(void* q, const void* g, const void* m, const void* w, double sigma, const Reach&, double* sums,
              int64_t n);
  void (*remember)(const Remembering&);
  void (*copy)(void* to, const void* from, bool stream, int64_t n);
  void (*sgd)(const Update&, const SgdGroup&, void* momentum_buffer, bool first);
  void (*adam)(const Update&, const AdamGroup&, void* exp_avg, void* exp_avg_sq, double t);
};

// The loops of the best instruction set that this CPU has, and its name. `stochastic`: 16-bit weights and state are
// rounded so.
const Loops& best_loops(Dtype, bool stochastic);
const char* instruction_set();

}  // namespace bsam
