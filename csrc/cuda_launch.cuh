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

template <class Kernel, class S, int capacity>
__global__ void __launch_bounds__(kThreads)
    kernel(const __grid_constant__ Rows<capacity> rows, const __grid_constant__ Kernel work) {
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

// As many blocks as the device runs at once.
template <class Kernel, class S, int capacity>
int resident_blocks(int device) {
  static std::atomic<int> known[kMostDevices];
  const bool remembered = unsigned(device) < unsigned(kMostDevices);
  int blocks = remembered ? known[device].load() : 0;
  if (blocks > 0) return blocks;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel<Kernel, S, capacity>, kThreads, 0),
        "the kernels do not run on this device");
  blocks = std::min(blocks * attribute(cudaDevAttrMultiProcessorCount, device), most_blocks(device));
  if (remembered) known[device] = blocks;
  return blocks;
}

template <class Kernel, class S, int capacity>
void launch_rows(const Context& context, const Rows<capacity>& rows, const Kernel& work) {
  static_assert(sizeof(Kernel) <= kArguments, "the arguments must fit beside the rows");
  cudaLaunchConfig_t config{};
  const uint32_t most = uint32_t(resident_blocks<Kernel, S, capacity>(context.device));
  config.gridDim = dim3(std::max(1u, std::min(rows.chunks, most)));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(context.stream);
  check(cudaLaunchKernelEx(&config, kernel<Kernel, S, capacity>, rows, work), "launching a kernel");
}

template <class S>
uint32_t chunks_of(const Item& item) {
  return uint32_t((item.numel + kChunk<S> - 1) / kChunk<S>);
}

template <class S>
Row row_of(const Item& item, uint32_t first) {
  const int64_t rest = item.numel % kChunk<S>;
  return {item.w,
          item.g,
          item.now,
          uint32_t(item.flat / (kAlignment / int64_t(sizeof(S)))),
          first,
          item.group,
          uint16_t(rest == 0 ? kChunk<S> : rest),
          uint16_t((item.perturbed ? kPerturbed : 0) | (item.counted ? kCounted : 0))};
}

// Launches for all items, in as many parts as their rows need; without items once, for what a kernel does at its end.
template <class S, int capacity, class Kernel>
void launch_parts(const Context& context, const Items& items, const Kernel& work) {
  Rows<capacity> rows;
  size_t done = 0;
  do {
    rows.begin = uint32_t(done);
    rows.count = rows.chunks = 0;
    for (; done < items.size() && rows.count < uint32_t(capacity); ++done) {
      rows.row[rows.count++] = row_of<S>(items[done], rows.chunks);
      rows.chunks += chunks_of<S>(items[done]);
    }
    launch_rows<Kernel, S>(context, rows, work);
  } while (done < items.size());
}

template <class S, class Kernel>
void launch_as(const Context& context, const Items& items, const Kernel& work) {
  if (items.size() <= size_t(kFew))
    launch_parts<S, kFew>(context, items, work);
  else
    launch_parts<S, kMany>(context, items, work);
}

template <class Kernel>
void launch(const Context& context, const Items& items, const Kernel& work) {
  switch (context.dtype) {
    case Dtype::float32:
      return launch_as<float>(context, items, work);
    case Dtype::float64:
      return launch_as<double>(context, items, work);
    case Dtype::bfloat16:
      return launch_as<BFloat16>(context, items, work);
    case Dtype::float16:
      return launch_as<Float16>(context, items, work);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace bsam
