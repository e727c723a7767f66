// Elementary functions that host and device have under one name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "statistics/inline.h"

namespace attncap {

ATTNCAP_INLINE float infinity() { return HUGE_VALF; }

ATTNCAP_INLINE float larger(float a, float b) { return fmaxf(a, b); }
ATTNCAP_INLINE float smaller(float a, float b) { return fminf(a, b); }

// 2^x: on a device one instruction, exact to two units in the last place, 0 where the result would be subnormal.
ATTNCAP_INLINE float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

ATTNCAP_INLINE float logarithm(float x) { return log2f(x); }

ATTNCAP_INLINE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

ATTNCAP_INLINE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

}  // namespace attncap
