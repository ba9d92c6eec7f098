#include "holders.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace bsam {

namespace {

using Counts = std::pair<size_t, Py_ssize_t>;

// Holders of the tensor and of its Python object, our own included.
Counts counts(const at::Tensor& tensor) {
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  return {tensor.use_count(), Py_REFCNT(object.ptr())};
}

// Whether Python has a weak reference to the object, from which it can come back.
bool weakly_held(PyObject* object) {
  const Py_ssize_t at = Py_TYPE(object)->tp_weaklistoffset;
  return at > 0 && *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + at) != nullptr;
}

// What `counts` says of a tensor that Python has seen and let go of: torch's versions count differently.
Counts idle_counts() {
  const at::Tensor probe = at::empty({0});
  counts(probe);
  return counts(probe);
}

}  // namespace

bool held_elsewhere(const at::Tensor& grad) {
  if (grad.storage().use_count() != 1) return true;
  if (grad.use_count() == 1) return false;
  py::gil_scoped_acquire gil;
  static const Counts idle = idle_counts();
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  return weakly_held(object.ptr()) || Counts{grad.use_count(), Py_REFCNT(object.ptr())} != idle;
}

}  // namespace bsam
