// What FlatParams does in a phase, in which order: checks, then what can raise, then what writes.
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <limits>

#include "flat_params.h"
#include "memory.h"

namespace bsam {

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("FlatParams: ") + what);
}

bool holds(const at::Tensor& t, at::ScalarType dtype, at::Device device, int64_t numel) {
  return t.numel() == numel && t.scalar_type() == dtype && t.device() == device && t.is_contiguous() &&
         in_storage(t, true);
}

std::vector<const char*> state_keys(const FlatParams::Options<SgdGroup>& groups) {
  if (std::any_of(groups.begin(), groups.end(), [](const auto& o) { return keeps_state(SgdGroup::from(o.data())); }))
    return {kMomentumBuffer};
  return {};
}

std::vector<const char*> state_keys(const FlatParams::Options<AdamGroup>&) { return {kExpAvg, kExpAvgSq}; }

// Looks at all of them at once, and waits for the device once: |x|'s maximum is no number where an x is none.
bool are_finite(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> some;
  for (const at::Tensor& t : tensors)
    if (t.defined() && t.numel() > 0) some.push_back(t);
  if (some.empty()) return true;
  return at::isfinite(at::stack(at::_foreach_norm(some, std::numeric_limits<double>::infinity()))).all().item<bool>();
}

// Whether a tensor's elements still are where they were; in other strides they are as well.
inline bool still_at(const at::Tensor& t, const char* address, int64_t numel, at::ScalarType dtype, int64_t itemsize) {
  return t.numel() == numel && t.scalar_type() == dtype &&
         (numel == 0 || (memory_of(storage_of(t)) + t.storage_offset() * itemsize == address &&
                         size_t((t.storage_offset() + numel) * itemsize) <= storage_of(t)->nbytes()));
}

}  // namespace

// ---- what is checked before a phase

void FlatParams::check_groups(size_t groups) const {
  if (int64_t(groups) < groups_)
    throw std::invalid_argument("FlatParams: options for fewer groups than parameters have");
}

void FlatParams::check_sums(const at::Tensor& sums) const {
  if (!sums.is_same(sums_) && !holds(sums, at::kDouble, device_, kSlots))
    throw std::invalid_argument("FlatParams: sums must be eight contiguous float64 numbers on the parameters' device");
}

// The tensors that Python sees, and so may resize.
void FlatParams::check_own() const {
  require(holds(sums_, at::kDouble, device_, kSlots), "its sums were resized from outside");
  require(holds(step_count_, at::kLong, device_, 1), "its step_count was resized from outside");
  require(holds(skipped_, at::kLong, device_, 1), "its skipped was resized from outside");
  require(holds(steps_, at::kFloat, device_, int64_t(entries_.size())), "its steps were resized from outside");
}

// Whether what read_gradients noted still is so: parameters and gradients are others', too.
void FlatParams::check_noted() const {
  require(!at_w_, "a phase while the weights are shown at w: show_w(False) first");
  require(read_, "a phase without read_gradients()");
  for (size_t i : c10::irange(entries_.size())) {
    const Entry& e = entries_[i];
    const at::Tensor& p = param(i);
    if (p.unsafeGetTensorImpl() != e.tensor || gradient(i).unsafeGetTensorImpl() != e.gradient)
      throw BadParameter{BadParameter::kMemory, i};
    if (!e.now) continue;
    const int64_t numel = index_.numel(int64_t(i));
    if (!(e.dense ? still_at(p, e.w, numel, dtype_, itemsize_) : unmoved(i) && in_storage(p, false)) ||
        !(e.staging || still_at(gradient(i), e.now, numel, dtype_, itemsize_)))
      throw BadParameter{BadParameter::kMemory, i};
  }
}

// Whether every saved w can be put back.
void FlatParams::check_saved() const {
  for (size_t i : c10::irange(entries_.size()))
    if (entries_[i].perturbed && !fits(i)) throw BadParameter{BadParameter::kShape, i};
}

void FlatParams::begin_last(const at::Tensor& sums) const {
  check_sums(sums);
  check_own();
  require(phase_ == Phase::kPlain || phase_ == last_phase(),
          "an update out of order: ascend(), of the bilateral rule descend(), or begin_plain() come before");
  check_noted();
}

void FlatParams::check_mixing(const Mixing& mixing) const {
  const auto& [rule, numbers] = mixing;
  if (rule < 0 || rule > int64_t(Rule::friendly))
    throw std::invalid_argument("FlatParams: no such rule of a direction");
  if (Rule(rule) != Rule::last_alone || !numbers.empty()) check_groups(numbers.size());
}

// ---- phases

void FlatParams::mix_by(Rule rule, const Options<RuleGroup>& numbers) {
  rule_ = rule;
  numbers_ = numbers;
  summed_ = false;
}

void FlatParams::prepare_mixing() {
  if (!numbers_.empty()) prepare_options(kMixing, numbers_.data()->data(), RuleGroup::kOptions * numbers_.size());
}

void FlatParams::begin_plain(const Mixing& mixing) {
  check_mixing(mixing);
  const Rule rule = Rule(mixing.first);
  require(rule == Rule::last_alone || rule == Rule::reused, "begin_plain() with the rule of a step of several passes");
  require(phase_ == Phase::kRest, "begin_plain() within a step");
  require(read_, "begin_plain() without read_gradients()");
  check_own();
  char* history = rule == Rule::reused ? buffer(history_of(rule)) : nullptr;
  sums_.zero_();
  mix_by(rule, mixing.second);
  for (size_t i : c10::irange(entries_.size())) {
    Entry& e = entries_[i];
    e.g = history && e.now ? history + index_.offset(int64_t(i)) * itemsize_ : nullptr;
  }
  phase_ = Phase::kPlain;
}

void FlatParams::join(const Mixing& mixing, bool descended) {
  require(phase_ == Phase::kRest, "join() within a step");
  check_mixing(mixing);
  mix_by(Rule(mixing.first), mixing.second);
  phase_ = descended ? Phase::kDescended : Phase::kAscended;
}

void FlatParams::square_norm(int64_t slot, const Options<RadiusGroup>& radii) {
  if (slot < kAscent || slot > kMin) throw std::out_of_range("FlatParams: the slot of a norm is 0, 1 or 2");
  check_groups(radii.size());
  check_own();
  check_noted();
  if (exempt_ && slot == kAscent)
    sums_.select(0, slot).zero_();
  else
    run_square_norm(slot, radii);
}

// Puts q where g is kept, and has it be what `ascend` takes for the gradient of this pass.
void FlatParams::mix(const Options<RadiusGroup>& radii, const Mixing& mixing) {
  check_groups(radii.size());
  check_mixing(mixing);
  require(Rule(mixing.first) == Rule::friendly, "mix() with a rule that perturbs along g");
  require(phase_ == Phase::kRest, "mix() within a step");
  check_own();
  check_noted();
  mix_by(Rule::friendly, mixing.second);
  if (exempt_) {
    sums_.zero_();
    return;
  }
  prepare_mixing();
  buffer(history_of(rule_));
  for (const Entry& e : entries_) require(!e.now || e.now != e.g, "mix() twice of one pass");
  for (size_t i : c10::irange(entries_.size()))
    if (entries_[i].now) make_copy(i);
  for (Entry& e : entries_) e.g = e.now ? e.copy : nullptr;
  run_mix(radii);
  for (Entry& e : entries_) {
    if (!e.now) continue;
    e.now = e.g;
    e.staging = true;
  }
}

void FlatParams::direction_sums() {
  require((keeps(rule_) || rule_ == Rule::reused) && phase_ == last_phase(),
          "direction_sums() before the last pass of a step with an x");
  check_own();
  check_noted();
  prepare_mixing();
  run_direction_sums();
  summed_ = true;
}

void FlatParams::ascend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps,
                        const Mixing& mixing) {
  check_groups(radii.size());
  check_mixing(mixing);
  check_sums(sums);
  check_own();
  require(phase_ == Phase::kRest, "ascend() within a step");
  check_noted();
  prepare_options(kAscending, radii.data()->data(), RadiusGroup::kOptions * radii.size());
  if (!exempt_) buffer(kSaved);
  require(Rule(mixing.first) != Rule::reused, "ascend() with the rule of a step of one pass");
  mix_by(Rule(mixing.first), mixing.second);
  if (rule_ != Rule::friendly)  // of an earlier call of mix(), whose step never came
    for (Entry& e : entries_) e.g = nullptr;
  if (keeps(rule_)) make_room();
  if (keeps(rule_)) take_gradients();
  for (Entry& e : entries_) e.ascended = e.now != nullptr;
  phase_ = Phase::kAscended;
  if (exempt_)
    copy_gradients();
  else
    run_ascend(sums, radii, norm_eps);
  end_pass();
}

void FlatParams::descend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) {
  check_groups(radii.size());
  check_sums(sums);
  check_own();
  require(phase_ == Phase::kAscended && rule_ == Rule::bilateral, "descend() comes after ascend() that keeps g for it");
  check_noted();
  for (size_t i : c10::irange(params_.size()))
    if (entries_[i].perturbed && !entries_[i].now) read_weights(i);
  prepare_options(kDescending, radii.data()->data(), RadiusGroup::kOptions * radii.size());
  if (!exempt_) buffer(kSaved);
  make_room();
  take_gradients();
  phase_ = Phase::kDescended;
  run_descend(sums, radii, norm_eps);
  end_pass();
  const double* known = on_host(sums_);
  if (!known || is_finite(known[kMax])) return;
  write_saved();
  forget();
}

// Ends a pass: notes what was written, leaves .grad None.
void FlatParams::end_pass() {
  read_ = false;
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    if (e.perturbed) wrote_weights(i);
    if (!e.now) continue;
    e.now = nullptr;
    e.copying = false;
    if (e.staging) e.staged.reset();
    e.staging = false;
    gradient(i).reset();
  }
}

// ---- the end of a step

// Whether an update will be skipped, as far as the host knows.
bool FlatParams::is_skipped(const at::Tensor& sums, double max_norm) const {
  const double* known = on_host(sums);
  return known && !direction(max_norm).can_update(known);
}

// Finds the members, the tensors that had a gradient in some pass of this step, and makes room for their state.
template <class Group>
void FlatParams::prepare_update(const at::Tensor& sums, const Options<Group>& groups, double max_norm) {
  check_groups(groups.size());
  begin_last(sums);
  if (is_skipped(sums, max_norm)) check_saved();
  std::vector<bool> counts;
  for (const auto& options : groups) counts.push_back(keeps_state(Group::from(options.data())));
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    e.member = e.ascended || e.now || e.g;
    e.counted = e.member && counts[e.group];
    if (e.member && !e.now) read_weights(i);
  }
  for (const char* key : state_keys(groups)) buffer(key);
  buffer_if_any(kSaved);
  buffer_if_any(kMasterWeight);
  if (remembers(rule_)) buffer(history_of(rule_));
  prepare_options(kUpdating, groups.data()->data(), Group::kOptions * groups.size());
  prepare_mixing();
  prepare_kernels(groups);
}

template <class Group>
void FlatParams::make_update(const at::Tensor& sums, const Options<Group>& groups, bool from_saved, double max_norm) {
  if (is_skipped(sums, max_norm)) {
    skip();
    return;
  }
  run_update(sums, groups, from_saved, max_norm);
  if (remembers(rule_)) run_remember(sums, max_norm, buffer(history_of(rule_)), 0);
  for (size_t i : c10::irange(params_.size()))
    if (entries_[i].member) wrote_weights(i);
  finish();
}

template void FlatParams::prepare_update<SgdGroup>(const at::Tensor&, const Options<SgdGroup>&, double);
template void FlatParams::prepare_update<AdamGroup>(const at::Tensor&, const Options<AdamGroup>&, double);
template void FlatParams::make_update<SgdGroup>(const at::Tensor&, const Options<SgdGroup>&, bool, double);
template void FlatParams::make_update<AdamGroup>(const at::Tensor&, const Options<AdamGroup>&, bool, double);

void FlatParams::finish() {
  release();
  updated_ = true;
}

void FlatParams::skip() {
  write_saved();
  skipped_.add_(1);
  step_count_.add_(1);
  finish();
}

// The gradients of a step whose direction is the last one, where they are not what lies in .grad.
std::vector<at::Tensor> FlatParams::last_gradients(double factor) const {
  std::vector<at::Tensor> directions(entries_.size()), scaled;
  for (size_t i : c10::irange(entries_.size())) {
    const Entry& e = entries_[i];
    if (e.staging)
      directions[i] = e.staged;
    else if (e.ascended && !e.now)
      directions[i] = empty(i).zero_();
    if (e.now && factor != 1) scaled.push_back(e.staging ? e.staged : gradient(i).detach());
  }
  if (scaled.empty()) return directions;
  scaled = at::_foreach_mul(scaled, factor);
  auto next = scaled.begin();
  for (size_t i : c10::irange(entries_.size()))
    if (entries_[i].now) directions[i] = std::move(*next++);
  return directions;
}

// Makes g = d of all that had a gradient in some pass, and gives it away.
std::vector<at::Tensor> FlatParams::mixed_directions(const at::Tensor& sums, double max_norm) {
  run_direction(sums, max_norm);
  std::vector<at::Tensor> directions(entries_.size());
  for (size_t i : c10::irange(entries_.size()))
    if (entries_[i].g) directions[i] = give(entries_[i]);
  return directions;
}

// Zeros where only the last pass had a gradient.
void FlatParams::complete_g() {
  for (size_t i : c10::irange(entries_.size()))
    if (entries_[i].now && !entries_[i].g) take(entries_[i], empty(i).zero_());
}

bool FlatParams::combine(const at::Tensor& sums, bool from_saved, double max_norm) {
  begin_last(sums);
  check_saved();
  const at::Tensor here = sums.cpu();
  const double* known = here.const_data_ptr<double>();
  const Direction by = direction(max_norm);
  if (!by.can_update(known)) {
    skip();
    return false;
  }
  prepare_mixing();
  std::vector<at::Tensor> directions;
  if (rule_ == Rule::reused) own_history();
  if (mixes(rule_))
    complete_g();
  else
    directions = last_gradients(by.factor(known));
  if (remembers(rule_)) keep_history(sums, max_norm);
  save_rest();
  if (from_saved) write_saved();
  if (mixes(rule_)) directions = mixed_directions(sums, max_norm);
  if (itemsize_ == 2 && !are_finite(directions)) {  // 16 bits may hold less than what d was computed with
    skip();
    return false;
  }
  for (size_t i : c10::irange(entries_.size())) {
    entries_[i].perturbed = true;
    if (directions[i].defined()) param(i).mutable_grad() = std::move(directions[i]);
  }
  phase_ = Phase::kCombined;
  read_ = false;
  return true;
}

// Works out what the history is to be, beside it: a base may raise, or write to the gradients.
void FlatParams::keep_history(const at::Tensor& sums, double max_norm) {
  buffer(history_of(rule_));
  char* to = buffer(kRemembered);
  buffers_[kRemembered].copy_(buffers_[history_of(rule_)]);
  for (Entry& e : entries_) e.member = e.ascended || e.now;
  run_remember(sums, max_norm, to, 1);
}

void FlatParams::remember() {
  require(phase_ == Phase::kCombined, "remember() before combine()");
  if (!remembers(rule_)) return;
  require(buffers_.count(kRemembered) > 0, "remember() after drop_state()");
  buffer(history_of(rule_));
  buffers_[history_of(rule_)].copy_(buffers_[kRemembered]);
}

// w -> saved, of those that the step did not perturb: a base may write to any weights.
void FlatParams::save_rest() {
  for (size_t i : c10::irange(entries_.size()))
    if (!entries_[i].perturbed && !(unmoved(i) && in_storage(param(i), false)))
      throw BadParameter{BadParameter::kMemory, i};
  for (size_t i : c10::irange(entries_.size()))
    if (!entries_[i].perturbed) view(kSaved, i).copy_(param(i).detach());
}

at::Tensor FlatParams::merge(const at::Tensor& sums, double share) {
  check_sums(sums);
  check_own();
  require(keeps(rule_) && !remembers(rule_) && phase_ == last_phase(),
          "merge() twice in a step, before its last pass, or in one that keeps no g; restore() gives it up");
  check_noted();
  prepare_mixing();
  buffer(kDirection);
  complete_g();
  const auto directions = mixed_directions(sums, std::numeric_limits<double>::infinity());
  at::Tensor& flat = buffers_[kDirection].zero_();
  for (size_t i : c10::irange(entries_.size()))
    if (directions[i].defined()) param(i).mutable_grad() = view(kDirection, i).copy_(directions[i]);
  mix_by(Rule::last_alone, {});
  phase_ = Phase::kAscended;
  read_ = false;
  return flat.mul_(share);
}

void FlatParams::write_options(const std::vector<Rows>&) {
  throw std::runtime_error(
      "this backend's launches carry their options: a captured step would replay those it began with");
}

// ---- giving up, and looking at w meanwhile

// Writes a parameter through torch: right for any strides, dtype and device.
void FlatParams::write(size_t i, const at::Tensor& from) {
  at::AutoDispatchBelowADInplaceOrView unwatched;  // the version is bumped here
  const at::Tensor& p = param(i);
  p.copy_(from);
  if (!p.is_inference()) p.unsafeGetTensorImpl()->bump_version();
}

// saved -> w, for the perturbed.
void FlatParams::write_saved() {
  if (at_w_ || !buffers_.count(kSaved)) return;
  check_saved();
  for (size_t i : c10::irange(params_.size())) {
    Entry& e = entries_[i];
    e.w = e.perturbed && e.dense && unmoved(i) ? data(param(i), 0) : nullptr;
    if (e.perturbed && !e.w) write(i, view(kSaved, i));
  }
  run_restore();
  for (size_t i : c10::irange(params_.size()))
    if (entries_[i].perturbed && entries_[i].w) wrote_weights(i);
}

void FlatParams::restore() {
  if (!updated_) write_saved();
  release();
}

void FlatParams::release() {
  phase_ = Phase::kRest;
  read_ = at_w_ = false;
  mix_by(Rule::last_alone, {});
  forget();
}

void FlatParams::forget() {
  for (Entry& e : entries_) {
    e.perturbed = e.ascended = false;
    e.now = nullptr;
    e.copying = false;
    e.g = nullptr;
    e.taken.reset();
    e.staged.reset();
    e.staging = false;
  }
}

// One tensor at a time, through torch: this is for looking, not for the hot path, and right for moved ones too.
void FlatParams::show_w(bool at_w) {
  if (at_w == at_w_) return;
  check_saved();
  std::vector<at::Tensor> kept(entries_.size());
  for (size_t i : c10::irange(entries_.size()))
    if (entries_[i].perturbed) kept[i] = param(i).detach().clone();
  for (size_t i : c10::irange(entries_.size())) {
    if (!entries_[i].perturbed) continue;
    at::Tensor saved = view(kSaved, i);
    write(i, saved);
    saved.copy_(kept[i]);
  }
  at_w_ = at_w;
}

}  // namespace bsam
