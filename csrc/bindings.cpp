// The pybind11 module: FlatParams, what tells whether others changed something, and how this binary was built.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <deque>

#include "copies.h"
#include "cpu_flat_params.h"
#include "identity.h"
#ifdef BSAM_FUSED_CUDA
#include "cuda_flat_params.h"
#endif

namespace py = pybind11;

namespace {

using bsam::BadParameter;
using bsam::FlatParams;

FlatParams& flat_of(const py::handle& self) {
  auto& flat = self.cast<FlatParams&>();
  if (!flat.built()) throw std::runtime_error("FlatParams: __init__ was never called");
  return flat;
}

// An object in use: by one method at a time.
struct Use {
  explicit Use(const py::handle& self) : flat(flat_of(self)) {
    if (flat.busy) throw std::runtime_error("FlatParams: in use by another thread, or by a call that this one is in");
    flat.busy = true;
  }
  ~Use() { flat.busy = false; }
  Use(const Use&) = delete;

  FlatParams& flat;
};

// contract.py raises the error that names the parameter.
[[noreturn]] void refuse(const py::handle& self, const BadParameter& bad) {
  constexpr const char* words[] = {"reject", "reject_memory", "reject_shape"};
  py::module_::import("bsam_fused.ops.contract").attr(words[bad.why])(self, bad.index);
  throw std::logic_error("contract.py found nothing wrong");
}

template <class R, class Method, class... Args>
auto guarded(Method method) {
  return [method](const py::object& self, Args... args) -> R {
    at::NoGradGuard no_grad;
    try {
      return (Use(self).flat.*method)(args...);
    } catch (const BadParameter& bad) {
      refuse(self, bad);
    }
  };
}

template <class R, class... Args>
auto exposed(R (FlatParams::*method)(Args...)) {
  return guarded<R, decltype(method), Args...>(method);
}

template <class R, class... Args>
auto exposed(R (FlatParams::*method)(Args...) const) {
  return guarded<R, decltype(method), Args...>(method);
}

template <class R>
auto read(R (FlatParams::*method)() const) {
  return [method](const py::object& self) -> R { return (flat_of(self).*method)(); };
}

void copy_shared(const py::object& self, const std::vector<py::object>& beside) {
  at::NoGradGuard no_grad;
  try {
    std::deque<Use> uses;
    std::vector<const FlatParams*> others;
    others.reserve(beside.size());
    for (const py::object& other : beside) others.push_back(&uses.emplace_back(other).flat);
    Use(self).flat.copy_shared(others);
  } catch (const BadParameter& bad) {
    refuse(self, bad);
  }
}

// The update of several FlatParams: all that can raise comes before anything is written to any of them.
template <class Group>
void update(const std::vector<py::object>& flats, const std::vector<at::Tensor>& sums,
            const FlatParams::Options<Group>& groups, bool from_saved, double max_norm) {
  if (flats.size() != sums.size()) throw std::invalid_argument("an update needs sums for each FlatParams");
  at::NoGradGuard no_grad;
  size_t i = 0;
  try {
    std::deque<Use> uses;
    for (const py::object& flat : flats) uses.emplace_back(flat);
    for (; i < flats.size(); ++i) uses[i].flat.template prepare_update<Group>(sums[i], groups, max_norm);
    for (i = 0; i < flats.size(); ++i) uses[i].flat.template make_update<Group>(sums[i], groups, from_saved, max_norm);
  } catch (const BadParameter& bad) {
    refuse(flats[i], bad);
  }
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "bsam_fused's compiled kernels";
  m.attr("torch_version") = TORCH_VERSION;
  m.def("instruction_set", bsam::instruction_set);

  // NOLINTNEXTLINE(performance-unnecessary-value-param): pybind11's type
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const c10::OutOfMemoryError& error) {
      PyErr_SetString(py::module_::import("torch").attr("OutOfMemoryError").ptr(), error.what_without_backtrace());
    }
  });

  m.def("copy_all", bsam::copy_all, "Every tensor of a list into the one of another at its place.");
  m.def("places", bsam::places, "Where each tensor's elements are, and how they lie.");
  m.def("same_items", bsam::same_items, "Whether both lists hold the same objects.");
  py::class_<bsam::Seen>(m, "Seen", "A base optimizer's state as it was seen.", py::module_local())
      .def(py::init<const py::dict&>())
      .def("same", &bsam::Seen::same, "Whether it is so still: the same keys, entries and values, at their addresses.");

  m.def("update_sgd", update<bsam::SgdGroup>);
  m.def("update_adam", update<bsam::AdamGroup>);

  py::class_<FlatParams>(m, "FlatParams", "bsam_fused.ops.contract.FlatParams", py::module_local())
      .def("read_gradients", exposed(&FlatParams::read_gradients))
      .def("copy_shared", copy_shared)
      .def("begin_plain", exposed(&FlatParams::begin_plain))
      .def("join", exposed(&FlatParams::join))
      .def("clear_gradients", exposed(&FlatParams::clear_gradients))
      .def("square_norm", exposed(&FlatParams::square_norm))
      .def("mix", exposed(&FlatParams::mix))
      .def("direction_sums", exposed(&FlatParams::direction_sums))
      .def("ascend", exposed(&FlatParams::ascend))
      .def("descend", exposed(&FlatParams::descend))
      .def("beginning", exposed(&FlatParams::beginning))
      .def("begin_state", exposed(&FlatParams::begin_state))
      .def("retract_state", exposed(&FlatParams::retract_state))
      .def("update_sgd", exposed(&FlatParams::update<bsam::SgdGroup>))
      .def("update_adam", exposed(&FlatParams::update<bsam::AdamGroup>))
      .def("combine", exposed(&FlatParams::combine))
      .def("remember", exposed(&FlatParams::remember))
      .def("remembering",
           [](const py::object& self) {
             flat_of(self);
             return std::vector<py::object>{self.attr("remember")};
           })
      .def("merge", exposed(&FlatParams::merge))
      .def("write_options", exposed(&FlatParams::write_options))
      .def("restore", exposed(&FlatParams::restore))
      .def("show_w", exposed(&FlatParams::show_w))
      .def("release", exposed(&FlatParams::release))
      .def("state", exposed(&FlatParams::state))
      .def("drop_state", exposed(&FlatParams::drop_state))
      .def_property(
          "limit", [](const py::object& self) { return flat_of(self).limit; },
          [](const py::object& self, double limit) { flat_of(self).limit = limit; })
      .def_property_readonly("params", read(&FlatParams::params))
      .def_property_readonly("places", read(&FlatParams::places))
      .def_property_readonly("sums", read(&FlatParams::sums))
      .def_property_readonly("step_count", read(&FlatParams::step_count))
      .def_property_readonly("skipped", read(&FlatParams::skipped))
      .def_property_readonly("updated", read(&FlatParams::updated))
      .def_property_readonly("device", read(&FlatParams::device))
      .def_property_readonly("dtype", read(&FlatParams::dtype))
      .def_property_readonly("extra_bytes", read(&FlatParams::extra_bytes));

  const auto init =
      py::init<std::vector<py::object>, std::vector<std::pair<int64_t, int64_t>>, std::optional<uint32_t>, bool>();
  py::class_<bsam::CpuFlatParams, FlatParams>(m, "CpuFlatParams", py::module_local()).def(init);
#ifdef BSAM_FUSED_CUDA
  py::class_<bsam::CudaFlatParams, FlatParams>(m, "CudaFlatParams", py::module_local()).def(init);
  m.def("cuda_obstacle", bsam::cuda::obstacle);
#endif
}
