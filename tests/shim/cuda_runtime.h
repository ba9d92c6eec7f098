// As much of CUDA as csrc/cuda.cu uses, on the host: the kernels' own source runs in the tests without a GPU.
//
// The threads of a block are fibers, each with a stack of its own, which a scheduler runs one at a time up to their
// next barrier or shuffle, in another order each time, so that a missing barrier shows. A barrier waits for all
// threads of the block, a shuffle for all of the warp; where some wait for others that never come, the launch fails,
// as a GPU would hang. Blocks run one after another, on "multiprocessors" so few that each gets several chunks.
// While a graph is captured, launches are kept with their parameters as they are then, and not run: see cuda.cpp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static  // blocks run one after another
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline

#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, gridDim;  // of the thread that runs

namespace shim {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr int kMultiprocessors = 2, kThreadsAMultiprocessor = 512;

enum class Waits { no, barrier, shuffle, done };

struct Thread {
  dim3 index;
  Waits waits = Waits::no;
  double given = 0, got = 0;  // by a shuffle
  unsigned offset = 0;
  bool started = false;
  void* fake = nullptr;  // AddressSanitizer's own part of the stack, while others run
  ucontext_t context;
  jmp_buf at;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

class Block {
 public:
  static Block& current() {
    static Block block;
    return block;
  }

  // Runs body() in `size` threads.
  void run(unsigned size, const std::function<void()>& body) {
    body_ = &body;
    while (threads_.size() < size) threads_.emplace_back(new Thread);
    for (unsigned i = 0; i < size; ++i) {
      threads_[i]->index = dim3(i);
      threads_[i]->waits = Waits::no;
      threads_[i]->started = false;
    }
    std::vector<unsigned> order(size);
    std::iota(order.begin(), order.end(), 0u);
    do {
      std::shuffle(order.begin(), order.end(), random_);
      for (unsigned i : order)
        if (threads_[i]->waits == Waits::no) resume(*threads_[i]);
    } while (release(size));
  }

  void wait(Waits what) {
    running_->waits = what;
    leave();
  }

  double shuffle_down(double value, unsigned offset) {
    running_->given = value;
    running_->offset = offset;
    wait(Waits::shuffle);
    return running_->got;
  }

 private:
  static void enter() {
    Block& block = current();
    block.arrive(nullptr, &block.bottom_, &block.size_);
    (*block.body_)();
    block.running_->waits = Waits::done;
    block.depart(nullptr, block.bottom_, block.size_);
    _longjmp(block.scheduler_, 1);
  }

  // AddressSanitizer is told of every change of stacks: it would take frames of the one for holes in the other.
  static void depart([[maybe_unused]] void** fake, [[maybe_unused]] const void* to, [[maybe_unused]] size_t size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake, to, size);
#endif
  }
  static void arrive([[maybe_unused]] void* fake, [[maybe_unused]] const void** from = nullptr,
                     [[maybe_unused]] size_t* size = nullptr) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, from, size);
#endif
  }

  // The first entry goes through the context, the others by jumps, which ask nothing of the kernel.
  void resume(Thread& thread) {
    running_ = &thread;
    threadIdx = thread.index;
    depart(&fake_, thread.stack.get(), kStack);
    if (_setjmp(scheduler_)) return arrive(fake_);
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    setcontext(&thread.context);
  }

  void leave() {
    depart(&running_->fake, bottom_, size_);
    if (!_setjmp(running_->at)) _longjmp(scheduler_, 1);
    arrive(running_->fake, &bottom_, &size_);
  }

  // Lets those go on whose wait is over. False once all are done.
  bool release(unsigned size) {
    const auto all = [&](unsigned from, unsigned to, Waits what) {
      return std::all_of(threads_.begin() + from, threads_.begin() + to,
                         [&](const auto& thread) { return thread->waits == what; });
    };
    if (all(0, size, Waits::done)) return false;
    bool released = all(0, size, Waits::barrier);
    if (released)
      for (unsigned i = 0; i < size; ++i) threads_[i]->waits = Waits::no;
    for (unsigned warp = 0; warp < size; warp += kWarp) {
      if (!all(warp, warp + kWarp, Waits::shuffle)) continue;
      for (unsigned i = warp; i < warp + kWarp; ++i) {
        const unsigned from = i + threads_[i]->offset;
        threads_[i]->got = threads_[from < warp + kWarp ? from : i]->given;
        threads_[i]->waits = Waits::no;
      }
      released = true;
    }
    if (!released) throw std::logic_error("CUDA on the host: some threads wait for others that do not come");
    return true;
  }

  std::vector<std::unique_ptr<Thread>> threads_;
  const std::function<void()>* body_ = nullptr;
  Thread* running_ = nullptr;
  jmp_buf scheduler_;
  const void* bottom_ = nullptr;  // of the scheduler's stack, and its size: where AddressSanitizer asks
  size_t size_ = 0;
  void* fake_ = nullptr;
  std::minstd_rand random_{1};
};

}  // namespace shim

inline void __syncthreads() { shim::Block::current().wait(shim::Waits::barrier); }
inline void __threadfence() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline double __shfl_down_sync(unsigned, double value, int offset) {
  return shim::Block::current().shuffle_down(value, unsigned(offset));
}
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned old = *at;
  *at = old >= most ? 0 : old + 1;
  return old;
}
inline void __stwb(uint4* at, uint4 value) { *at = value; }
// Four of the eight bytes of y : x, each chosen by four bits of `which`.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= unsigned(bytes >> 8 * (which >> 4 * i & 7u) & 0xffu) << 8 * i;
  return chosen;
}
inline double __ldcg(const double* at) { return *at; }

// ---- the runtime

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxThreadsPerMultiProcessor };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
struct cudaFuncAttributes {
  int ptxVersion = 90;
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "out of memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? shim::kMultiprocessors : shim::kThreadsAMultiprocessor;
  return cudaSuccess;
}

namespace shim {

inline std::set<void (*)()> loaded;  // kernels: a device loads them as late as it can
inline size_t room = size_t(-1);     // for so many

template <class Kernel>
cudaError_t load(Kernel kernel) {
  const auto known = reinterpret_cast<void (*)()>(kernel);
  if (loaded.size() >= room && !loaded.count(known)) return cudaErrorMemoryAllocation;
  loaded.insert(known);
  return cudaSuccess;
}

}  // namespace shim

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel kernel, int threads, size_t) {
  *blocks = shim::kThreadsAMultiprocessor / threads;
  return shim::load(kernel);
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

namespace shim {

inline bool capturing = false;
inline std::vector<std::function<void()>> captured;  // launches
inline unsigned waited = 0;                          // threads of this launch, for the one before

}  // namespace shim

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = shim::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// Launches never overlap here; but what may has to wait, in every thread.
inline void cudaGridDependencySynchronize() { ++shim::waited; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (const cudaError_t error = shim::load(kernel); error != cudaSuccess) return error;
  const auto launch = [=, grid = config->gridDim, block = config->blockDim, early = config->numAttrs != 0] {
    gridDim = grid;
    shim::waited = 0;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
      shim::Block::current().run(block.x, [&] { kernel(arguments...); });
    if (early && shim::waited != grid.x * block.x)
      throw std::logic_error("CUDA on the host: a kernel that may begin early does not wait for the one before");
  };
  if (shim::capturing)
    shim::captured.push_back(launch);
  else
    launch();
  return cudaSuccess;
}
