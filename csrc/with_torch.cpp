// What includes torch's headers, as one file to the compiler: they take it 15 seconds, and what follows them a few.
// compiling.py leaves out what is included here.
#include "bindings.cpp"
#include "copies.cpp"
#include "cpu_flat_params.cpp"
#include "flat_params.cpp"
#include "flat_phases.cpp"
#include "holders.cpp"
#include "identity.cpp"
#ifdef BSAM_FUSED_CUDA
#include "cuda_flat_params.cpp"
#endif
