// Functions that the host and the device compile alike: the same text serves the CPU, the GPU and the model of a CTA.
#pragma once

#if defined(__CUDACC__)
#define ATTNCAP_INLINE __host__ __device__ __forceinline__
#define ATTNCAP_UNROLL _Pragma("unroll")
#define ATTNCAP_KEEP_ROLLED _Pragma("unroll 1")
#define ATTNCAP_SELDOM(condition) __builtin_expect(condition, false)
#else
#define ATTNCAP_INLINE inline
#define ATTNCAP_UNROLL
#define ATTNCAP_KEEP_ROLLED
#define ATTNCAP_SELDOM(condition) (condition)
#endif
