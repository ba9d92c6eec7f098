// Who else holds a gradient.
#pragma once

#include <ATen/core/Tensor.h>

namespace bsam {

// Whether anything but `grad` itself (C++ or Python code, or a view) holds the tensor or its storage.
bool held_elsewhere(const at::Tensor& grad);

}  // namespace bsam
