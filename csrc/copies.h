// Many small tensors copied, and looked at: through torch's dispatcher each takes longer than its bytes.
#pragma once

#include <pybind11/pybind11.h>

namespace bsam {

// Every tensor of `from` into the one of `to` at its place. Moves no version counter of what is copied byte by byte.
void copy_all(const pybind11::list& to, const pybind11::list& from);

// Where each tensor's elements are, and how they lie: to be compared with what this returned before.
pybind11::bytes places(const pybind11::list& tensors);

}  // namespace bsam
