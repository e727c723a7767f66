// 16-bit numbers and float32: widening is exact, narrowing rounds to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/number.h"

namespace attncap {
namespace device {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }

inline float to_float(Float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponent moved into place is off by the difference of the biases, 112; multiplying sets subnormals right too.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

template <typename T>
T from_float(float value);

template <>
inline BFloat16 from_float(float value) {
    if (std::isnan(value)) return {0x7fff};
    const uint32_t bits = bits_of(value);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 from_float(float value) {
    if (std::isnan(value)) return {0x7fff};
    const uint16_t sign = uint16_t(bits_of(value) >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)))};
    const uint32_t bits = bits_of(size);
    const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
    return {uint16_t(sign | ((rounded >> 13) - (112 << 10)))};
}

// The first of the two lies in the low half.
template <typename T>
uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <typename T>
void unpack(uint32_t pair, float& low, float& high) {
    low = to_float(T{uint16_t(pair & 0xffff)});
    high = to_float(T{uint16_t(pair >> 16)});
}

// Subnormal arguments and results are zero, as in ex2.approx.ftz.
inline float exp2(float x) {
    const float power = std::exp2f(x);
    return power < 0x1p-126f ? 0.0f : power;
}

}  // namespace device
}  // namespace attncap
