// 16-bit numbers and float32: widening is exact, narrowing rounds to nearest, ties to even.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/number.h"
#include "statistics/elementary.h"

namespace attncap {
namespace device {
namespace model {

template <typename T>
float widened(uint16_t bits);

template <>
inline float widened<BFloat16>(uint16_t bits) {
    return float_of(uint32_t(bits) << 16);
}

template <>
inline float widened<Float16>(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // The exponent moved into place is off by the difference of the biases, 112; multiplying sets subnormals right too.
    return float_of(sign | bits_of(float_of(rest << 13) * 0x1p112f));
}

template <typename T>
uint16_t narrowed(float value);

template <>
inline uint16_t narrowed<BFloat16>(float value) {
    if (std::isnan(value)) return 0x7fff;
    const uint32_t bits = bits_of(value);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <>
inline uint16_t narrowed<Float16>(float value) {
    if (std::isnan(value)) return 0x7fff;
    const uint16_t sign = uint16_t(bits_of(value) >> 16 & 0x8000);
    const float size = std::fabs(value);
    if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
    if (size < 0x1p-14f) return uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)));
    const uint32_t bits = bits_of(size);
    const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
    return uint16_t(sign | ((rounded >> 13) - (112 << 10)));
}

// The two numbers of a register, the first in its low half.
template <typename T>
void unpack(uint32_t pair, float& low, float& high) {
    low = widened<T>(uint16_t(pair & 0xffff));
    high = widened<T>(uint16_t(pair >> 16));
}

}  // namespace model

template <typename T>
uint32_t pack(float low, float high) {
    return model::narrowed<T>(low) | uint32_t(model::narrowed<T>(high)) << 16;
}

}  // namespace device
}  // namespace attncap
