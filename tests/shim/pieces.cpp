// Prints the pieces of tensors too large to allocate, each as its tensor, its first element there and in the flat
// buffers, and its elements.
//
//   pieces ends NUMEL...                     those of the first and last chunk of each
//   pieces forwards|backwards BLOCKS NUMEL...  all, as a grid of so many blocks takes them, behind the block
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../csrc/cuda_launch.cuh"

using namespace bsam;
using S = BFloat16;

void print(const cuda::Piece<S>& p, const char* w) {
  const long long at = (reinterpret_cast<const char*>(p.w) - w) / int64_t(sizeof(S));
  std::printf("%u %lld %lld %d\n", p.tensor, at, (long long)p.flat, p.count);
}

int main(int count, char** arguments) {
  const bool ends = std::strcmp(arguments[1], "ends") == 0;
  char* const w = reinterpret_cast<char*>(int64_t(1) << 40);  // pointers as numbers: w + at, as the kernels have it
  std::vector<int64_t> numels;
  for (int i = ends ? 2 : 3; i < count; ++i) numels.push_back(std::atoll(arguments[i]));
  const FlatIndex index(numels, sizeof(S));
  cuda::Items items;
  for (size_t i = 0; i < numels.size(); ++i)
    items.push_back({w, nullptr, nullptr, index.offset(int64_t(i)), numels[i], 0, false, false, false});
  cuda::Rows<8> rows;
  cuda::fill<S>(rows, items, 0);
  if (ends) {
    for (uint32_t i = 0; i < rows.count; ++i)
      for (const uint32_t chunk : {rows.first[i], rows.first[i + 1] - 1})
        print(cuda::piece<S>(rows, rows.find(chunk), chunk), w);
    return 0;
  }
  gridDim = dim3(unsigned(std::atoi(arguments[2])));
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    const auto body = [&](const cuda::Piece<S>& p) {
      std::printf("%u ", blockIdx.x);
      print(p, w);
    };
    if (std::strcmp(arguments[1], "forwards") == 0)
      cuda::for_pieces<S, cuda::Walk::forwards>(rows, body);
    else
      cuda::for_pieces<S, cuda::Walk::backwards>(rows, body);
  }
}
