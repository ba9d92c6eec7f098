// The CPU loops for any CPU of the architecture.
#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BSAM_ISA baseline
#include "cpu_loops.h"
