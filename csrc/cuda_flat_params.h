// FlatParams on a CUDA device: the launches of cuda.h. Nothing here waits for the device.
#pragma once

#include <array>

#include "cuda.h"
#include "flat_params.h"

namespace bsam {

class CudaFlatParams final : public FlatParams {
 public:
  CudaFlatParams(std::vector<py::object> params, std::vector<std::pair<int64_t, int64_t>> places,
                 std::optional<uint32_t> seed, bool exempt);

  void write_options(const std::vector<Rows>& tables) override;

 private:
  // The options of the param groups on the device: written when they change, but never in a capture, so that a graph's
  // replays read what was written last.
  struct Table {
    at::Tensor on_device;
    std::vector<double> written;
  };

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
  void keep_until_read(const at::Tensor& grad) const override;
  void prepare_options(Use use, const double* values, size_t count) override;
  void prepare_kernels(const Options<SgdGroup>& groups) override;
  void prepare_kernels(const Options<AdamGroup>& groups) override;
  const double* on_host(const at::Tensor&) const override { return nullptr; }

  at::Tensor new_buffer(int64_t numel, at::ScalarType dtype) const override;
  cuda::Context context(bool loading = false) const;
  void refuse_capture() const;
  template <class Launch>
  void load(Launch launch);
  template <class Wanted>
  const cuda::Items& items(Wanted wanted);
  template <size_t options>
  const double* table(int use, const std::vector<std::array<double, options>>& groups) {
    return table(use, groups.data()->data(), options * groups.size());
  }
  const double* table(int use, const double* values, size_t count);
  const double* adaptivities(const Options<RadiusGroup>& radii);
  const double* numbers();
  cuda::Mixing mixing(const at::Tensor& sums, double max_norm);
  cuda::Update update(const at::Tensor& sums, const double* groups, bool from_saved, double max_norm);
  cuda::Rounding rounding(int64_t ahead = 0) const;
  const cuda::Items& members();
  double* sum(int64_t slot);

  at::Tensor workspace_;       // the ticket, then the partial sums
  at::Tensor keys_on_device_;  // of stochastic rounding
  std::array<Table, kUses> tables_;
  cuda::Items items_;
};

}  // namespace bsam
