// Whether others changed what a step is made of: told by identity, since comparing or hashing tensors runs Python code.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "built.h"

namespace bsam {

namespace py = pybind11;

bool same_items(const py::list& a, const py::list& b);

// A base optimizer's state as it was: its keys, entries, and their keys and values in order. What is compared is held
// until then, so that no other object has its id.
class Seen : public Built {
 public:
  explicit Seen(const py::dict& state);
  bool same(const py::dict& state) const;

 private:
  // A key and its value; of a tensor where it is, and its elements; of an entry (a dict) how many items of its own
  // follow.
  struct Item {
    py::object key, value;
    const void *tensor, *address;
    Py_ssize_t entries;

    bool is_still() const;
  };

  void add(PyObject* dict, bool outer);

  Py_ssize_t size_;
  std::vector<Item> items_;
};

}  // namespace bsam
