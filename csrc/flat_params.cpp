#include "flat_params.h"

#include <ATen/Functions.h>
#include <c10/util/irange.h>

#include "holders.h"
#include "rounding.h"

namespace bsam {

namespace {

constexpr int64_t kSmallBytes = 4096;  // up to here a gradient is copied rather than taken

// What stands for the address of a gradient without elements: it has none, yet is one.
char kNothing[1] = {};

char* address(const at::Tensor& t) { return t.numel() == 0 ? kNothing : static_cast<char*>(t.mutable_data_ptr()); }

std::vector<int64_t> numels(const std::vector<at::Tensor>& params) {
  std::vector<int64_t> result;
  for (const auto& p : params) result.push_back(p.numel());
  return result;
}

}  // namespace

Dtype element_type(at::ScalarType dtype) {
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

FlatParams::FlatParams(std::vector<at::Tensor> params, std::vector<std::pair<int64_t, int64_t>> places,
                       std::optional<uint32_t> seed)
    : params_(std::move(params)),
      places_(std::move(places)),
      device_(params_.at(0).device()),
      dtype_(params_[0].scalar_type()),
      itemsize_(int64_t(params_[0].element_size())),
      index_(numels(params_), itemsize_),
      sums_(at::zeros({kSlots}, at::dtype(at::kDouble).device(device_))),
      steps_(at::zeros({int64_t(params_.size())}, at::dtype(at::kFloat).device(device_))),
      skipped_(at::zeros({}, at::dtype(at::kLong).device(device_))),
      step_count_(at::zeros({}, at::dtype(at::kLong).device(device_))) {
  entries_.reserve(params_.size());
  for (size_t i : c10::irange(params_.size())) {
    const auto& p = params_[i];
    if (p.scalar_type() != dtype_ || p.device() != device_)
      throw std::invalid_argument("FlatParams: all parameters must be on one device and of one dtype");
    Entry entry;
    entry.group = int32_t(places_.at(i).first);
    groups_ = std::max(groups_, int64_t(entry.group) + 1);
    entry.dim = int32_t(p.dim());
    entry.shape = int64_t(shapes_.size());
    shapes_.insert(shapes_.end(), p.sizes().begin(), p.sizes().end());
    shapes_.insert(shapes_.end(), p.strides().begin(), p.strides().end());
    entry.dense = p.is_non_overlapping_and_dense() && !p.is_neg();
    if (!entry.dense) entry.packed = at::empty_like(p.detach());
    entries_.push_back(std::move(entry));
    if (seed && itemsize_ == 2)
      keys_.push_back(tensor_key(*seed, uint32_t(places_[i].first), uint32_t(places_[i].second)));
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
      e.now = kNothing;
    else if (e.now == nullptr || e.w == nullptr)
      throw BadParameter{i};
  }
}

void FlatParams::clear_gradients() {
  for (const auto& p : params_)
    if (p.grad().defined()) p.mutable_grad().reset();
}

// Takes the gradients of this pass into g, where g is not there yet: the gradient itself where nobody else holds it
// or its storage (a DDP bucket's view does), else, or where it is smaller than the work of finding out, a copy, in a
// tensor that is kept for the next steps and is filled where the phase runs over the elements.
void FlatParams::take_gradients() {
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (!e.now || e.g) continue;
    const bool small = index_.numel(int64_t(i)) * itemsize_ <= kSmallBytes;
    e.copying = small || e.staged.defined() || e.grad->requires_grad() || held_elsewhere(*e.grad);
    if (!e.copying) {
      take(e, std::move(*e.grad));
      continue;
    }
    if (!e.copy) make_own(i);
    e.g = e.copy;
  }
}

void FlatParams::make_own(size_t i) {
  Entry& e = entries_[i];
  e.own = at::empty_strided(layout(i).sizes(), layout(i).strides(), at::dtype(dtype_).device(device_));
  e.copy = address(e.own);
}

void FlatParams::take(Entry& e, at::Tensor g) {
  e.g = address(g);
  e.taken = std::move(g);
}

// Gives g away, which is then nowhere.
at::Tensor FlatParams::give(Entry& e) {
  e.g = nullptr;
  return e.taken.defined() ? std::move(e.taken) : e.own;
}

void FlatParams::forget_gradient(Entry& e) {
  e.now = nullptr;
  e.copying = false;
  e.staged.reset();
  e.grad->reset();
}

// Ends a pass: notes what was written, leaves .grad None.
void FlatParams::end_pass() {
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (e.perturbed) wrote_weights(i);
    if (e.now) forget_gradient(e);
  }
}

char* FlatParams::buffer(const std::string& key) {
  auto found = buffers_.find(key);
  if (found == buffers_.end())
    found = buffers_.emplace(key, new_buffer(index_.size(), key == kMasterWeight ? at::kFloat : dtype_)).first;
  return data(found->second, 0);
}

at::Tensor FlatParams::new_buffer(int64_t numel, at::ScalarType dtype) const {
  return at::zeros({numel}, at::dtype(dtype).device(device_));
}

void FlatParams::check_groups(size_t groups) const {
  if (int64_t(groups) < groups_)
    throw std::invalid_argument("FlatParams: options for fewer groups than parameters have");
}

// ---- phases

void FlatParams::ascend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps, bool keep) {
  check_groups(radii.size());
  bilateral_ = keep;
  if (keep) take_gradients();
  run_ascend(sums, radii, norm_eps);
  end_pass();
}

void FlatParams::descend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) {
  check_groups(radii.size());
  for (size_t i : c10::irange(params_.size()))
    if (entries_[i].perturbed && !entries_[i].now) read_weights(i);
  take_gradients();
  run_descend(sums, radii, norm_eps);
  end_pass();
  const double* known = on_host(sums_);
  if (known && !is_finite(known[kMax])) restore();
}

// ---- the end of a step

bool FlatParams::skips(const at::Tensor& sums) {
  const double* known = on_host(sums);
  if (!known || all_finite(known)) return false;
  skip();
  return true;
}

void FlatParams::skip() {
  skipped_.add_(1);
  step_count_.add_(1);
  restore();
}

int64_t FlatParams::skipped() const { return skipped_.item<int64_t>(); }

// Finds the members, the tensors that had a gradient in some pass of this step. `counts(group)`: whether the base
// optimizer keeps state for the group. Returns the tensors whose state begins with this step.
template <class Counts>
std::vector<int64_t> FlatParams::begin_update(Counts counts) {
  std::vector<int64_t> begun;
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    e.member = e.perturbed || e.now || e.g;
    e.counted = e.member && counts(e.group);
    if (e.member && !e.now) read_weights(i);
    if (e.counted && !e.begun) begun.push_back(int64_t(i));
  }
  return begun;
}

void FlatParams::end_update() {
  for (size_t i : c10::irange(params_.size())) {
    if (entries_[i].member) wrote_weights(i);
    entries_[i].begun |= entries_[i].counted;
  }
  release();
}

std::vector<int64_t> FlatParams::update_sgd(const at::Tensor& sums, const Options<SgdGroup>& groups, bool from_saved,
                                            double max_norm) {
  check_groups(groups.size());
  if (skips(sums)) return {};
  auto begun = begin_update([&](int64_t group) { return SgdGroup::from(groups[group].data()).momentum != 0; });
  run_sgd(sums, groups, from_saved, max_norm);
  end_update();
  return begun;
}

std::vector<int64_t> FlatParams::update_adam(const at::Tensor& sums, const Options<AdamGroup>& groups, bool from_saved,
                                             double max_norm) {
  check_groups(groups.size());
  if (skips(sums)) return {};
  auto begun = begin_update([](int64_t) { return true; });
  run_adam(sums, groups, from_saved, max_norm);
  end_update();
  return begun;
}

void FlatParams::scale_gradients(double factor) {
  if (factor == 1) return;
  std::vector<at::Tensor> gradients;
  for (const auto& p : params_)
    if (p.grad().defined()) gradients.push_back(p.grad().detach());
  if (!gradients.empty()) at::_foreach_mul_(gradients, factor);
}

// g = g + g_max − c g_min, of all that had a gradient in some pass.
void FlatParams::mix(const at::Tensor& sums) {
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (e.now && !e.g) take(e, at::zeros_like(layout(i).detach()));
  }
  run_direction(sums);
}

bool FlatParams::combine(const at::Tensor& sums, bool from_saved, double max_norm) {
  const at::Tensor here = sums.cpu();
  const double* known = here.const_data_ptr<double>();
  if (!all_finite(known)) {
    skip();
    return false;
  }
  if (bilateral_)
    mix(sums);
  else
    for (size_t i : c10::irange(params_.size()))
      if (entries_[i].perturbed && !entries_[i].now) params_[i].mutable_grad() = at::zeros_like(layout(i).detach());
  if (from_saved) write_saved();
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (e.g) params_[i].mutable_grad() = give(e);
    e.copy = nullptr;
    e.own.reset();  // it may be the gradient now
  }
  step_count_.add_(1);
  scale_gradients(DirectionScales::from(known, bilateral_, max_norm).factor);
  return true;
}

at::Tensor FlatParams::merge(const at::Tensor& sums, double share) {
  mix(sums);
  buffer(kDirection);
  at::Tensor& flat = buffers_[kDirection].zero_();
  std::vector<at::Tensor> parts, directions;
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (!e.g) continue;
    parts.push_back(view(kDirection, i));
    directions.push_back(give(e));
    params_[i].mutable_grad() = parts.back();
  }
  if (!parts.empty()) at::_foreach_copy_(parts, directions);
  bilateral_ = false;
  return flat.mul_(share);
}

void FlatParams::write_options(const std::vector<Rows>&) {
  throw std::runtime_error(
      "this backend's launches carry their options: a captured step would replay those it began with");
}

// ---- giving up, and looking at w meanwhile

// saved -> w, for the perturbed. Also right for a parameter that was moved since: torch copies that one.
void FlatParams::write_saved() {
  if (at_w_ || !buffers_.count("saved")) return;
  for (size_t i : c10::irange(params_.size())) {
    entries_[i].w = nullptr;
    if (entries_[i].perturbed && unmoved(i)) read_weights(i);
  }
  run_restore();
  for (size_t i : c10::irange(params_.size())) {
    if (!entries_[i].perturbed) continue;
    if (unmoved(i))
      wrote_weights(i);
    else
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
    e.copying = false;
    e.g = nullptr;
    e.taken.reset();
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

// Forgets the state of a tensor: the next update begins it.
void FlatParams::clear_state(int64_t i) {
  entries_[i].begun = false;
  steps_[i].zero_();
  for (const auto& [key, flat] : buffers_)
    if (key != "saved" && key != kDirection) view(key, size_t(i)).zero_();
}

int64_t FlatParams::extra_bytes() const {
  int64_t bytes = 0;
  for (const auto& [key, flat] : buffers_) bytes += int64_t(flat.nbytes());
  for (const Entry& e : entries_) {
    if (e.packed.defined()) bytes += int64_t(e.packed.nbytes());
    if (e.own.defined()) bytes += int64_t(e.own.nbytes());
    if (e.taken.defined()) bytes += int64_t(e.taken.nbytes());
  }
  return bytes;
}

}  // namespace bsam
