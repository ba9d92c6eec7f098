#include "cpu_flat_params.h"

#include <ATen/Parallel.h>
#include <c10/util/irange.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <optional>

#include "math.h"
#include "rounding.h"

namespace bsam {

namespace {

// From here on (a model that no cache holds) what is only written goes around the cache.
constexpr int64_t kStreamBytes = int64_t(16) << 20;

constexpr int64_t kBlocksAThread = 2;  // at least: below, waking a thread takes longer than the work

// What stands for a gradient that is missing: one block of zeros of any dtype.
alignas(64) const char kZeros[kBlock * 8] = {};

double at_slot(const at::Tensor& sums, int64_t slot) { return sums.const_data_ptr<double>()[slot]; }

std::vector<Reach> reaches(const FlatParams::Options<RadiusGroup>& radii, double sum, double norm_eps) {
  std::vector<Reach> result;
  for (const auto& options : radii) {
    const auto o = RadiusGroup::from(options.data());
    result.push_back({o.step(sum, norm_eps), o.eta, o.adaptive});
  }
  return result;
}

template <class Group>
std::vector<Group> groups_of(const FlatParams::Options<Group>& groups) {
  std::vector<Group> result;
  for (const auto& options : groups) result.push_back(Group::from(options.data()));
  return result;
}

}  // namespace

CpuFlatParams::CpuFlatParams(std::vector<py::object> params, std::vector<std::pair<int64_t, int64_t>> places,
                             std::optional<uint32_t> seed, bool exempt)
    : FlatParams(std::move(params), std::move(places), seed, exempt),
      loops_(best_loops(element_type(dtype_), !keys_.empty())),
      stream_(index_.size() * itemsize_ >= kStreamBytes),
      partial_(index_.blocks()) {
  if (!device_.is_cpu()) throw std::invalid_argument("CpuFlatParams: the parameters must be on the CPU");
}

// Runs body(block) for every block; Python's lock is let go of where that takes longer than taking it back.
template <class Body>
void CpuFlatParams::for_blocks(Body body) const {
  std::optional<pybind11::gil_scoped_release> unlocked;
  if (index_.blocks() > kBlocksAThread) unlocked.emplace();
  at::parallel_for(0, index_.blocks(), kBlocksAThread, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) body(block);
  });
}

template <class Body>
void CpuFlatParams::for_segments(Body body) const {
  for_blocks([&](int64_t block) { index_.for_each_segment(block, body); });
}

// The sums in `slots`, of what add_terms(segment, sums) adds: partial sums a block, then those in order.
template <class AddTerms>
void CpuFlatParams::sum_segments(std::initializer_list<int64_t> slots, AddTerms add_terms) {
  for_blocks([&](int64_t block) {
    Terms sums{};
    index_.for_each_segment(block, [&](const Segment& s) { add_terms(s, sums.data()); });
    partial_[block] = sums;
  });
  size_t term = 0;
  for (int64_t slot : slots) {
    double sum = 0;
    for (const Terms& part : partial_) sum += part[term];
    *sum_at(slot) = sum;
    ++term;
  }
}

double* CpuFlatParams::sum_at(int64_t slot) { return sums_.mutable_data_ptr<double>() + slot; }

const double* CpuFlatParams::on_host(const at::Tensor& sums) const { return sums.const_data_ptr<double>(); }

Site CpuFlatParams::site(const Segment& s, int64_t ahead) const {
  if (keys_.empty()) return {0, s.begin};
  return {step_key(keys_[s.tensor], *step_count_.const_data_ptr<int64_t>() + ahead), s.begin};
}

// Copies g where it is taken so; before the segment's gradient or g is worked on.
void CpuFlatParams::copy_taken(const Entry& e, const Segment& s) const {
  const int64_t at = s.begin * itemsize_;
  if (e.copying) loops_.copy(e.g + at, e.now + at, stream_, s.count);
}

void CpuFlatParams::run_square_norm(int64_t slot, const Options<RadiusGroup>& radii) {
  const auto groups = reaches(radii, 0, 1);
  sum_segments({slot}, [&](const Segment& s, double* sum) {
    const Entry& e = entries_[s.tensor];
    if (!e.now) return;
    const int64_t at = s.begin * itemsize_;
    *sum += loops_.square_norm(e.w + at, e.now + at, groups[e.group], s.count);
  });
}

void CpuFlatParams::run_mix(const Options<RadiusGroup>& radii) {
  const auto groups = reaches(radii, 0, 1);
  const char* m = buffer(history_of(rule_));
  sum_segments({kAscent, kSquare, kProduct}, [&](const Segment& s, double* sums) {
    const Entry& e = entries_[s.tensor];
    if (!e.now) return;
    const int64_t at = s.begin * itemsize_;
    loops_.mix(e.g + at, e.now + at, m + s.flat * itemsize_, e.w + at, numbers_of(e).number, groups[e.group], sums,
               s.count);
  });
}

void CpuFlatParams::run_direction_sums() {
  const bool extrapolates = rule_ == Rule::extrapolated;
  const auto add = [&](const Segment& s, double* sums) {
    const Entry& e = entries_[s.tensor];
    if (!e.now && !e.g) return;
    const int64_t at = s.begin * itemsize_;
    const char *kept = e.g ? e.g + at : kZeros, *last = e.now ? e.now + at : kZeros;
    if (extrapolates && e.now) {
      const double r = has_both(e) ? numbers_of(e).number : 0;  // else ĝ_min = g = 0
      loops_.extrapolated_sums(kept, last, r, sums, s.count);
    } else {
      loops_.direction_sums(kept, last, sums, s.count);
    }
  };
  if (extrapolates)
    sum_segments({kMax, kSquare, kProduct, kMin}, add);
  else
    sum_segments({last_slot(rule_), kSquare, kProduct}, add);
}

void CpuFlatParams::run_ascend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) {
  const double sum = at_slot(sums, kAscent);
  const bool beyond = is_out_of_reach(RadiusGroup::from(radii[0].data()), sum, norm_eps, limit);
  if (beyond) *sum_at(kAscent) = std::numeric_limits<double>::quiet_NaN();
  if (beyond || !is_finite(sum)) return copy_gradients();
  const auto groups = reaches(radii, sum, norm_eps);
  char* saved = buffer(kSaved);
  for (Entry& e : entries_) e.perturbed = e.now != nullptr;
  for_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    if (!e.now) return;
    copy_taken(e, s);
    const int64_t at = s.begin * itemsize_;
    loops_.ascend(e.w + at, e.now + at, saved + s.flat * itemsize_, groups[e.group], site(s), stream_, s.count);
  });
}

void CpuFlatParams::run_descend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) {
  const double sum_ascent = at_slot(sums, kAscent);
  const bool beyond = is_out_of_reach(RadiusGroup::from(radii[0].data()), sum_ascent, norm_eps, limit);
  const auto groups = reaches(radii, sum_ascent, norm_eps);
  const char* saved = buffer_if_any(kSaved);
  // Without g (a gradient in this pass only) the weights stay, and g + g_max is g_max.
  sum_segments({kMax}, [&](const Segment& s, double* sum) {
    const Entry& e = entries_[s.tensor];
    const int64_t at = s.begin * itemsize_;
    const char* g_max = e.now ? e.now + at : kZeros;
    copy_taken(e, s);
    if (e.perturbed)
      *sum += loops_.descend(e.w + at, e.g + at, g_max, saved + s.flat * itemsize_, groups[e.group], site(s), stream_,
                             s.count);
    else if (e.ascended)
      *sum += loops_.keep_both(e.g + at, g_max, s.count);
    else
      *sum += loops_.square_norm(nullptr, g_max, Reach{}, s.count);
  });
  if (beyond) *sum_at(kMax) = std::numeric_limits<double>::quiet_NaN();
}

// The mixes of every group, without and with both what is kept and a last gradient. The sign is maximize's.
template <class Group>
std::vector<std::array<Mix, 2>> CpuFlatParams::group_mixes(const std::vector<Group>& groups, const double* sums,
                                                           double max_norm) const {
  const Direction by = direction(max_norm);
  const double factor = by.factor(sums);
  std::vector<std::array<Mix, 2>> result;
  for (size_t i : c10::irange(size_t(groups_))) {  // of more there need be no number
    const double number = numbers_.empty() ? 0 : RuleGroup::from(numbers_[i].data()).number;
    const double signed_factor = groups[i].maximize ? -factor : factor;
    result.push_back({signed_factor * by.of(sums, number, false), signed_factor * by.of(sums, number, true)});
  }
  return result;
}

// Applies rule(Update, entry, segment, t) to every member's segments, in its t-th step.
template <class Group, class Rule>
void CpuFlatParams::apply(const std::vector<Group>& groups, const at::Tensor& sums, bool from_saved, double max_norm,
                          Rule rule) {
  float* steps = steps_.mutable_data_ptr<float>();
  for (size_t i : c10::irange(entries_.size()))
    if (entries_[i].counted) ++steps[i];
  const char* saved = from_saved ? buffer_if_any(kSaved) : nullptr;
  float* master = master_weights();
  const auto mix = group_mixes(groups, sums.const_data_ptr<double>(), max_norm);
  for_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    if (!e.member) return;
    const int64_t at = s.begin * itemsize_;
    const char *last = e.now ? e.now + at : kZeros, *kept = e.g ? e.g + at : kZeros;
    rule(Update{e.w + at, master ? master + s.flat : nullptr,
                e.perturbed && saved ? saved + s.flat * itemsize_ : e.w + at, mixes(rule_) ? kept : nullptr, last,
                mix[e.group][has_both(e)], site(s), stream_, s.count},
         e, s, steps[s.tensor]);
  });
  ++*step_count_.mutable_data_ptr<int64_t>();
}

void CpuFlatParams::run_update(const at::Tensor& sums, const Options<SgdGroup>& groups, bool from_saved,
                               double max_norm) {
  const auto rules = groups_of<SgdGroup>(groups);
  const bool momentum = std::any_of(rules.begin(), rules.end(), [](const SgdGroup& o) { return o.momentum != 0; });
  char* m = momentum ? buffer(kMomentumBuffer) : nullptr;
  apply(rules, sums, from_saved, max_norm, [&](const Update& u, const Entry& e, const Segment& s, float t) {
    const SgdGroup& rule = rules[e.group];
    loops_.sgd(u, rule, rule.momentum != 0 ? m + s.flat * itemsize_ : nullptr, t == 1);
  });
}

void CpuFlatParams::run_update(const at::Tensor& sums, const Options<AdamGroup>& groups, bool from_saved,
                               double max_norm) {
  const auto rules = groups_of<AdamGroup>(groups);
  char *m = buffer(kExpAvg), *v = buffer(kExpAvgSq);
  apply(rules, sums, from_saved, max_norm, [&](const Update& u, const Entry& e, const Segment& s, float t) {
    loops_.adam(u, rules[e.group], m + s.flat * itemsize_, v + s.flat * itemsize_, t);
  });
}

void CpuFlatParams::run_direction(const at::Tensor& sums, double max_norm) {
  const double* known = sums.const_data_ptr<double>();
  const Direction by = direction(max_norm);
  const double factor = by.factor(known);
  for_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    if (!e.g) return;
    const int64_t at = s.begin * itemsize_;
    loops_.direction(e.g + at, e.now ? e.now + at : kZeros, factor * by.of(known, numbers_of(e).number, has_both(e)),
                     s.count);
  });
}

void CpuFlatParams::run_remember(const at::Tensor& sums, double max_norm, char* to, int64_t ahead) {
  const double* known = sums.const_data_ptr<double>();
  const Direction by = direction(max_norm);
  const char* history = buffer(history_of(rule_));
  for_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    if (!has_memory(e)) return;
    const int64_t at = s.begin * itemsize_, flat = s.flat * itemsize_;
    const RuleGroup numbers = numbers_of(e);
    const Memory memory = by.memory(known, numbers.number, numbers.decay);
    const auto operand = [](const char* there, double coefficient) {
      return there && coefficient != 0 ? there : kZeros;
    };
    loops_.remember({to + flat, operand(e.g ? e.g + at : nullptr, memory.kept),
                     operand(e.now ? e.now + at : nullptr, memory.last), operand(history + flat, memory.history),
                     memory, site(s, ahead), s.count});
  });
}

void CpuFlatParams::run_restore() {
  const char* saved = buffer(kSaved);
  for_segments([&](const Segment& s) {
    const Entry& e = entries_[s.tensor];
    if (e.perturbed && e.w) loops_.copy(e.w + s.begin * itemsize_, saved + s.flat * itemsize_, stream_, s.count);
  });
}

}  // namespace bsam
