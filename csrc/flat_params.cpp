#include "flat_params.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/irange.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <optional>

#include "holders.h"
#include "math.h"

namespace bsam {

namespace {

// From here on (a model that no cache holds) what is only written goes around the cache.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

constexpr int64_t kBlocksAThread = 2;  // at least: below, waking a thread takes longer than the work

constexpr int64_t kSmallBytes = 4096;  // up to here a gradient is copied rather than taken

// What stands for a gradient that is missing: one block of zeros of any dtype.
alignas(64) const char kZeros[kBlock * 8] = {};

Dtype loops_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::float32;
    case at::kDouble:
      return Dtype::float64;
    case at::kBFloat16:
      return Dtype::bfloat16;
    case at::kHalf:
      return Dtype::float16;
    default:
      throw std::invalid_argument("FlatParams: dtype must be float32, float64, bfloat16 or float16");
  }
}

std::vector<int64_t> numels(const std::vector<at::Tensor>& params) {
  std::vector<int64_t> result;
  for (const auto& p : params) result.push_back(p.numel());
  return result;
}

// The address of byte `at`, without a tensor none.
char* data(const at::Tensor& t, int64_t at) {
  return t.defined() ? static_cast<char*>(t.unsafeGetTensorImpl()->mutable_data()) + at : nullptr;
}

double at_slot(const at::Tensor& sums, int64_t slot) { return sums.const_data_ptr<double>()[slot]; }

}  // namespace

FlatParams::FlatParams(std::vector<at::Tensor> params, std::vector<std::pair<int64_t, int64_t>> places)
    : params_(std::move(params)),
      places_(std::move(places)),
      device_(params_.at(0).device()),
      dtype_(params_[0].scalar_type()),
      itemsize_(int64_t(params_[0].element_size())),
      index_(numels(params_), itemsize_),
      loops_(best_loops(loops_dtype(dtype_))),
      stream_(index_.size() * itemsize_ >= kStreamBytes),
      sums_(at::zeros({3}, at::kDouble)),
      steps_(at::zeros({int64_t(params_.size())}, at::kFloat)),
      partial_(index_.blocks()) {
  entries_.reserve(params_.size());
  for (size_t i : c10::irange(params_.size())) {
    const auto& p = params_[i];
    if (p.scalar_type() != dtype_ || !p.device().is_cpu())
      throw std::invalid_argument("FlatParams (cpp): all parameters must be on the CPU and of one dtype");
    Entry entry;
    entry.group = int32_t(places_.at(i).first);
    groups_ = std::max(groups_, int64_t(entry.group) + 1);
    entry.dim = int32_t(p.dim());
    entry.shape = int64_t(shapes_.size());
    shapes_.insert(shapes_.end(), p.sizes().begin(), p.sizes().end());
    shapes_.insert(shapes_.end(), p.strides().begin(), p.strides().end());
    entry.dense = p.is_non_overlapping_and_dense() && !p.is_neg();
    if (!entry.dense) entry.packed = at::empty(p.sizes(), p.options().requires_grad(false));
    entries_.push_back(std::move(entry));
  }
}

// ---- parameters and gradients

// Whether the parameter is as recorded.
bool FlatParams::unmoved(size_t i) const {
  const auto& p = params_[i];
  const Entry& e = entries_[i];
  if (p.scalar_type() != dtype_ || p.device() != device_ || p.dim() != e.dim) return false;
  const int64_t* recorded = shapes_.data() + e.shape;
  return std::equal(recorded, recorded + e.dim, p.sizes().begin()) &&
         std::equal(recorded + e.dim, recorded + 2 * e.dim, p.strides().begin());
}

void FlatParams::read_weights(size_t i) {
  Entry& e = entries_[i];
  if (!e.dense) e.packed.copy_(params_[i].detach());
  e.w = data(layout(i), 0);
}

void FlatParams::wrote_weights(size_t i) {
  const auto& p = params_[i];
  if (!entries_[i].dense) p.detach().copy_(entries_[i].packed);
  if (!p.is_inference()) p.unsafeGetTensorImpl()->bump_version();
}

void FlatParams::read_gradients() {
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    e.now = nullptr;
    e.staged.reset();
    e.grad = &params_[i].mutable_grad();
    const at::Tensor& grad = *e.grad;
    if (!unmoved(i)) throw BadParameter{i};
    if (!grad.defined()) continue;
    if (grad.layout() != at::kStrided || grad.scalar_type() != dtype_ || grad.device() != device_ ||
        grad.sizes() != params_[i].sizes())
      throw BadParameter{i};
    read_weights(i);
    // A lazily negated or zero gradient is not what its memory says; a copy is.
    if (grad.strides() == layout(i).strides() && !grad.is_neg() && !grad._is_zerotensor()) {
      e.now = data(grad, 0);
    } else {
      e.staged = at::empty_strided(layout(i).sizes(), layout(i).strides(), grad.options().requires_grad(false));
      e.staged.copy_(grad.detach());
      e.now = data(e.staged, 0);
    }
    if (grad.numel() == 0)
      e.now = kZeros;  // without elements it has no address, yet it is one
    else if (e.now == nullptr || e.w == nullptr)
      throw BadParameter{i};
  }
}

void FlatParams::clear_gradients() {
  for (const auto& p : params_)
    if (p.grad().defined()) p.mutable_grad().reset();
}

// Takes g for ourselves: the gradient itself where nobody else holds it or its storage (a DDP bucket's view does),
// else, or where it is smaller than the work of finding out, a copy, in a tensor that is kept for the next steps.
// Returns false where the copy is large, and left to be made.
bool FlatParams::take_gradient(size_t i) {
  Entry& e = entries_[i];
  const bool small = index_.numel(int64_t(i)) * itemsize_ <= kSmallBytes;
  if (!small && !e.staged.defined() && !e.grad->requires_grad() && !held_elsewhere(*e.grad)) {
    e.g = std::move(*e.grad);
    return true;
  }
  if (!e.own.defined()) e.own = at::empty_strided(layout(i).sizes(), layout(i).strides(), at::dtype(dtype_));
  e.g = e.own;
  if (small) loops_.copy(data(e.g, 0), e.now, false, index_.numel(int64_t(i)));
  return small;
}

void FlatParams::forget_gradient(Entry& e) {
  e.now = nullptr;
  e.staged.reset();
  e.grad->reset();
}

// Ends a pass, in one walk: notes what was written, takes the gradients that are `wanted`, leaves .grad None.
template <class Wanted>
void FlatParams::end_pass(Wanted wanted) {
  std::vector<char> copying;
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (e.perturbed) wrote_weights(i);
    if (!e.now) continue;
    if (!wanted(e) || take_gradient(i)) {
      forget_gradient(e);
    } else {
      copying.resize(params_.size());
      copying[i] = true;
    }
  }
  if (copying.empty()) return;
  for_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    const int64_t at = s.begin * itemsize_;
    if (copying[s.tensor]) loops_.copy(data(e.g, at), e.now + at, stream_, s.count);
  });
  for (size_t i : c10::irange(params_.size()))
    if (copying[i]) forget_gradient(entries_[i]);
}

// ---- loops

void FlatParams::check_groups(size_t groups) const {
  if (int64_t(groups) < groups_)
    throw std::invalid_argument("FlatParams: options for fewer groups than parameters have");
}

std::vector<Radius> FlatParams::radii_of(const Radii& radii, double sum, double norm_eps) const {
  check_groups(radii.size());
  std::vector<Radius> result;
  for (const auto& r : radii) result.push_back({step_length(r[0], sum, norm_eps), r[2], r[1] != 0});
  return result;
}

// Runs body(block) for every block; Python's lock is let go of where that takes longer than taking it back.
template <class Body>
void FlatParams::for_blocks(Body body) const {
  std::optional<pybind11::gil_scoped_release> unlocked;
  if (index_.blocks() > kBlocksAThread) unlocked.emplace();
  at::parallel_for(0, index_.blocks(), kBlocksAThread, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) body(block);
  });
}

template <class Body>
void FlatParams::for_segments(Body body) const {
  for_blocks([&](int64_t block) { index_.for_each_segment(block, body); });
}

// The sum of term(segment) over all segments: a partial sum a block, then those in order.
template <class Term>
double FlatParams::sum_segments(Term term) {
  for_blocks([&](int64_t block) {
    double sum = 0;
    index_.for_each_segment(block, [&](const Segment& s) { sum += term(s); });
    partial_[block] = sum;
  });
  double sum = 0;
  for (double part : partial_) sum += part;
  return sum;
}

char* FlatParams::buffer(const std::string& key) {
  at::Tensor& flat = buffers_[key];
  if (!flat.defined()) flat = at::zeros({index_.size()}, at::dtype(dtype_));
  return static_cast<char*>(flat.mutable_data_ptr());
}

bool FlatParams::finite(const at::Tensor& sums) const {
  return std::isfinite(at_slot(sums, kAscent)) && std::isfinite(at_slot(sums, kMax)) &&
         std::isfinite(at_slot(sums, kMin));
}

void FlatParams::square_norm(int64_t slot, const Radii& radii) {
  const auto groups = radii_of(radii, 0, 1);
  sums_.mutable_data_ptr<double>()[slot] = sum_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    if (!e.now) return 0.0;
    const int64_t at = s.begin * itemsize_;
    return loops_.square_norm(e.w + at, e.now + at, groups[e.group], s.count);
  });
}

void FlatParams::ascend(const at::Tensor& sums, const Radii& radii, double norm_eps, bool keep) {
  const bool perturb = std::isfinite(at_slot(sums, kAscent));
  bilateral_ = keep;
  if (perturb) {
    const auto groups = radii_of(radii, at_slot(sums, kAscent), norm_eps);
    char* saved = buffer("saved");
    for (Entry& e : entries_) e.perturbed = e.now != nullptr;
    for_segments([&](const Segment& s) {
      const Entry& e = entries_[s.tensor];
      const int64_t at = s.begin * itemsize_;
      if (e.now) loops_.ascend(e.w + at, e.now + at, saved + s.flat * itemsize_, groups[e.group], stream_, s.count);
    });
  }
  end_pass([&](const Entry&) { return keep; });
}

void FlatParams::descend(const at::Tensor& sums, const Radii& radii, double norm_eps) {
  const auto groups = radii_of(radii, at_slot(sums, kAscent), norm_eps);
  const char* saved = buffer("saved");
  for (size_t i : c10::irange(params_.size()))
    if (entries_[i].perturbed) read_weights(i);
  // Without g (a gradient in this pass only) the weights stay, and g + g_max is g_max.
  const double sum = sum_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    const int64_t at = s.begin * itemsize_;
    const char* g_max = e.now ? e.now + at : kZeros;
    if (!e.perturbed) return loops_.square_norm(nullptr, g_max, Radius{}, s.count);
    return loops_.descend(e.w + at, data(e.g, at), g_max, saved + s.flat * itemsize_, groups[e.group], stream_,
                          s.count);
  });
  sums_.mutable_data_ptr<double>()[kMax] = sum;
  end_pass([](const Entry& e) { return !e.g.defined(); });
  if (!std::isfinite(sum)) restore();
}

// ---- the end of a step

// Applies rule(Update, entry, segment) to every tensor that had a gradient in some pass of this step, where
// all sums are finite. `counts(group)`: whether the base optimizer keeps state for the group. Returns the
// tensors whose state begins with this step.
template <class Counts, class Rule>
std::vector<int64_t> FlatParams::update(const at::Tensor& sums, bool from_saved, Counts counts, Rule rule) {
  if (!finite(sums)) {
    ++skipped_;
    restore();
    return {};
  }
  std::vector<int64_t> started;
  float* steps = steps_.mutable_data_ptr<float>();
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    e.member = e.perturbed || e.now || e.g.defined();
    if (!e.member) continue;
    read_weights(i);
    if (counts(e.group) && ++steps[i] == 1) started.push_back(int64_t(i));
  }
  const char* saved = from_saved && buffers_.count("saved") ? buffer("saved") : nullptr;
  const double c = bilateral_coefficient(at_slot(sums, kMax), at_slot(sums, kMin));
  for_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    if (!e.member) return;
    const int64_t at = s.begin * itemsize_;
    const char* now = e.now ? e.now + at : nullptr;
    const char* g = bilateral_ ? static_cast<const char*>(data(e.g, at)) : now;
    rule(Update{e.w + at, e.perturbed && saved ? saved + s.flat * itemsize_ : e.w + at, g ? g : kZeros,
                bilateral_ ? now : nullptr, c, stream_, s.count},
         e, s);
  });
  for (size_t i : c10::irange(params_.size()))
    if (entries_[i].member) wrote_weights(i);
  release();
  return started;
}

std::vector<int64_t> FlatParams::update_sgd(const at::Tensor& sums, const SgdGroups& groups, bool from_saved) {
  check_groups(groups.size());
  std::vector<SgdGroup> rules;
  bool momentum = false;
  for (const auto& o : groups) {
    rules.push_back({o[0], o[1], o[2], o[3], o[4] != 0, o[5] != 0});
    momentum |= o[1] != 0;
  }
  char* m = momentum ? buffer("momentum_buffer") : nullptr;
  const float* steps = steps_.const_data_ptr<float>();
  return update(
      sums, from_saved, [&](int64_t group) { return rules[group].momentum != 0; },
      [&](const Update& u, const Entry& e, const Segment& s) {
        const SgdGroup& rule = rules[e.group];
        loops_.sgd(u, rule, rule.momentum != 0 ? m + s.flat * itemsize_ : nullptr, steps[s.tensor] == 1);
      });
}

std::vector<int64_t> FlatParams::update_adam(const at::Tensor& sums, const AdamGroups& groups, bool from_saved) {
  check_groups(groups.size());
  std::vector<AdamGroup> rules;
  for (const auto& o : groups) rules.push_back({o[0], o[1], o[2], o[3], o[4], o[5] != 0, o[6] != 0});
  char *m = buffer("exp_avg"), *v = buffer("exp_avg_sq");
  const float* steps = steps_.const_data_ptr<float>();
  return update(
      sums, from_saved, [](int64_t) { return true; },
      [&](const Update& u, const Entry& e, const Segment& s) {
        loops_.adam(u, rules[e.group], m + s.flat * itemsize_, v + s.flat * itemsize_, steps[s.tensor]);
      });
}

bool FlatParams::combine(const at::Tensor& sums, bool from_saved) {
  if (!finite(sums)) {
    ++skipped_;
    restore();
    return false;
  }
  const double c = bilateral_coefficient(at_slot(sums, kMax), at_slot(sums, kMin));
  const auto zeros = [&](size_t i) { return at::zeros_like(layout(i).detach()); };
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (bilateral_ && e.now && !e.g.defined()) e.g = zeros(i);
    if (!bilateral_ && e.perturbed && !e.now) params_[i].mutable_grad() = zeros(i);
  }
  for_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    const int64_t at = s.begin * itemsize_;
    if (bilateral_ && e.now) loops_.direction(data(e.g, at), e.now + at, c, s.count);
  });
  if (from_saved) write_saved();
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (e.g.defined()) params_[i].mutable_grad() = std::move(e.g);
    e.own.reset();  // it may be the gradient now
  }
  return true;
}

// ---- giving up, and looking at w meanwhile

// saved -> w, for the perturbed. Also right for a parameter that was moved since: torch copies that one.
void FlatParams::write_saved() {
  if (at_w_ || !buffers_.count("saved")) return;
  const char* saved = buffer("saved");
  const auto in_place = [&](size_t i) { return entries_[i].perturbed && unmoved(i); };
  for (size_t i : c10::irange(params_.size()))
    if (in_place(i)) read_weights(i);
  for_segments([&](const Segment& s) {
    if (in_place(s.tensor))
      loops_.copy(entries_[s.tensor].w + s.begin * itemsize_, saved + s.flat * itemsize_, stream_, s.count);
  });
  for (size_t i : c10::irange(params_.size())) {
    if (in_place(i))
      wrote_weights(i);
    else if (entries_[i].perturbed)
      params_[i].detach().copy_(view("saved", i));
  }
}

void FlatParams::restore() {
  write_saved();
  release();
}

void FlatParams::release() {
  at_w_ = false;
  for (Entry& e : entries_) {
    e.perturbed = false;
    e.now = nullptr;
    e.g.reset();
    e.staged.reset();
  }
}

// One tensor at a time, through torch: this is for looking, not for the hot path, and right for moved ones too.
void FlatParams::show_w(bool at_w) {
  if (at_w == at_w_) return;
  for (size_t i : c10::irange(params_.size())) {
    if (!entries_[i].perturbed) continue;
    at::Tensor weights = params_[i].detach(), saved = view("saved", i);
    const at::Tensor kept = weights.clone();
    weights.copy_(saved);
    saved.copy_(kept);
  }
  at_w_ = at_w;
}

// ---- the base optimizer's state

at::Tensor FlatParams::view(const std::string& key, size_t i) {
  if (key == "step") return steps_.select(0, int64_t(i));
  buffer(key);
  return buffers_[key].as_strided(layout(i).sizes(), layout(i).strides(), index_.offset(int64_t(i)));
}

std::vector<at::Tensor> FlatParams::state(const std::string& key) {
  std::vector<at::Tensor> views;
  for (size_t i : c10::irange(params_.size())) views.push_back(view(key, i));
  return views;
}

int64_t FlatParams::extra_bytes() const {
  int64_t bytes = 0;
  for (const auto& [key, flat] : buffers_) bytes += int64_t(flat.nbytes());
  for (const Entry& e : entries_) {
    if (e.packed.defined()) bytes += int64_t(e.packed.nbytes());
    if (e.own.defined()) bytes += int64_t(e.own.nbytes());
    if (e.g.defined() && !e.g.is_same(e.own)) bytes += int64_t(e.g.nbytes());
  }
  return bytes;
}

}  // namespace bsam
