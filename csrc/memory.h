// Whose memory a tensor's is, and whether it is there.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>

#include <cstdint>

#include "math.h"

namespace bsam {

BSAM_INLINE c10::StorageImpl* storage_of(const at::Tensor& t) {
  return t.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// Where a storage's memory is; nothing is asked of it, so that one cache line is read.
BSAM_INLINE const char* memory_of(c10::StorageImpl* storage) {
  return static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get());
}

// Whether all elements lie in the tensor's storage: others may have freed or shrunk it.
BSAM_INLINE bool in_storage(const at::Tensor& t, bool dense) {
  const int64_t numel = t.numel();
  if (numel == 0) return true;
  if (!t.has_storage()) return false;
  c10::StorageImpl* storage = storage_of(t);
  const size_t bytes = dense
                           ? size_t(t.storage_offset() + numel) * t.itemsize()
                           : at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), t.storage_offset());
  return memory_of(storage) != nullptr && bytes <= storage->nbytes();
}

// What frees the tensor's memory: tells who allocated it.
inline c10::DeleterFnPtr deleter_of(const at::Tensor& t) {
  return storage_of(t)->_mutable_data_ptr_no_checks().get_deleter();
}

}  // namespace bsam
