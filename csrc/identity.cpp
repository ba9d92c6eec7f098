#include "identity.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <stdexcept>

namespace bsam {

namespace {

constexpr Py_ssize_t kNoDict = -1;

// A tensor, not of a subclass; null for other objects.
const c10::TensorImpl* impl_of(PyObject* value) {
  const PyTypeObject* type = Py_TYPE(value);
  if (type != reinterpret_cast<PyTypeObject*>(THPVariableClass) &&
      type != reinterpret_cast<PyTypeObject*>(ParameterClass))
    return nullptr;
  return THPVariable_Unpack(value).unsafeGetTensorImpl();
}

// Where its elements are: `.data = ` gives a tensor others.
const void* address_of(const c10::TensorImpl* tensor) {
  c10::StorageImpl* storage = tensor ? tensor->unsafe_storage().unsafeGetStorageImpl() : nullptr;
  return storage ? static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get()) +
                       tensor->storage_offset() * int64_t(tensor->itemsize())
                 : nullptr;
}

}  // namespace

bool same_items(const py::list& a, const py::list& b) {
  const Py_ssize_t size = PyList_GET_SIZE(a.ptr());
  if (size != PyList_GET_SIZE(b.ptr())) return false;
  PyObject** items = reinterpret_cast<PyListObject*>(a.ptr())->ob_item;
  return std::equal(items, items + size, reinterpret_cast<PyListObject*>(b.ptr())->ob_item);
}

Seen::Seen(const py::dict& state) : size_(PyDict_Size(state.ptr())) {
  add(state.ptr(), true);
  built_ = true;
}

void Seen::add(PyObject* dict, bool outer) {
  PyObject *key, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
    const bool entry = outer && PyDict_Check(value);
    const c10::TensorImpl* tensor = impl_of(value);
    items_.push_back({py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value), tensor,
                      address_of(tensor), entry ? PyDict_Size(value) : kNoDict});
    if (entry) add(value, false);
  }
}

// Whether the elements are where they were; the value is the same object, so its type has not to be asked for again.
inline bool Seen::Item::is_still() const {
  if (tensor == nullptr) return true;
  const c10::TensorImpl* now = THPVariable_Unpack(value.ptr()).unsafeGetTensorImpl();
  return now == tensor && address_of(now) == address;
}

// No Python code runs here, so that nothing changes meanwhile.
bool Seen::same(const py::dict& state) const {
  if (!built_) throw std::runtime_error("Seen: __init__ was never called");
  if (PyDict_Size(state.ptr()) != size_) return false;
  const Item* seen = items_.data();
  PyObject *key, *value, *value_within;
  for (Py_ssize_t at = 0, k = 0; k < size_ && PyDict_Next(state.ptr(), &at, &key, &value); ++k) {
    const Item& item = *seen++;
    if (key != item.key.ptr() || value != item.value.ptr()) return false;
    if (item.entries == kNoDict) {
      if (!item.is_still()) return false;
      continue;
    }
    if (PyDict_GET_SIZE(value) != item.entries) return false;
    for (Py_ssize_t within = 0, j = 0; j < item.entries && PyDict_Next(value, &within, &key, &value_within);
         ++j, ++seen)
      if (key != seen->key.ptr() || value_within != seen->value.ptr() || !seen->is_still()) return false;
  }
  return true;
}

}  // namespace bsam
