#include "cuda_flat_params.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/irange.h>

#include <algorithm>

namespace bsam {

CudaFlatParams::CudaFlatParams(std::vector<py::object> params, std::vector<std::pair<int64_t, int64_t>> places,
                               std::optional<uint32_t> seed, bool exempt)
    : FlatParams(std::move(params), std::move(places), seed, exempt),
      workspace_(
          at::zeros({1 + cuda::kTerms * cuda::most_blocks(device_.index())}, at::dtype(at::kDouble).device(device_))),
      items_(entries_.size()) {
  refuse_capture();
  if (!keys_.empty())
    keys_on_device_ = at::from_blob(keys_.data(), {int64_t(keys_.size())}, at::kInt).to(device_, at::kInt, false, true);
  for (size_t i : c10::irange(entries_.size())) {
    items_[i].flat = index_.offset(int64_t(i));
    items_[i].group = uint32_t(entries_[i].group);
  }
}

// What a graph's capture makes is made anew, and zeroed, by every replay.
void CudaFlatParams::refuse_capture() const {
  if (cuda::is_capturing(c10::cuda::getCurrentCUDAStream(device_.index()).stream()))
    throw std::runtime_error("the first step cannot be captured in a CUDA graph: take one before, then capture");
}

at::Tensor CudaFlatParams::new_buffer(int64_t numel, at::ScalarType dtype) const {
  refuse_capture();
  at::Tensor found = FlatParams::new_buffer(numel, dtype);
  if (reinterpret_cast<uintptr_t>(found.const_data_ptr()) % 16 != 0)  // as every allocator of torch has it
    throw std::runtime_error("FlatParams: the allocator gave memory that does not begin at a multiple of 16 bytes");
  return found;
}

// Where backward ran on this stream, too, as is usual, torch does nothing.
void CudaFlatParams::keep_until_read(const at::Tensor& grad) const {
  const auto stream = c10::cuda::getCurrentCUDAStream(device_.index());
  c10::cuda::CUDACachingAllocator::recordStream(grad.storage().data_ptr(), stream);
}

cuda::Context CudaFlatParams::context(bool loading) const {
  double* workspace = reinterpret_cast<double*>(data(workspace_, 0));
  return {element_type(dtype_),
          device_.index(),
          c10::cuda::getCurrentCUDAStream(device_.index()).stream(),
          workspace + 1,
          reinterpret_cast<unsigned*>(workspace),
          loading};
}

// The tensors of a launch: those that are `wanted`, with their pointers.
template <class Wanted>
const cuda::Items& CudaFlatParams::items(Wanted wanted) {
  for (size_t i : c10::irange(entries_.size())) {
    const Entry& e = entries_[i];
    cuda::Item& item = items_[i];
    item.w = e.w;
    item.g = e.g;
    item.now = e.now;
    item.perturbed = e.perturbed;
    item.ascended = e.ascended;
    item.counted = e.counted;
    item.numel = wanted(e, item) ? index_.numel(int64_t(i)) : 0;
  }
  return items_;
}

// The options of all param groups, on the device.
const double* CudaFlatParams::table(int use, const double* values, size_t count) {
  Table& t = tables_[use];
  if (!std::equal(t.written.begin(), t.written.end(), values, values + count)) {
    const auto stream = c10::cuda::getCurrentCUDAStream(device_.index()).stream();
    if (cuda::is_capturing(stream))
      throw std::runtime_error(
          "options of the param groups changed since they were last written to the device, which a capture cannot do: "
          "call optimizer.write_options() before it");
    if (!t.on_device.defined() || t.on_device.numel() < int64_t(count))
      t.on_device = at::empty({int64_t(count)}, at::dtype(at::kDouble).device(device_));
    cuda::write(t.on_device.mutable_data_ptr<double>(), values, count, stream);
    t.written.assign(values, values + count);
  }
  return t.on_device.const_data_ptr<double>();
}

void CudaFlatParams::prepare_options(Use use, const double* values, size_t count) {
  c10::DeviceGuard guard(device_);
  table(use, values, count);
}

// Those of the update of each FlatParams, and of what is remembered after it, before the first of any is launched.
template <class Launch>
void CudaFlatParams::load(Launch launch) {
  c10::DeviceGuard guard(device_);
  cuda::Update update{};
  update.master = master_weights();
  update.rounding = rounding();
  launch(context(true), update);
  if (remembers(rule_)) cuda::remember(context(true), items_, {{}, nullptr, nullptr, rounding()});
}

void CudaFlatParams::prepare_kernels(const Options<SgdGroup>&) {
  load([this](const auto& context, const auto& update) { cuda::sgd(context, items_, update, nullptr); });
}

void CudaFlatParams::prepare_kernels(const Options<AdamGroup>&) {
  load([this](const auto& context, const auto& update) { cuda::adam(context, items_, update, nullptr, nullptr); });
}

void CudaFlatParams::write_options(const std::vector<Rows>& tables) {
  c10::DeviceGuard guard(device_);
  for (size_t use : c10::irange(std::min(tables.size(), tables_.size()))) {
    std::vector<double> values;
    for (const auto& row : tables[use]) values.insert(values.end(), row.begin(), row.end());
    if (!values.empty()) table(int(use), values.data(), values.size());
  }
}

cuda::Rounding CudaFlatParams::rounding(int64_t ahead) const {
  return {reinterpret_cast<const uint32_t*>(data(keys_on_device_, 0)), step_count_.const_data_ptr<int64_t>(), ahead};
}

double* CudaFlatParams::sum(int64_t slot) { return sums_.mutable_data_ptr<double>() + slot; }

// What T is made of, on the device; none where it is 1.
const double* CudaFlatParams::adaptivities(const Options<RadiusGroup>& radii) {
  const bool adaptive =
      std::any_of(radii.begin(), radii.end(), [](const auto& o) { return RadiusGroup::from(o.data()).adaptive; });
  return adaptive ? table(kAscending, radii) : nullptr;
}

void CudaFlatParams::run_square_norm(int64_t slot, const Options<RadiusGroup>& radii) {
  c10::DeviceGuard guard(device_);
  cuda::square_norm(context(), items([](const Entry& e, cuda::Item&) { return e.now != nullptr; }), adaptivities(radii),
                    sum(slot));
}

void CudaFlatParams::run_mix(const Options<RadiusGroup>& radii) {
  c10::DeviceGuard guard(device_);
  cuda::mix(context(), items([](const Entry& e, cuda::Item&) { return e.now != nullptr; }), adaptivities(radii),
            numbers(), buffer(history_of(rule_)), {sum(kAscent), sum(kSquare), sum(kProduct)});
}

void CudaFlatParams::run_direction_sums() {
  c10::DeviceGuard guard(device_);
  const auto& all = items([](const Entry& e, cuda::Item&) { return e.now || e.g; });
  if (rule_ == Rule::extrapolated)
    cuda::extrapolated_sums(context(), all, numbers(), {sum(kMax), sum(kSquare), sum(kProduct), sum(kMin)});
  else
    cuda::direction_sums(context(), all, {sum(last_slot(rule_)), sum(kSquare), sum(kProduct)});
}

void CudaFlatParams::run_ascend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) {
  c10::DeviceGuard guard(device_);
  const double* groups = table(kAscending, radii);
  char* saved = buffer(kSaved);
  for (Entry& e : entries_) e.perturbed = e.now != nullptr;
  const auto& all = items([](const Entry& e, cuda::Item& item) {
    if (!e.copying) item.g = nullptr;
    return e.perturbed;
  });
  cuda::ascend(context(), all, {groups, sums.const_data_ptr<double>(), norm_eps, limit}, saved, rounding(),
               sum(kAscent));
}

void CudaFlatParams::run_descend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) {
  c10::DeviceGuard guard(device_);
  const double* groups = table(kDescending, radii);
  const auto& all = items([](const Entry& e, cuda::Item& item) {
    if (!e.ascended && !e.copying) item.g = nullptr;
    return e.ascended || e.now != nullptr;
  });
  cuda::descend(context(), all, {groups, sums.const_data_ptr<double>(), norm_eps, limit}, buffer_if_any(kSaved),
                rounding(), sum(kMax));
}

const cuda::Items& CudaFlatParams::members() {
  return items([this](const Entry& e, cuda::Item& item) {
    if (!mixes(rule_)) item.g = nullptr;
    return e.member;
  });
}

// Of the rule of the step's direction, on the device.
const double* CudaFlatParams::numbers() { return numbers_.empty() ? nullptr : table(kMixing, numbers_); }

cuda::Mixing CudaFlatParams::mixing(const at::Tensor& sums, double max_norm) {
  return {direction(max_norm), sums.const_data_ptr<double>(), numbers()};
}

cuda::Update CudaFlatParams::update(const at::Tensor& sums, const double* groups, bool from_saved, double max_norm) {
  return {groups,
          mixing(sums, max_norm),
          buffer_if_any(kSaved),
          master_weights(),
          from_saved,
          rounding(),
          step_count_.mutable_data_ptr<int64_t>(),
          steps_.mutable_data_ptr<float>(),
          skipped_.mutable_data_ptr<int64_t>()};
}

void CudaFlatParams::run_update(const at::Tensor& sums, const Options<SgdGroup>& groups, bool from_saved,
                                double max_norm) {
  c10::DeviceGuard guard(device_);
  const bool momentum =
      std::any_of(groups.begin(), groups.end(), [](const auto& o) { return SgdGroup::from(o.data()).momentum != 0; });
  char* m = momentum ? buffer(kMomentumBuffer) : nullptr;
  cuda::sgd(context(), members(), update(sums, table(kUpdating, groups), from_saved, max_norm), m);
}

void CudaFlatParams::run_update(const at::Tensor& sums, const Options<AdamGroup>& groups, bool from_saved,
                                double max_norm) {
  c10::DeviceGuard guard(device_);
  char *m = buffer(kExpAvg), *v = buffer(kExpAvgSq);
  cuda::adam(context(), members(), update(sums, table(kUpdating, groups), from_saved, max_norm), m, v);
}

void CudaFlatParams::run_direction(const at::Tensor& sums, double max_norm) {
  c10::DeviceGuard guard(device_);
  cuda::direction(context(), items([](const Entry& e, cuda::Item&) { return e.g != nullptr; }), mixing(sums, max_norm));
}

void CudaFlatParams::run_remember(const at::Tensor& sums, double max_norm, char* to, int64_t ahead) {
  c10::DeviceGuard guard(device_);
  cuda::remember(context(), items([this](const Entry& e, cuda::Item&) { return has_memory(e); }),
                 {mixing(sums, max_norm), buffer(history_of(rule_)), to, rounding(ahead)});
}

void CudaFlatParams::run_restore() {
  c10::DeviceGuard guard(device_);
  cuda::restore(context(), items([](const Entry& e, cuda::Item&) { return e.perturbed && e.w; }), buffer(kSaved));
}

}  // namespace bsam
