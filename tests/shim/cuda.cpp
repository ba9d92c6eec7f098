// The kernels, as C++: with this folder before CUDA's own in the include path.
#include "../../csrc/cuda.cu"

// For tests/host_graphs.py, through ctypes: begin and end a capture, how many launches were captured, run one of them.
#define SHIM_EXPORT extern "C" __attribute__((visibility("default")))
SHIM_EXPORT void shim_capture(bool on) { shim::capturing = on; }
SHIM_EXPORT size_t shim_captured() { return shim::captured.size(); }
SHIM_EXPORT void shim_launch(size_t i) { shim::captured[i](); }
