// torch's allocator of a GPU's memory, for kernels that run on the host: notes what it is told of.
#pragma once

#include <c10/core/Allocator.h>

#include <set>

#include "CUDAStream.h"

namespace c10::cuda::CUDACachingAllocator {

inline std::set<const void*> recorded;

inline void recordStream(const DataPtr& memory, CUDAStream) { recorded.insert(memory.get()); }

}  // namespace c10::cuda::CUDACachingAllocator
