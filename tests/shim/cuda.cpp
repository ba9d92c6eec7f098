// The kernels, as C++: with this folder before CUDA's own in the include path.
#include "../../csrc/cuda.cu"
#include "c10/cuda/CUDACachingAllocator.h"

// For tests/host_graphs.py, through ctypes: begin and end a capture, how many launches were captured, run one of them.
#define SHIM_EXPORT extern "C" __attribute__((visibility("default")))
SHIM_EXPORT void shim_capture(bool on) { shim::capturing = on; }
SHIM_EXPORT size_t shim_captured() { return shim::captured.size(); }
SHIM_EXPORT void shim_launch(size_t i) { shim::captured[i](); }

// Unloads all kernels, and has room for so many.
SHIM_EXPORT void shim_make_room(size_t kernels) {
  shim::loaded.clear();
  shim::room = kernels;
}

// Whether torch's allocator was told that memory is read on the current stream; it then forgets that.
SHIM_EXPORT bool shim_take_record(const void* memory) {
  return c10::cuda::CUDACachingAllocator::recorded.erase(memory) != 0;
}
