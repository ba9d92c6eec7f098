#include "copies.h"

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "memory.h"

namespace bsam {

namespace {

constexpr size_t kOneThreadBytes = size_t(1) << 20;  // from there on torch's own copy takes several threads

const at::Tensor& tensor_of(PyObject* item) {
  if (!THPVariable_Check(item)) throw pybind11::type_error("every item of the list must be a torch.Tensor");
  return THPVariable_Unpack(item);
}

bool is_bytes(const at::Tensor& t) {
  return t.is_cpu() && t.layout() == at::kStrided && t.is_non_overlapping_and_dense() && !t.is_conj() && !t.is_neg() &&
         t.nbytes() <= kOneThreadBytes;
}

bool alike(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.strides() == b.strides();
}

void append(std::string& bytes, const void* what, size_t count) { bytes.append(static_cast<const char*>(what), count); }

}  // namespace

pybind11::bytes places(const pybind11::list& tensors) {
  std::string bytes;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    const at::Tensor& t = tensor_of(PyList_GET_ITEM(tensors.ptr(), i));
    const auto memory = reinterpret_cast<uintptr_t>(memory_of(storage_of(t)));
    const int64_t numbers[] = {int64_t(t.scalar_type()), t.dim(), t.storage_offset(), int64_t(storage_of(t)->nbytes())};
    append(bytes, &memory, sizeof memory);
    append(bytes, numbers, sizeof numbers);
    append(bytes, t.sizes().data(), t.sizes().size() * sizeof(int64_t));
    append(bytes, t.strides().data(), t.strides().size() * sizeof(int64_t));
  }
  return bytes;
}

void copy_all(const pybind11::list& to, const pybind11::list& from) {
  const Py_ssize_t count = PyList_GET_SIZE(to.ptr());
  if (count != PyList_GET_SIZE(from.ptr())) throw std::invalid_argument("copy_all: lists of different lengths");
  for (Py_ssize_t i = 0; i < count; ++i) {
    const at::Tensor &a = tensor_of(PyList_GET_ITEM(to.ptr(), i)), &b = tensor_of(PyList_GET_ITEM(from.ptr(), i));
    if (!in_storage(a, false) || !in_storage(b, false))
      throw std::runtime_error("copy_all: a tensor's memory was freed or shrunk");
    if (!(alike(a, b) && is_bytes(a) && is_bytes(b)))
      a.copy_(b);
    else if (const size_t bytes = a.nbytes())  // memcpy takes no null pointers, not even of nothing
      std::memcpy(a.mutable_data_ptr(), b.const_data_ptr(), bytes);
  }
}

}  // namespace bsam
