#include "cuda/forward_kernels.cuh"

template void attncap::run_forward<attncap::BFloat16, 64>(Level, const ForwardParams&, int, device::Stream);
