// Launches of any kernel over many tensors. No torch, no formulas.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda.h"
#include "cuda_pieces.cuh"

namespace bsam {
namespace cuda {
namespace {

constexpr int kMostDevices = 64;  // whose properties are remembered

// What a multiprocessor runs at most.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1100)
constexpr int kMostBlocks = 1536 / kThreads;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostBlocks = 1024 / kThreads;
#else
constexpr int kMostBlocks = 2048 / kThreads;
#endif

// What it runs at least of a kernel: else ptxas aims at a number of its own, now and then with spills. Doubles take
// more registers.
template <class Kernel, class S>
constexpr int kBlocks = std::min(sizeof(S) == sizeof(double) ? Kernel::kBlocks - 1 : Kernel::kBlocks, kMostBlocks);

template <class Kernel, class S, int capacity>
__global__ void __launch_bounds__(kThreads, kBlocks<Kernel, S>)
    kernel(const __grid_constant__ Rows<capacity> rows, const __grid_constant__ Kernel work) {
  if constexpr (Kernel::kOrder == Order::uses_sums) wait_for_launch_before();
  if constexpr (Kernel::kOrder == Order::makes_sums) let_next_launch_begin();
  work.template run<S>(rows);
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and must not be found by the next launch
  throw std::runtime_error(std::string("bsam_fused: ") + what + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int found = 0;
  check(cudaDeviceGetAttribute(&found, which, device), "reading the device's properties");
  return found;
}

// Known once the device has loaded the kernel, which it does as late as it can.
struct Launching {
  int blocks;    // as many as the device runs at once
  bool overlap;  // may begin before the launch before it has ended
};

// Only where the kernel was compiled for what can wait by itself, perhaps for another device than this one; in graphs
// from CUDA 12.3 on.
template <class Kernel, class S, int capacity>
bool may_overlap() {
#if CUDART_VERSION >= 12030
  if (Kernel::kOrder != Order::uses_sums) return false;
  int driver = 0;
  cudaFuncAttributes attributes;
  check(cudaDriverGetVersion(&driver), "reading the driver's version");
  check(cudaFuncGetAttributes(&attributes, kernel<Kernel, S, capacity>), "the kernels do not run on this device");
  return driver >= 12030 && attributes.ptxVersion >= 90;
#else
  return false;
#endif
}

template <class Kernel, class S, int capacity>
Launching launching(int device) {
  static std::atomic<int> known[kMostDevices];  // 2 blocks + overlap
  const bool remembered = unsigned(device) < unsigned(kMostDevices);
  int found = remembered ? known[device].load() : 0;
  if (found == 0) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel<Kernel, S, capacity>, kThreads, 0),
          "the kernels do not run on this device");
    blocks = std::min(blocks * attribute(cudaDevAttrMultiProcessorCount, device), most_blocks(device));
    found = 2 * blocks + may_overlap<Kernel, S, capacity>();
    if (remembered) known[device] = found;
  }
  return {found / 2, found % 2 != 0};
}

template <class Kernel, class S, int capacity>
void launch_rows(const Context& context, const Launching& how, const Rows<capacity>& rows, const Kernel& work) {
  static_assert(sizeof(Kernel) <= kArguments, "the arguments must fit beside the rows");
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::max(1u, std::min(rows.chunks(), uint32_t(how.blocks))));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(context.stream);
  config.attrs = &overlap;
  config.numAttrs = how.overlap;
  check(cudaLaunchKernelEx(&config, kernel<Kernel, S, capacity>, rows, work), "launching a kernel");
}

template <class S>
uint32_t chunks_of(const Item& item) {
  return uint32_t((item.numel + kChunk<S> - 1) / kChunk<S>);
}

template <class S>
Row row_of(const Item& item) {
  const int64_t rest = item.numel % kChunk<S>;
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool aligned = (address(item.w) | address(item.g) | address(item.now)) % 16 == 0;
  return {uint32_t(item.flat / (kAlignment / int64_t(sizeof(S)))), item.group, uint16_t(rest == 0 ? kChunk<S> : rest),
          uint16_t((item.perturbed ? kPerturbed : 0) | (item.ascended ? kAscended : 0) | (item.counted ? kCounted : 0) |
                   (aligned ? kAligned : 0))};
}

// Fills rows with as many items, from the `begin`-th on, as fit.
template <class S, int capacity>
void fill(Rows<capacity>& rows, const Items& items, size_t begin) {
  const size_t end = std::min(items.size(), begin + capacity);
  rows.begin = uint32_t(begin);
  rows.count = uint32_t(end - begin);
  uint32_t chunks = 0;
  for (uint32_t i = 0; i < rows.count; ++i) {
    const Item& item = items[begin + i];
    rows.pointers[i] = {item.w, item.g, item.now};
    rows.row[i] = row_of<S>(item);
    rows.first[i] = chunks;
    chunks += chunks_of<S>(item);
  }
  rows.first[rows.count] = chunks;
}

// Launches for all items, in as many parts as their rows need; without items once, for what a kernel does at its end.
template <class S, int capacity, class Kernel>
void launch_parts(const Context& context, const Items& items, const Kernel& work) {
  const Launching how = launching<Kernel, S, capacity>(context.device);
  if (context.loading) return;
  Rows<capacity> rows;
  size_t done = 0;
  do {
    fill<S>(rows, items, done);
    launch_rows<Kernel, S>(context, how, rows, work);
    done += rows.count;
  } while (done < items.size());
}

template <class S, class Kernel>
void launch_as(const Context& context, const Items& items, const Kernel& work) {
  if (items.size() <= size_t(kFew))
    launch_parts<S, kFew>(context, items, work);
  else
    launch_parts<S, kMany>(context, items, work);
}

// `narrow`: there is a kernel for 16-bit types only.
template <bool narrow = false, class Kernel>
void launch(const Context& context, const Items& items, const Kernel& work) {
  if (context.dtype == Dtype::bfloat16) return launch_as<BFloat16>(context, items, work);
  if (context.dtype == Dtype::float16) return launch_as<Float16>(context, items, work);
  if constexpr (!narrow) {
    if (context.dtype == Dtype::float32) return launch_as<float>(context, items, work);
    if (context.dtype == Dtype::float64) return launch_as<double>(context, items, work);
  }
  throw std::logic_error("bsam_fused: no kernel for this element type");
}

}  // namespace
}  // namespace cuda
}  // namespace bsam
