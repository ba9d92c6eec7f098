// The pybind11 module: FlatParams, and how this binary was built.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "cpu_flat_params.h"
#ifdef BSAM_FUSED_CUDA
#include "cuda_flat_params.h"
#endif

namespace py = pybind11;

namespace {

// Reads the gradients; where one cannot be worked with, contract.py raises the error that names it.
void read_gradients(py::object self) {
  at::NoGradGuard no_grad;
  try {
    self.cast<bsam::FlatParams&>().read_gradients();
  } catch (const bsam::BadParameter& bad) {
    py::module_::import("bsam_fused.ops.contract").attr("reject")(self, bad.index);
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using bsam::FlatParams;
  using no_grad = py::call_guard<at::NoGradGuard>;

  m.doc() = "bsam_fused's compiled kernels";
  m.attr("version") = BSAM_FUSED_VERSION;
  m.attr("torch_version") = TORCH_VERSION;
  m.def("instruction_set", bsam::instruction_set);

  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const c10::OutOfMemoryError& error) {
      PyErr_SetString(py::module_::import("torch").attr("OutOfMemoryError").ptr(), error.what_without_backtrace());
    }
  });

  py::class_<FlatParams>(m, "FlatParams", "bsam_fused.ops.contract.FlatParams", py::module_local())
      .def("read_gradients", read_gradients)
      .def("clear_gradients", &FlatParams::clear_gradients)
      .def("square_norm", &FlatParams::square_norm, no_grad())
      .def("direction_sums", &FlatParams::direction_sums, no_grad())
      .def("ascend", &FlatParams::ascend, no_grad())
      .def("descend", &FlatParams::descend, no_grad())
      .def("update_sgd", &FlatParams::update_sgd, no_grad())
      .def("update_adam", &FlatParams::update_adam, no_grad())
      .def("combine", &FlatParams::combine, no_grad())
      .def("merge", &FlatParams::merge, no_grad())
      .def("write_options", &FlatParams::write_options, no_grad())
      .def("restore", &FlatParams::restore, no_grad())
      .def("show_w", &FlatParams::show_w, no_grad())
      .def("release", &FlatParams::release)
      .def("state", &FlatParams::state)
      .def("clear_state", &FlatParams::clear_state, no_grad())
      .def_property_readonly("params", &FlatParams::params)
      .def_property_readonly("places", &FlatParams::places)
      .def_property_readonly("sums", &FlatParams::sums)
      .def_property_readonly("step_count", &FlatParams::step_count)
      .def_property_readonly("skipped", &FlatParams::skipped)
      .def_property_readonly("device", &FlatParams::device)
      .def_property_readonly("dtype", &FlatParams::dtype)
      .def_property_readonly("extra_bytes", &FlatParams::extra_bytes);

  const auto init =
      py::init<std::vector<at::Tensor>, std::vector<std::pair<int64_t, int64_t>>, std::optional<uint32_t>>();
  py::class_<bsam::CpuFlatParams, FlatParams>(m, "CpuFlatParams", py::module_local()).def(init);
#ifdef BSAM_FUSED_CUDA
  py::class_<bsam::CudaFlatParams, FlatParams>(m, "CudaFlatParams", py::module_local()).def(init);
  m.def("cuda_obstacle", bsam::cuda::obstacle);
#endif
}
