"""The compilers' flags. Part of what tells one build from another, so nothing else lies here (`places.digest`)."""

import sys

CXX_FLAGS = [
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-ffp-contract=off",  # math.h says which multiply-adds are fused
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
LINK_FLAGS = ["-shared"]
if sys.platform == "linux":
    CXX_FLAGS.append("-fopenmp")  # at::parallel_for's pragma; the runtime is the one torch has loaded
if sys.platform == "darwin":
    LINK_FLAGS = ["-bundle", "-undefined", "dynamic_lookup"]
NVCC_FLAGS = [
    "-O3",
    "-DNDEBUG",
    "-std=c++17",  # whatever torch's own: cuda.cu includes none of its headers
    "--expt-relaxed-constexpr",  # std::array in kernels
    "-fmad=false",  # nvcc's -ffp-contract=off
    "--threads=2",  # architectures are compiled side by side
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xfatbin=-compress-all",
]
