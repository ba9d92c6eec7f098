// FlatParams on the CPU: the loops of cpu.h over the segments of flat.h.
#pragma once

#include "cpu.h"
#include "flat_params.h"

namespace bsam {

class CpuFlatParams final : public FlatParams {
 public:
  CpuFlatParams(std::vector<py::object> params, std::vector<std::pair<int64_t, int64_t>> places,
                std::optional<uint32_t> seed, bool exempt);

 private:
  void run_square_norm(int64_t slot, const Options<RadiusGroup>& radii) override;
  void run_mix(const Options<RadiusGroup>& radii) override;
  void run_direction_sums() override;
  void run_ascend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) override;
  void run_descend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) override;
  void run_update(const at::Tensor& sums, const Options<SgdGroup>& groups, bool from_saved, double max_norm) override;
  void run_update(const at::Tensor& sums, const Options<AdamGroup>& groups, bool from_saved, double max_norm) override;
  void run_direction(const at::Tensor& sums, double max_norm) override;
  void run_remember(const at::Tensor& sums, double max_norm, char* to, int64_t ahead) override;
  void run_restore() override;
  const double* on_host(const at::Tensor& sums) const override;

  using Terms = std::array<double, 4>;  // of as many sums at once

  double* sum_at(int64_t slot);
  Site site(const Segment& s, int64_t ahead = 0) const;
  void copy_taken(const Entry& e, const Segment& s) const;
  template <class Group>
  std::vector<std::array<Mix, 2>> group_mixes(const std::vector<Group>& groups, const double* sums,
                                              double max_norm) const;
  template <class Group, class Rule>
  void apply(const std::vector<Group>& groups, const at::Tensor& sums, bool from_saved, double max_norm, Rule rule);

  template <class Body>
  void for_blocks(Body body) const;
  template <class Body>
  void for_segments(Body body) const;
  template <class AddTerms>
  void sum_segments(std::initializer_list<int64_t> slots, AddTerms add_terms);

  const Loops& loops_;
  bool stream_;
  std::vector<Terms> partial_;  // of sums, one a block
};

}  // namespace bsam
