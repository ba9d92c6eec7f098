#include "flat_params.h"

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <limits>

#include "holders.h"
#include "memory.h"
#include "rounding.h"

namespace bsam {

namespace {

constexpr size_t kAhead = 4;           // tensors
constexpr int64_t kSmallBytes = 4096;  // up to here a gradient is copied rather than taken

// What stands for the address of a gradient without elements: it has none, yet is one.
char kNothing[1] = {};

char* address(const at::Tensor& t) { return t.numel() == 0 ? kNothing : static_cast<char*>(t.mutable_data_ptr()); }

// Whether others may hold a gradient's memory: its storage, or itself, as a parameter that is another one's gradient.
bool may_be_shared(const at::Tensor& t) { return t.defined() && (t.use_count() > 1 || t.storage().use_count() > 1); }

const at::Tensor& tensor_of(const py::object& param) {
  if (!THPVariable_Check(param.ptr())) throw py::type_error("FlatParams: every parameter must be a torch.Tensor");
  return THPVariable_Unpack(param.ptr());
}

const at::Tensor& first(const std::vector<py::object>& params) {
  if (params.empty()) throw std::invalid_argument("FlatParams: no parameters");
  return tensor_of(params[0]);
}

void check_place(const std::pair<int64_t, int64_t>& place) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (std::min(place.first, place.second) < 0 || std::max(place.first, place.second) >= most)
    throw std::invalid_argument("FlatParams: a place is a param group and an index there, neither below 0");
}

std::vector<int64_t> numels(const std::vector<py::object>& params) {
  const at::Tensor& one = first(params);
  std::vector<int64_t> result;
  for (const auto& param : params) {
    const at::Tensor& p = tensor_of(param);
    if (p.layout() != at::kStrided || !p.has_storage())
      throw std::invalid_argument("FlatParams: every parameter must be a dense tensor with a storage of its own");
    if (p.scalar_type() != one.scalar_type() || p.device() != one.device())
      throw std::invalid_argument("FlatParams: all parameters must be on one device and of one dtype");
    if (at::has_internal_overlap(p) == at::MemOverlap::Yes)
      throw std::invalid_argument("FlatParams: an expanded parameter's elements share memory");
    result.push_back(p.numel());
  }
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

FlatParams::FlatParams(std::vector<py::object> params, std::vector<std::pair<int64_t, int64_t>> places,
                       std::optional<uint32_t> seed, bool exempt)
    : limit(element_type(first(params).scalar_type()) == Dtype::float64 ? std::numeric_limits<double>::max()
                                                                        : std::numeric_limits<float>::max()),
      params_(std::move(params)),
      places_(std::move(places)),
      device_(first(params_).device()),
      dtype_(param(0).scalar_type()),
      itemsize_(int64_t(param(0).element_size())),
      index_(numels(params_), itemsize_),
      sums_(at::zeros({kSlots}, at::dtype(at::kDouble).device(device_))),
      steps_(at::zeros({int64_t(params_.size())}, at::dtype(at::kFloat).device(device_))),
      skipped_(at::zeros({}, at::dtype(at::kLong).device(device_))),
      step_count_(at::zeros({}, at::dtype(at::kLong).device(device_))),
      exempt_(exempt),
      deleter_(deleter_of(sums_)) {
  element_type(dtype_);
  if (places_.size() != params_.size()) throw std::invalid_argument("FlatParams: every parameter needs its place");
  entries_.reserve(params_.size());
  for (size_t i : c10::irange(params_.size())) {
    check_place(places_[i]);
    const at::Tensor& p = param(i);
    Entry entry;
    entry.group = int32_t(places_[i].first);
    groups_ = std::max(groups_, int64_t(entry.group) + 1);
    entry.dim = int32_t(p.dim());
    entry.shape = int32_t(shapes_.size());
    shapes_.insert(shapes_.end(), p.sizes().begin(), p.sizes().end());
    shapes_.insert(shapes_.end(), p.strides().begin(), p.strides().end());
    entry.dense = p.is_non_overlapping_and_dense() && !p.is_neg();
    if (!entry.dense) entry.packed = at::empty_like(p.detach());
    entries_.push_back(std::move(entry));
    if (seed && itemsize_ == 2)
      keys_.push_back(tensor_key(*seed, uint32_t(places_[i].first), uint32_t(places_[i].second)));
  }
  built_ = true;
}

// ---- parameters

at::IntArrayRef FlatParams::sizes(size_t i) const {
  return {shapes_.data() + entries_[i].shape, size_t(entries_[i].dim)};
}

at::IntArrayRef FlatParams::strides(size_t i) const {
  const Entry& e = entries_[i];
  return e.dense ? at::IntArrayRef(shapes_.data() + e.shape + e.dim, size_t(e.dim)) : e.packed.strides();
}

at::Tensor FlatParams::empty(size_t i) const {
  return at::empty_strided(sizes(i), strides(i), at::dtype(dtype_).device(device_));
}

// Whether the parameter is as recorded.
bool FlatParams::unmoved(size_t i) const {
  const at::Tensor& p = param(i);
  const Entry& e = entries_[i];
  if (p.scalar_type() != dtype_ || p.device() != device_ || p.dim() != e.dim) return false;
  const int64_t* recorded = shapes_.data() + e.shape;
  return std::equal(recorded, recorded + e.dim, p.sizes().begin()) &&
         std::equal(recorded + e.dim, recorded + e.dim + e.dim, p.strides().begin());
}

// Whether saved can be put back, by torch where the parameter is not as recorded.
bool FlatParams::fits(size_t i) const {
  const at::Tensor& p = param(i);
  return p.layout() == at::kStrided && p.sizes() == sizes(i) && !p.is_meta() && in_storage(p, false) &&
         at::has_internal_overlap(p) != at::MemOverlap::Yes;
}

void FlatParams::read_weights(size_t i) {
  if (!unmoved(i)) throw BadParameter{BadParameter::kRejected, i};
  read_unmoved(i);
}

void FlatParams::read_unmoved(size_t i) {
  Entry& e = entries_[i];
  const at::Tensor& p = param(i);
  if (!in_storage(p, e.dense)) throw BadParameter{BadParameter::kMemory, i};
  if (!e.dense) e.packed.copy_(p.detach());
  e.w = data(e.dense ? p : e.packed, 0);
}

void FlatParams::wrote_weights(size_t i) {
  const at::Tensor& p = param(i);
  if (!entries_[i].dense) p.detach().copy_(entries_[i].packed);
  if (!p.is_inference()) p.unsafeGetTensorImpl()->bump_version();
}

// ---- gradients

void FlatParams::read_gradients() {
  read_ = false;
  ours_.clear();
  try {
    for (size_t i : c10::irange(params_.size())) {
      if (i + kAhead < params_.size()) expect(i + kAhead);
      read_gradient(i);
    }
  } catch (...) {
    for (Entry& e : entries_) e.now = nullptr;
    throw;
  }
  read_ = true;
  updated_ = false;
}

// Has memory bring what was read of a tensor last time: after a backward pass no cache holds it.
void FlatParams::expect(size_t i) const {
  const Entry& e = entries_[i];
  __builtin_prefetch(params_[i].ptr());
  for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(e.tensor) + line);
}

void FlatParams::read_gradient(size_t i) {
  Entry& e = entries_[i];
  const at::Tensor& p = param(i);
  e.now = nullptr;
  if (e.staging) e.staged.reset();
  e.staging = false;
  e.tensor = p.unsafeGetTensorImpl();
  const at::Tensor& grad = gradient(i);
  e.gradient = grad.unsafeGetTensorImpl();
  if (!unmoved(i)) throw BadParameter{BadParameter::kRejected, i};
  if (!grad.defined()) return;
  if (grad.layout() != at::kStrided || grad.scalar_type() != dtype_ || grad.device() != device_ ||
      grad.sizes() != p.sizes())
    throw BadParameter{BadParameter::kRejected, i};
  read_unmoved(i);
  if (grad.numel() == 0) {
    e.now = kNothing;
    return;
  }
  keep_until_read(grad);
  // A lazily negated or zero gradient is not what its memory says; a copy is.
  const bool lazy = grad.is_neg() || grad._is_zerotensor();
  const bool alike = !lazy && grad.strides() == strides(i);
  if (!grad._is_zerotensor() && !in_storage(grad, alike)) throw BadParameter{BadParameter::kMemory, i};
  if (!alike || deleter_of(grad) != deleter_ || (may_be_shared(grad) && is_ours(storage_of(grad))))
    stage(i, grad);
  else
    e.now = data(grad, 0);
}

// Copies a gradient that cannot be read in place, or whose memory others may write to as the phase runs.
void FlatParams::stage(size_t i, const at::Tensor& grad) {
  Entry& e = entries_[i];
  e.staged = empty(i);
  e.staging = true;
  e.staged.copy_(grad.detach());
  e.now = data(e.staged, 0);
}

// The storages that phases may write to, sorted: of parameters, of step counts and flat buffers.
std::vector<const c10::StorageImpl*> FlatParams::storages_of(const std::vector<const FlatParams*>& flats) {
  std::vector<const c10::StorageImpl*> storages;
  for (const FlatParams* flat : flats) {
    for (size_t i : c10::irange(flat->params_.size())) storages.push_back(storage_of(flat->param(i)));
    storages.push_back(storage_of(flat->steps_));
    for (const auto& [key, buffer] : flat->buffers_) storages.push_back(storage_of(buffer));
  }
  std::sort(storages.begin(), storages.end());
  return storages;
}

// Whether a phase of this FlatParams may write to the storage as gradients are read in it: not to what `merge` has made
// the gradients.
bool FlatParams::is_ours(const c10::StorageImpl* storage) {
  if (ours_.empty()) {
    ours_ = storages_of({this});
    const auto merged = buffers_.find(kDirection);
    if (merged != buffers_.end()) ours_.erase(std::find(ours_.begin(), ours_.end(), storage_of(merged->second)));
  }
  return std::binary_search(ours_.begin(), ours_.end(), storage);
}

// Copies the gradients that lie where others in the step may write.
void FlatParams::copy_shared(const std::vector<const FlatParams*>& beside) {
  if (!read_) throw std::runtime_error("FlatParams: copy_shared() without read_gradients()");
  std::vector<size_t> shared;
  for (size_t i : c10::irange(params_.size())) {
    const Entry& e = entries_[i];
    if (e.now && e.now != kNothing && !e.staging && may_be_shared(gradient(i))) shared.push_back(i);
  }
  if (shared.empty()) return;
  check_noted();
  const auto theirs = storages_of(beside);
  for (size_t i : shared)
    if (std::binary_search(theirs.begin(), theirs.end(), storage_of(gradient(i)))) stage(i, gradient(i));
}

void FlatParams::clear_gradients() {
  for (size_t i : c10::irange(params_.size())) gradient(i).reset();
}

// Makes room for the gradients of this pass that are copied into g: those that somebody else holds, or whose storage (a
// DDP bucket's view), or that are smaller than the work of finding out. It is kept for the next steps.
void FlatParams::make_room() {
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (!e.now || e.g) continue;
    const bool small = index_.numel(int64_t(i)) * itemsize_ <= kSmallBytes;
    e.copying = small || e.staging || gradient(i).requires_grad() || held_elsewhere(gradient(i));
    if (e.copying) make_copy(i);
  }
}

// Makes room for what is kept of a tensor in memory of its own, if there is none.
void FlatParams::make_copy(size_t i) {
  Entry& e = entries_[i];
  if (e.copy) return;
  e.own = empty(i);
  e.copy = address(e.own);
}

// Takes the gradients of this pass into g, where g is not there yet; copies are made where the phase runs over the
// elements.
void FlatParams::take_gradients() {
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (!e.now || e.g) continue;
    if (e.copying)
      e.g = e.copy;
    else
      take(e, std::move(gradient(i)));
  }
}

// Copies the gradients of this pass that are `copying` into g, where no phase runs over the elements.
void FlatParams::copy_gradients() {
  std::vector<at::Tensor> to, from;
  for (size_t i : c10::irange(params_.size())) {
    const Entry& e = entries_[i];
    if (!e.copying) continue;
    to.push_back(e.own);
    from.push_back(e.staging ? e.staged : gradient(i).detach());
  }
  if (!to.empty()) at::_foreach_copy_(to, from);
}

void FlatParams::take(Entry& e, at::Tensor g) {
  e.g = address(g);
  e.taken = std::move(g);
}

// Copies the history that is an operand of d, where d is to be.
void FlatParams::own_history() {
  for (size_t i : c10::irange(entries_.size()))
    if (entries_[i].g) take(entries_[i], empty(i).copy_(view(history_of(rule_), i)));
}

// Gives g away, which is then nowhere.
at::Tensor FlatParams::give(Entry& e) {
  e.g = nullptr;
  if (e.taken.defined()) return std::move(e.taken);
  e.copy = nullptr;
  return std::move(e.own);
}

// ---- flat buffers

char* FlatParams::buffer(const std::string& key) {
  auto found = buffers_.find(key);
  if (found == buffers_.end())
    found = buffers_.emplace(key, new_buffer(index_.size(), key == kMasterWeight ? at::kFloat : dtype_)).first;
  if (!in_storage(found->second, true))
    throw std::runtime_error("FlatParams: the memory of \"" + key + "\" was freed or resized from outside");
  return data(found->second, 0);
}

at::Tensor FlatParams::new_buffer(int64_t numel, at::ScalarType dtype) const {
  return at::zeros({numel}, at::dtype(dtype).device(device_));
}

at::Tensor FlatParams::view(const std::string& key, size_t i) {
  if (key == "step") return steps_.select(0, int64_t(i));
  buffer(key);
  return buffers_[key].as_strided(sizes(i), strides(i), index_.offset(int64_t(i)));
}

// ---- the base optimizer's state

std::vector<at::Tensor> FlatParams::state(const std::string& key) {
  check_own();
  std::vector<at::Tensor> views;
  for (size_t i : c10::irange(params_.size())) views.push_back(view(key, i));
  return views;
}

std::vector<int64_t> FlatParams::beginning(const std::vector<bool>& stateful) const {
  check_groups(stateful.size());
  std::vector<int64_t> members;
  for (size_t i : c10::irange(entries_.size())) {
    const Entry& e = entries_[i];
    if ((e.ascended || e.now || e.g) && !e.begun && stateful[e.group]) members.push_back(int64_t(i));
  }
  return members;
}

void FlatParams::begin_state(const std::vector<int64_t>& members) {
  for (int64_t i : members)
    if (i < 0 || i >= int64_t(entries_.size())) throw std::out_of_range("FlatParams: no such parameter");
  for (int64_t i : members) entries_[i].begun = true;
}

void FlatParams::retract_state(int64_t i) {
  if (i < 0 || i >= int64_t(entries_.size())) throw std::out_of_range("FlatParams: no such parameter");
  entries_[i].begun = false;
}

void FlatParams::drop_state() {
  if (phase_ == Phase::kPlain && rule_ == Rule::reused)
    throw std::runtime_error("FlatParams: drop_state() in a step whose direction has the history");
  steps_ = new_buffer(int64_t(params_.size()), at::kFloat);
  for (auto it = buffers_.begin(); it != buffers_.end();)
    it = it->first == kSaved || it->first == kDirection ? std::next(it) : buffers_.erase(it);
  for (Entry& e : entries_) e.begun = false;
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
