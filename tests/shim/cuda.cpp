// The kernels, as C++: with this folder before CUDA's own in the include path.
#include "../../csrc/cuda.cu"
