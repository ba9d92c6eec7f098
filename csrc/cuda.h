// What cuda.cu offers to CudaFlatParams: one launch a phase over many tensors. No torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "groups.h"

namespace bsam {
namespace cuda {

// A tensor in a launch: `numel` elements in memory order, 0 to leave it out; at `flat` in the flat buffers. What
// w, g and now are, and which may be null, each launch says.
struct Item {
  char* w;
  char* g;
  const char* now;
  int64_t flat, numel;
  uint32_t group;
  bool perturbed;  // w is not w, but saved is
  bool ascended;   // had a gradient in the first pass
  bool counted;    // the base optimizer keeps state for it
};

// Where a launch runs and what it needs beside its operands.
struct Context {
  Dtype dtype;
  int device;
  void* stream;
  double* partials;  // kTerms * most_blocks(device) of them
  unsigned* ticket;  // 0 at first; every launch leaves it 0
  bool loading;      // launch nothing: have the kernels loaded, which may fail
};

// How many sums a launch makes at most.
constexpr int kTerms = 4;

// All pointers are to the device. `groups`: Group::kOptions doubles a param group, in contract.py's order. `sums`:
// over all FlatParams, kSlots of them.
using Items = std::vector<Item>;

// How 16-bit weights and state are rounded: with the tensors' keys (tensor_key) stochastically, without to nearest.
struct Rounding {
  const uint32_t* keys;
  const int64_t* step_count;
  int64_t ahead;  // of step_count
};

// *to = Σ (T g)², g in `now`; without `groups`, T = 1.
void square_norm(const Context&, const Items&, const double* groups, double* to);
// Of what is kept in g, x, and the last gradient in `now`, y: to[0], [1], [2] = Σ y², Σ x², Σ x y.
void direction_sums(const Context&, const Items&, double* const (&to)[3]);
// to[0], [1], [2], [3] = Σ g_max², Σ s², Σ s ĝ_min, Σ ĝ_min²; s = g + g_max, of g in g and g_max in `now`. `numbers`:
// as Mixing has them.
void extrapolated_sums(const Context&, const Items&, const double* numbers, double* const (&to)[4]);
// How far a phase perturbs; no step length may exceed `limit`.
struct Reaching {
  const double *groups, *sums;
  double norm_eps, limit;
};
// saved = w, w = w_max; `now`, g at w, is copied into g where that is not null. *own, this FlatParams' Σ (T g)²,
// becomes NaN where w is out of reach.
void ascend(const Context&, const Items&, const Reaching&, void* saved, const Rounding&, double* own);
// w = w_min from saved, g += g_max in `now`, *to = Σ g_max². What is not perturbed has no w, and what has not ascended
// only copies g_max.
void descend(const Context&, const Items&, const Reaching&, const void* saved, const Rounding&, double* to);
// How a direction is mixed of what is kept and the last gradient. Replays of a graph read the groups' `numbers`, null
// where the rule has none, as they were written last: and there `by.largest`, which counts for nothing here.
struct Mixing {
  Direction by;
  const double *sums, *numbers;
};
// q = g − σ m into g, of g in `now` and m in the history; to[0], [1], [2] = Σ (T q)², Σ m², Σ q². `groups`: those of
// the radii, null where T = 1; `numbers`: as Mixing has them.
void mix(const Context&, const Items&, const double* groups, const double* numbers, const void* history,
         double* const (&to)[3]);
// g = d, of what is kept in g and the last gradient in `now`.
void direction(const Context&, const Items&, const Mixing&);
// w = saved.
void restore(const Context&, const Items&, const void* saved);

// What every update needs: the last gradient is in `now`, what is kept in g, where it is a part of d.
struct Update {
  const double* groups;
  Mixing mixing;
  const void* saved;  // null if nothing was perturbed
  float* master;      // of 16-bit weights: where there is one, the update goes from and to it, and w is its rounding
  bool from_saved;    // start from saved where perturbed, else from w
  Rounding rounding;
  int64_t* step_count;  // advanced
  float* steps;         // a tensor: updates made so far; advanced
  int64_t* skipped;     // advanced where a sum is not finite: nothing else changes then, but w goes back to saved
};
void sgd(const Context&, const Items&, const Update&, void* momentum_buffer);
void adam(const Context&, const Items&, const Update&, void* exp_avg, void* exp_avg_sq);

// The history that comes of a step, `to`, which may be it: of what is kept in g, the last gradient in `now` and the
// history so far. Where the step is skipped nothing is written.
struct Remembering {
  Mixing mixing;
  const void* history;
  void* to;
  Rounding rounding;
};
void remember(const Context&, const Items&, const Remembering&);

// Writes doubles that travel with the launch itself: nothing waits, and a graph may capture it.
void write(double* to, const double* values, size_t count, void* stream);

// What keeps the kernels from running on the current device: none of the architectures they were built for; else "".
std::string obstacle();

// Whether the stream's launches go into a graph instead of running.
bool is_capturing(void* stream);

// How many blocks a launch on this device has at most.
int most_blocks(int device);

}  // namespace cuda
}  // namespace bsam
