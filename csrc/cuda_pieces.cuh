// A launch over many tensors, as its blocks and threads see it. No torch, no formulas.
//
// The tensors are cut into chunks, and a block takes a chunk at a time. Every pointer travels in the kernel's own
// parameters: no table is uploaded, nothing waits, and a captured graph stays valid.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "flat.h"
#include "scalar.h"

namespace bsam {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block

// ---- many tensors in a launch

enum Flags : uint16_t { kPerturbed = 1, kAscended = 2, kCounted = 4, kAligned = 8 };  // all pointers, to 16 bytes

// A tensor as a kernel sees it: packed, for as many as possible to fit a launch.
struct Row {
  uint32_t line;  // where it is in the flat buffers, in units of kAlignment bytes
  uint32_t group;
  uint16_t last;  // elements in its last chunk
  uint16_t flags;
};
struct Pointers {
  char* w;
  char* g;
  const char* now;
};

// What a kernel's parameters may hold, without its other arguments: few tensors, or as many as possible.
constexpr size_t kArguments = 256;
#if CUDART_VERSION >= 12010
constexpr size_t kFewBytes = 8192 - kArguments, kManyBytes = 32764 - kArguments;
#else
constexpr size_t kFewBytes = 4096 - kArguments, kManyBytes = kFewBytes;
#endif
constexpr size_t kTensorBytes = sizeof(Pointers) + sizeof(Row) + sizeof(uint32_t);
constexpr int kFew = int((kFewBytes - 16) / kTensorBytes), kMany = int((kManyBytes - 16) / kTensorBytes);

// The tensors [begin, begin + count) of a launch that may have been split.
template <int capacity>
struct Rows {
  Pointers pointers[capacity];
  Row row[capacity];
  uint32_t begin, count;
  uint32_t first[capacity + 1];  // chunk of each, then how many chunks there are: all that a search reads, so cached

  __host__ __device__ uint32_t chunks() const { return first[count]; }

  // The tensor that a chunk is of: the last one that begins at it or before.
  __device__ uint32_t find(uint32_t chunk) const {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (first[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
};

// ---- chunks of tensors

template <class S>
constexpr int kLanes = 16 / sizeof(S);  // of a vector of 128 bits
// Of a thread and a chunk: as many loads of each operand are under way at once. Of eight lanes one: more spill.
template <class S>
constexpr int kVectors = sizeof(S) == 2 ? 1 : 2;
template <class S>
constexpr int kChunk = kThreads * kVectors<S> * kLanes<S>;  // elements

// A chunk: `count` elements of tensor `tensor`. Pointers are to its first element.
template <class S>
struct Piece {
  uint32_t tensor, group;
  uint32_t begin;  // its first element's index in the tensor, modulo 2^32
  bool perturbed, ascended, aligned;
  int count;
  int64_t flat;
  S *w, *g;
  const S* now;

  // Whether its tensor has a gradient kept of the first pass, and one of the last.
  __device__ bool has_both() const { return ascended && now; }
};

template <class S, int capacity>
__device__ Piece<S> piece(const Rows<capacity>& rows, uint32_t i, uint32_t chunk) {
  const Row& row = rows.row[i];
  const Pointers& pointers = rows.pointers[i];
  const int64_t at = int64_t(chunk - rows.first[i]) * kChunk<S>;
  const auto advance = [at](auto* p) { return p == nullptr ? nullptr : p + at; };  // of what may not be there
  return {rows.begin + i,
          row.group,
          uint32_t(at),
          (row.flags & kPerturbed) != 0,
          (row.flags & kAscended) != 0,
          (row.flags & kAligned) != 0,
          chunk + 1 == rows.first[i + 1] ? int(row.last) : kChunk<S>,
          int64_t(row.line) * (kAlignment / int64_t(sizeof(S))) + at,
          reinterpret_cast<S*>(pointers.w) + at,
          advance(reinterpret_cast<S*>(pointers.g)),
          advance(reinterpret_cast<const S*>(pointers.now))};
}

// In which order the grid goes through the chunks. What begins at the last one finds in the L2 cache what the kernel
// before it, which ended there, read last.
enum class Walk { forwards, backwards };

constexpr uint32_t kRun = 4;  // chunks that a block takes at a time while there are as many for every block

// Calls body(Piece). Which chunks a block works on, and in which order, is fixed by how many there are and the number
// of blocks: sums come out the same every time. In a round, block b takes the b-th run of kRun consecutive chunks; the
// chunks that are left over from whole rounds go round one by one, so that no block has more than one more than others.
template <class S, Walk walk = Walk::forwards, int capacity, class Body>
__device__ void for_pieces(const Rows<capacity>& rows, Body body) {
  const uint32_t chunks = rows.chunks();
  uint32_t run = kRun;
  for (uint32_t done = 0; done < chunks; done += run * gridDim.x) {
    if (chunks - done < run * gridDim.x) run = 1;
    const uint32_t begin = done + blockIdx.x * run;
    if (begin >= chunks) return;
    uint32_t chunk = walk == Walk::forwards ? begin : chunks - begin - run;
    uint32_t tensor = rows.find(chunk);
    for (const uint32_t end = chunk + run; chunk < end; ++chunk) {
      while (rows.first[tensor + 1] <= chunk) ++tensor;
      body(piece<S>(rows, tensor, chunk));
    }
  }
}

// ---- the elements of a chunk that a thread works on at a time: all loaded, computed with, all stored

template <class X, int count>
struct Elements {
  X element[count];
  __device__ X& operator[](int j) { return element[j]; }
};

// In a whole chunk of S, at 16-byte addresses: kVectors vectors, every access of 128 bits.
template <class S>
struct Whole {
  static constexpr int kCount = kVectors<S> * kLanes<S>;

  static __device__ int place(int j) {
    return (j / kLanes<S> * kThreads + int(threadIdx.x)) * kLanes<S> + j % kLanes<S>;
  }

  // Zeros where it is not `there`: as whole vectors, which nvcc would else put together of their elements.
  template <class X>
  __device__ Elements<X, kCount> load(const X* from, bool there = true) const {
    Elements<X, kCount> all;
#pragma unroll
    for (int j = 0; j < kCount; j += kLanes<X>) {
      uint4 bits{};
      if (there) bits = *reinterpret_cast<const uint4*>(from + place(j));
      std::memcpy(&all[j], &bits, sizeof bits);
    }
    return all;
  }

  // __stwb and not an assignment: where the pointer comes straight from the arguments nvcc takes that apart again.
  template <class X>
  __device__ void store(X* to, const Elements<X, kCount>& all) const {
#pragma unroll
    for (int j = 0; j < kCount; j += kLanes<X>) {
      uint4 bits;
      std::memcpy(&bits, &all.element[j], sizeof bits);
      __stwb(reinterpret_cast<uint4*>(to + place(j)), bits);
    }
  }

  // Calls body(j, i) for every element: the j-th of the thread's, the i-th of the chunk.
  template <class Body>
  __device__ void each(Body body) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) body(j, place(j));
  }
};

// In any other chunk: one, next to the one of the next thread.
struct Single {
  static constexpr int kCount = 1;
  int i;

  __device__ int place(int) const { return i; }

  template <class X>
  __device__ Elements<X, 1> load(const X* from, bool there = true) const {
    if (!there) return {};
    return {from[i]};
  }
  template <class X>
  __device__ void store(X* to, const Elements<X, 1>& all) const {
    to[i] = all.element[0];
  }
  template <class Body>
  __device__ void each(Body body) const {
    body(0, i);
  }
};

// Zeros without a pointer.
template <class At, class X>
__device__ auto load_if_any(const At& at, const X* from) {
  return at.load(from, from != nullptr);
}

// Calls body(at), compiled twice: `at` loads and stores what this thread works on at a time.
template <class S, class Body>
__device__ void for_elements(const Piece<S>& p, Body body) {
  if (p.aligned && p.count == kChunk<S>) return body(Whole<S>{});
#pragma unroll 1
  for (int i = int(threadIdx.x); i < p.count; i += kThreads) {
    asm volatile("");  // else nvcc makes this loop anew for every case of its conditions
    body(Single{i});
  }
}

// ---- what a block shares

// The scalars of a param group, worked out in double by one thread of the block, and again only for another key.
template <class Scalars>
class Shared {
 public:
  template <class Make>
  __device__ const Scalars& operator()(uint64_t key, Make make) {
    Scalars& scalars = slot();
    if (!known_ || key != key_) {
      __syncthreads();  // nobody reads the last ones any more
      if (threadIdx.x == 0) scalars = make();
      __syncthreads();
      known_ = true;
      key_ = key;
    }
    return scalars;
  }

 private:
  static __device__ Scalars& slot() {
    __shared__ Scalars scalars;
    return scalars;
  }

  bool known_ = false;
  uint64_t key_ = 0;
};

// Σ over the block's threads, in a fixed order; in thread 0.
__device__ double block_sum(double sum) {
  __shared__ double warps[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  __syncthreads();  // nobody reads the last ones any more
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
  __syncthreads();
  sum = 0;
  if (threadIdx.x == 0)
    for (double warp : warps) sum += warp;
  return sum;
}

// Whether this block is the last one to come here: it then sees what all others wrote before.
__device__ bool is_last_block(unsigned* ticket) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;  // and back to 0
  __syncthreads();
  if (last) __threadfence();
  return last;
}

template <int terms>
struct Totals {
  double* partials;
  unsigned* ticket;
  double* to[terms];
};

// *to = Σ over all blocks, in their order; of a split launch, its parts one after the other.
template <int terms>
__device__ void add_up(const Totals<terms>& totals, const double (&sums)[terms], bool first_part) {
#pragma unroll
  for (int term = 0; term < terms; ++term) {
    const double sum = block_sum(sums[term]);
    if (threadIdx.x == 0) totals.partials[term * gridDim.x + blockIdx.x] = sum;
  }
  if (!is_last_block(totals.ticket)) return;
#pragma unroll
  for (int term = 0; term < terms; ++term) {
    const double* partials = totals.partials + term * gridDim.x;
    double sum = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) sum += __ldcg(partials + block);
    sum = block_sum(sum);
    if (threadIdx.x == 0) *totals.to[term] = first_part ? sum : *totals.to[term] + sum;
  }
}

// ---- a launch and the next one

// What a kernel has to do with the sums: one that uses them may be launched before the one that makes them has ended
// (programmatic dependent launch), and then waits for that first of all. Only kernels that make sums let others begin,
// and these are launched when all before them has ended, so that nothing else is left to wait for. Between descend and
// the sums that it uses or makes lie backward passes.
enum class Order { makes_sums, uses_sums, alone };

__device__ void let_next_launch_begin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// Until it has ended, with all that it wrote to be seen; not at all if this launch began after that.
__device__ void wait_for_launch_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace bsam
