// Prints the pieces of the first and last chunks of tensors too large to allocate: pieces NUMEL...
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cuda_launch.cuh"

int main(int count, char** arguments) {
  using namespace bsam;
  using S = BFloat16;
  std::vector<int64_t> numels;
  for (int i = 1; i < count; ++i) numels.push_back(std::atoll(arguments[i]));
  const FlatIndex index(numels, sizeof(S));
  cuda::Rows<8> rows{};
  for (size_t i = 0; i < numels.size(); ++i) {
    const cuda::Item item{nullptr, nullptr, nullptr, index.offset(int64_t(i)), numels[i], 0, false, false};
    rows.row[rows.count++] = cuda::row_of<S>(item, rows.chunks);
    rows.chunks += cuda::chunks_of<S>(item);
  }
  // Pointers as numbers: p + at, as the kernels have it.
  for (uint32_t i = 0; i < rows.count; ++i) rows.row[i].w = reinterpret_cast<char*>(int64_t(1) << 40);
  for (uint32_t i = 0; i < rows.count; ++i)
    for (const uint32_t chunk : {rows.row[i].first, (i + 1 < rows.count ? rows.row[i + 1].first : rows.chunks) - 1}) {
      const auto p = cuda::piece<S>(rows, chunk);
      const long long at = (reinterpret_cast<char*>(p.w) - rows.row[i].w) / int64_t(sizeof(S));
      std::printf("%u %lld %lld %d\n", p.tensor, at, (long long)p.flat, p.count);
    }
}
