// All that a kernel wants of the hardware. nvcc compiles kernels against hardware.cuh; a C++ compiler compiles the same
// kernels against the model of a CTA in tests/native, in which they run without a GPU.
#pragma once

#include "cuda/descriptor.h"
#include "cuda/number.h"
#include "statistics/inline.h"

#if defined(__CUDACC__)
#define ATTNCAP_DEVICE __device__ __forceinline__
#define ATTNCAP_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define ATTNCAP_PARAM const __grid_constant__
#include "cuda/hardware.cuh"
#else
#define ATTNCAP_DEVICE inline
#define ATTNCAP_KERNEL(threads, blocks_per_sm) inline void
#define ATTNCAP_PARAM const
#include "cta_model.h"
#endif
