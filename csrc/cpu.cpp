// Which compiled loops this CPU runs.
#include "cpu.h"

namespace bsam {

namespace baseline {
const Loops& loops(Dtype);
}
#if defined(__x86_64__)
namespace avx2 {
const Loops& loops(Dtype);
}
namespace avx512 {
const Loops& loops(Dtype);
}
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Loops& (*loops)(Dtype);
};

InstructionSet best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return {"AVX-512", avx512::loops};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", avx2::loops};
#endif
  return {"baseline", baseline::loops};
}

const InstructionSet chosen = best();

}  // namespace

const Loops& best_loops(Dtype dtype) { return chosen.loops(dtype); }
const char* instruction_set() { return chosen.name; }

}  // namespace bsam
