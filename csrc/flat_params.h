// FlatParams: the parameters of one device and dtype, and the flat buffers that belong to them.
//
// The contract of every method is written once, for all backends, in bsam_fused/ops/contract.py. This is its
// CPU implementation. It reads and takes gradients itself: passing lists of tensors from Python would cost
// more than the work on them.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cpu.h"
#include "flat.h"

namespace bsam {

// Which sum of squares: Σ (T g)², Σ g_max², Σ g_min².
enum Slot { kAscent = 0, kMax = 1, kMin = 2 };

// Thrown where a parameter or its gradient cannot be worked with; contract.py's `reject` finds the words.
struct BadParameter {
  size_t index;
};

class FlatParams {
 public:
  using Radii = std::vector<std::array<double, 3>>;       // a group: radius, adaptive, eta
  using SgdGroups = std::vector<std::array<double, 6>>;   // lr, momentum, dampening, weight_decay, nesterov, maximize
  using AdamGroups = std::vector<std::array<double, 7>>;  // lr, beta1, beta2, eps, weight_decay, decoupled, maximize

  FlatParams(std::vector<at::Tensor> params, std::vector<std::pair<int64_t, int64_t>> places);

  void read_gradients();
  void clear_gradients();
  void square_norm(int64_t slot, const Radii& radii);
  void ascend(const at::Tensor& sums, const Radii& radii, double norm_eps, bool keep);
  void descend(const at::Tensor& sums, const Radii& radii, double norm_eps);
  std::vector<int64_t> update_sgd(const at::Tensor& sums, const SgdGroups& groups, bool from_saved);
  std::vector<int64_t> update_adam(const at::Tensor& sums, const AdamGroups& groups, bool from_saved);
  bool combine(const at::Tensor& sums, bool from_saved);
  void restore();
  void release();
  void show_w(bool at_w);

  std::vector<at::Tensor> state(const std::string& key);
  int64_t extra_bytes() const;

  const std::vector<at::Tensor>& params() const { return params_; }
  const std::vector<std::pair<int64_t, int64_t>>& places() const { return places_; }
  at::Tensor sums() const { return sums_; }
  int64_t skipped() const { return skipped_; }
  at::Device device() const { return device_; }
  at::ScalarType dtype() const { return dtype_; }

 private:
  // Small and in order of use: with hundreds of tiny tensors, cache misses are what a phase is made of.
  struct Entry {
    char* w = nullptr;           // the weights, in `layout()`'s strides
    const char* now = nullptr;   // this pass's gradient, in the same strides; null without one
    at::Tensor* grad = nullptr;  // .grad itself, in this pass
    int32_t group, dim;
    int64_t shape;           // where in shapes_ it is
    bool dense;              // its elements fill its storage: worked on in place
    bool perturbed = false;  // w is not w, but saved is
    bool member = false;     // had a gradient in some pass of this step
    at::Tensor g;            // BSAM: g, then g + g_max
    at::Tensor own;          // where g is kept when it had to be copied
    at::Tensor staged;       // holds `now` where the gradient had other strides
    at::Tensor packed;       // where not dense: its elements, packed
  };

  static void forget_gradient(Entry& e);
  const at::Tensor& layout(size_t i) const { return entries_[i].dense ? params_[i] : entries_[i].packed; }
  bool unmoved(size_t i) const;
  void read_weights(size_t i);
  void wrote_weights(size_t i);
  bool take_gradient(size_t i);
  template <class Wanted>
  void end_pass(Wanted wanted);
  char* buffer(const std::string& key);
  void check_groups(size_t groups) const;
  std::vector<Radius> radii_of(const Radii& radii, double sum, double norm_eps) const;
  bool finite(const at::Tensor& sums) const;
  void write_saved();
  at::Tensor view(const std::string& key, size_t i);
  template <class Counts, class Rule>
  std::vector<int64_t> update(const at::Tensor& sums, bool from_saved, Counts counts, Rule rule);

  template <class Body>
  void for_blocks(Body body) const;
  template <class Body>
  void for_segments(Body body) const;
  template <class Term>
  double sum_segments(Term term);

  std::vector<at::Tensor> params_;
  std::vector<std::pair<int64_t, int64_t>> places_;
  at::Device device_;
  at::ScalarType dtype_;
  int64_t itemsize_;
  FlatIndex index_;
  const Loops& loops_;
  bool stream_;
  std::vector<Entry> entries_;
  std::vector<int64_t> shapes_;                // sizes and strides of every parameter as recorded, end to end
  std::map<std::string, at::Tensor> buffers_;  // "saved", and the base optimizer's state
  at::Tensor sums_, steps_;
  std::vector<double> partial_;  // of a sum, one a block
  int64_t skipped_ = 0, groups_ = 0;
  bool at_w_ = false;       // saved holds the perturbed weights meanwhile
  bool bilateral_ = false;  // this step's ascend kept g
};

}  // namespace bsam
