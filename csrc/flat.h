// Many tensors as one flat index space. No torch, no formulas.
//
// Tensor i owns the flat elements [offset(i), offset(i) + numel(i)); offsets are padded so that every tensor
// starts on a cache line. The space is cut into blocks of equal size, whatever the tensors: the unit of work
// and of partial sums, so that sums do not depend on how many threads there are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace bsam {

constexpr int64_t kBlock = 16384;   // elements
constexpr int64_t kAlignment = 64;  // bytes

// `count` elements of one tensor: its elements from `begin` on, at `flat` in the flat buffers.
struct Segment {
  int64_t tensor, begin, flat, count;
};

class FlatIndex {
 public:
  FlatIndex(const std::vector<int64_t>& numels, int64_t itemsize) : numels_(numels) {
    const int64_t pad = std::max<int64_t>(1, kAlignment / itemsize);
    offsets_.reserve(numels.size() + 1);
    offsets_.push_back(0);
    for (int64_t numel : numels) offsets_.push_back(offsets_.back() + (numel + pad - 1) / pad * pad);
    first_.reserve(blocks());
    int64_t tensor = 0;
    for (int64_t block = 0; block < blocks(); ++block) {
      while (offsets_[tensor + 1] <= block * kBlock) ++tensor;
      first_.push_back(tensor);
    }
  }

  int64_t size() const { return offsets_.back(); }  // of a flat buffer, in elements, padding included
  int64_t blocks() const { return (size() + kBlock - 1) / kBlock; }
  int64_t offset(int64_t tensor) const { return offsets_[tensor]; }
  int64_t numel(int64_t tensor) const { return numels_[tensor]; }

  // Calls visit(Segment) for every piece of a tensor in this block, in order.
  template <class Visit>
  void for_each_segment(int64_t block, Visit&& visit) const {
    const int64_t from = block * kBlock, to = std::min(from + kBlock, size());
    for (int64_t i = first_[block]; i < int64_t(numels_.size()) && offsets_[i] < to; ++i) {
      const int64_t begin = std::max(from, offsets_[i]);
      const int64_t end = std::min(to, offsets_[i] + numels_[i]);
      if (begin < end) visit(Segment{i, begin - offsets_[i], begin, end - begin});
    }
  }

 private:
  std::vector<int64_t> numels_, offsets_, first_;
};

}  // namespace bsam
