#include "cuda/forward_kernels.cuh"

template void attncap::run_forward<attncap::BFloat16, 128>(Level, const ForwardParams&, int, device::Stream);
