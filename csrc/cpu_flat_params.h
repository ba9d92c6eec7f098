// FlatParams on the CPU: the loops of cpu.h over the segments of flat.h.
#pragma once

#include "cpu.h"
#include "flat_params.h"

namespace bsam {

class CpuFlatParams final : public FlatParams {
 public:
  CpuFlatParams(std::vector<at::Tensor> params, std::vector<std::pair<int64_t, int64_t>> places);

  void square_norm(int64_t slot, const Options<RadiusGroup>& radii) override;

 private:
  void run_ascend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) override;
  void run_descend(const at::Tensor& sums, const Options<RadiusGroup>& radii, double norm_eps) override;
  void run_sgd(const at::Tensor& sums, const Options<SgdGroup>& groups, bool from_saved) override;
  void run_adam(const at::Tensor& sums, const Options<AdamGroup>& groups, bool from_saved) override;
  void run_direction(const at::Tensor& sums) override;
  void run_restore() override;
  bool known_bad(const at::Tensor& sums, int64_t slot) const override;

  void copy_taken(const Entry& e, const Segment& s) const;
  template <class Rule>
  void update(const at::Tensor& sums, bool from_saved, Rule rule);

  template <class Body>
  void for_blocks(Body body) const;
  template <class Body>
  void for_segments(Body body) const;
  template <class Term>
  double sum_segments(Term term);

  const Loops& loops_;
  bool stream_;
  std::vector<double> partial_;  // of a sum, one a block
};

}  // namespace bsam
