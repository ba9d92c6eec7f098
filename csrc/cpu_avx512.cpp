// The CPU loops for AVX-512 (x86-64-v4). System headers come first, so that nothing of theirs is
// compiled for more than every CPU has: the linker may keep such a copy for the whole program.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define BSAM_ISA avx512
#define BSAM_AVX512
#define BSAM_HAS_FMA
#include "cpu_loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
