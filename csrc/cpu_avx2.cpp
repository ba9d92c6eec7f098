// The CPU loops for AVX2 with FMA (x86-64-v3). System headers come first, so that nothing of theirs is
// compiled for more than every CPU has: the linker may keep such a copy for the whole program.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define BSAM_ISA avx2
#define BSAM_AVX2
#define BSAM_HAS_FMA
#include "cpu_loops.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
