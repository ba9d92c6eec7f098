// A launch over many tensors, as its blocks and threads see it. No torch, no formulas.
//
// The tensors are cut into chunks, and a block takes a chunk at a time. Every pointer travels in the kernel's own
// parameters: no table is uploaded, nothing waits, and a captured graph stays valid.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "flat.h"
#include "scalar.h"

namespace bsam {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block

// ---- many tensors in a launch

enum Flags : uint16_t { kPerturbed = 1, kCounted = 2 };

// A tensor as a kernel sees it: packed, for as many as possible to fit a launch.
struct Row {
  char* w;
  char* g;
  const char* now;
  uint32_t line;   // where it is in the flat buffers, in units of kAlignment bytes
  uint32_t first;  // its first chunk
  uint32_t group;
  uint16_t last;  // elements in its last chunk
  uint16_t flags;
};

// What a kernel's parameters may hold, without its other arguments: few tensors, or as many as possible.
constexpr size_t kArguments = 256;
#if CUDART_VERSION >= 12010
constexpr size_t kFewBytes = 8192 - kArguments, kManyBytes = 32764 - kArguments;
#else
constexpr size_t kFewBytes = 4096 - kArguments, kManyBytes = kFewBytes;
#endif
constexpr int kFew = int((kFewBytes - 16) / sizeof(Row)), kMany = int((kManyBytes - 16) / sizeof(Row));

// The tensors [begin, begin + count) of a launch that may have been split.
template <int capacity>
struct Rows {
  uint32_t begin, count, chunks;
  Row row[capacity];

  // The tensor that a chunk is of: the last one that begins at it or before.
  __device__ uint32_t find(uint32_t chunk) const {
    uint32_t low = 0, high = count;
    while (high - low > 1) {
      const uint32_t middle = (low + high) / 2;
      (row[middle].first <= chunk ? low : high) = middle;
    }
    return low;
  }
};

// ---- 128 bits at a time

template <class S>
constexpr int kLanes = 16 / sizeof(S);
// Of a thread and a chunk: as many loads of each operand are under way at once. Of eight lanes one: more spill.
template <class S>
constexpr int kVectors = sizeof(S) == 2 ? 1 : 2;
template <class S>
constexpr int kChunk = kThreads * kVectors<S> * kLanes<S>;  // elements

template <class S>
struct Vector {
  S lane[kLanes<S>];
};

template <class S>
__device__ bool one_access(const S* at, int valid) {
  return valid == kLanes<S> && reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

// The vector at `from`, of which `valid` lanes exist; the others, and all without a pointer, are 0.
template <class S>
__device__ Vector<S> load(const S* from, int64_t i, int valid) {
  if (from == nullptr) return {};
  if (one_access(from + i, valid)) return bit_cast<Vector<S>>(*reinterpret_cast<const uint4*>(from + i));
  Vector<S> v{};
#pragma unroll
  for (int j = 0; j < kLanes<S>; ++j)
    if (j < valid) v.lane[j] = from[i + j];
  return v;
}

// __stwb and not an assignment: where the pointer comes straight from the arguments nvcc takes that apart again.
template <class S>
__device__ void store(S* to, int64_t i, const Vector<S>& v, int valid) {
  if (one_access(to + i, valid)) {
    __stwb(reinterpret_cast<uint4*>(to + i), bit_cast<uint4>(v));
    return;
  }
#pragma unroll
  for (int j = 0; j < kLanes<S>; ++j)
    if (j < valid) to[i + j] = v.lane[j];
}

// ---- chunks of tensors, vectors of a chunk, lanes of a vector

// A chunk: `count` elements of tensor `tensor`. Pointers are to its first element.
template <class S>
struct Piece {
  uint32_t tensor, group;
  uint32_t begin;  // its first element's index in the tensor, modulo 2^32
  bool perturbed;
  int count;
  int64_t flat;
  S *w, *g;
  const S* now;
};

template <class S, int capacity>
__device__ Piece<S> piece(const Rows<capacity>& rows, uint32_t chunk) {
  const uint32_t i = rows.find(chunk);
  const Row& row = rows.row[i];
  const uint32_t end = i + 1 < rows.count ? rows.row[i + 1].first : rows.chunks;
  const int64_t at = int64_t(chunk - row.first) * kChunk<S>;
  const auto advance = [at](auto* p) { return p == nullptr ? nullptr : p + at; };
  return {rows.begin + i,
          row.group,
          uint32_t(at),
          (row.flags & kPerturbed) != 0,
          chunk + 1 == end ? int(row.last) : kChunk<S>,
          int64_t(row.line) * (kAlignment / int64_t(sizeof(S))) + at,
          advance(reinterpret_cast<S*>(row.w)),
          advance(reinterpret_cast<S*>(row.g)),
          advance(reinterpret_cast<const S*>(row.now))};
}

// Which chunks a block works on is fixed by the number of blocks: sums come out the same every time.
template <class S, int capacity, class Body>
__device__ void for_pieces(const Rows<capacity>& rows, Body body) {
  for (uint32_t chunk = blockIdx.x; chunk < rows.chunks; chunk += gridDim.x) body(piece<S>(rows, chunk));
}

// Calls body(k, i, valid) for each of this thread's vectors: the k-th, at element i, with `valid` lanes.
template <class S, class Body>
__device__ void for_vectors(int count, Body body) {
#pragma unroll
  for (int k = 0; k < kVectors<S>; ++k) {
    const int i = (k * kThreads + int(threadIdx.x)) * kLanes<S>;
    if (i < count) body(k, i, count - i < kLanes<S> ? count - i : kLanes<S>);
  }
}

template <class S, class Body>
__device__ void for_lanes(Body body) {
#pragma unroll
  for (int j = 0; j < kLanes<S>; ++j) body(j);
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

}  // namespace
}  // namespace cuda
}  // namespace bsam
