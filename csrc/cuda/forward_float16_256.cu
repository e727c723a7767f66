#include "cuda/forward_kernels.cuh"

template void attncap::run_forward<attncap::Float16, 256>(const ForwardCall&);
