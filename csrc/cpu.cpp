// Which compiled loops this CPU runs.
#include "cpu.h"

#include <cstdlib>
#include <cstring>

namespace bsam {

namespace baseline {
const Loops& loops(Dtype, bool stochastic);
}
#if defined(__x86_64__)
namespace avx2 {
const Loops& loops(Dtype, bool stochastic);
}
namespace avx512 {
const Loops& loops(Dtype, bool stochastic);
}
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Loops& (*loops)(Dtype, bool);
};

// Torch's own variable that holds its kernels to an instruction set (default, avx2, avx512) holds ours too.
bool allowed(const char* capability) {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");  // NOLINT(concurrency-mt-unsafe): while it is loaded
  if (limit == nullptr) return true;
  return std::strcmp(limit, "default") != 0 &&
         (std::strcmp(limit, "avx2") != 0 || std::strcmp(capability, "avx2") == 0);
}

InstructionSet best() noexcept {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return {"AVX-512", avx512::loops};
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", avx2::loops};
#endif
  return {"baseline", baseline::loops};
}

const InstructionSet chosen = best();

}  // namespace

const Loops& best_loops(Dtype dtype, bool stochastic) { return chosen.loops(dtype, stochastic); }
const char* instruction_set() { return chosen.name; }

}  // namespace bsam
