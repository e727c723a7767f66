// Between the tensors' dtypes and the type that is computed in (float, or double for float64 tensors).
// Widening is exact; narrowing rounds to nearest, ties to even, and keeps NaN and the infinities.
#pragma once

#include <algorithm>

#include "cpu/simd.h"
#include "problem.h"

namespace attncap {
namespace ATTNCAP_ISA {

// The dtype whose numbers are computed in as they are.
template <class T>
constexpr DType kOwn = sizeof(T) == 8 ? DType::float64 : DType::float32;

inline float half_to_float(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    // Exponent and mantissa moved into place are off by the ratio of the biases, 2^112, subnormals included.
    uint32_t bits = uint32_t(half & 0x7fff) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;
    std::memcpy(&bits, &value, 4);
    if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= uint32_t(half & 0x8000) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t(bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x47800000) return sign | 0x7c00;  // 65536 and more; 65520 .. 65536 round up below
    if (bits < 0x38800000) {                       // subnormal: adding 0.5 lines the last bit up
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return sign | uint16_t(bits - 0x3f000000);
    }
    bits += 0x0fff + ((bits >> 13) & 1);
    return sign | uint16_t((bits - 0x38000000) >> 13);
#endif
}

inline float bfloat_to_float(uint16_t bfloat) {
    const uint32_t bits = uint32_t(bfloat) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 0x40;  // NaN stays NaN
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class Stored>
inline Stored read(const char* p) {
    Stored value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class Stored>
inline void write(char* p, Stored value) {
    std::memcpy(p, &value, sizeof value);
}

// How numbers lie in memory: `load` gives one as T, `load_lanes` a vector of neighbours.
template <class T>
struct StoredOwn {
    static constexpr int64_t kBytes = sizeof(T);
    static T load(const char* p) { return read<T>(p); }
    static typename Lanes<T>::V load_lanes(const char* p) { return Lanes<T>::load(reinterpret_cast<const T*>(p)); }
};

struct StoredBfloat {
    static constexpr int64_t kBytes = 2;
    static float load(const char* p) { return bfloat_to_float(read<uint16_t>(p)); }
    static Lanes<float>::V load_lanes(const char* p) {
        using L = Lanes<float>;
        typedef uint16_t Half __attribute__((vector_size(sizeof(L::V) / 2)));
        typedef uint32_t Whole __attribute__((vector_size(sizeof(L::V))));
        return L::from_bits((L::I)(__builtin_convertvector(read<Half>(p), Whole) << 16));
    }
};

struct StoredHalf {
    static constexpr int64_t kBytes = 2;
    static float load(const char* p) { return half_to_float(read<uint16_t>(p)); }
    static Lanes<float>::V load_lanes(const char* p) {
#if defined(ATTNCAP_AVX512)
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(ATTNCAP_AVX2)
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
        float lanes[Lanes<float>::kWidth];
        for (int i = 0; i < Lanes<float>::kWidth; ++i) lanes[i] = load(p + 2 * i);
        return Lanes<float>::load(lanes);
#endif
    }
};

// Calls body(stored) for a tensor that can be computed with as it is stored, else gives false.
template <class T, class Body>
inline bool as_stored(DType dtype, int64_t stride, Body&& body) {
    if (stride != 1) return false;
    if (dtype == kOwn<T>) return body(StoredOwn<T>{}), true;
    if constexpr (sizeof(T) == 4) {
        if (dtype == DType::bfloat16) return body(StoredBfloat{}), true;
        if (dtype == DType::float16) return body(StoredHalf{}), true;
    }
    return false;
}

// out[i] = convert(in[i * stride]); the loop of known step is one that the compiler vectorises.
template <class Stored, class T, class Convert>
inline void load_each(T* out, const char* in, int64_t stride, int64_t count, Convert convert) {
    constexpr int64_t size = sizeof(Stored);
    if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) out[i] = T(convert(read<Stored>(in + i * size)));
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = T(convert(read<Stored>(in + i * stride * size)));
    }
}

template <class T>
inline void load_halves(T* out, const char* in, int64_t stride, int64_t count) {
    int64_t done = 0;
#if defined(__F16C__)
    if constexpr (sizeof(T) == 4) {
        for (; stride == 1 && done + 8 <= count; done += 8) {
            const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 2 * done));
            _mm256_storeu_ps(out + done, _mm256_cvtph_ps(halves));
        }
    }
#endif
    load_each<uint16_t>(out + done, in + 2 * done * stride, stride, count - done, half_to_float);
}

// Numbers of any dtype as T; booleans become a bias: 0 where True, -inf where False.
template <class T>
void load_strided(T* out, const char* in, DType dtype, int64_t stride, int64_t count) {
    auto same = [](auto x) { return x; };
    switch (dtype) {
        case DType::float32:
            return load_each<float>(out, in, stride, count, same);
        case DType::float64:
            return load_each<double>(out, in, stride, count, same);
        case DType::bfloat16:
            return load_each<uint16_t>(out, in, stride, count, bfloat_to_float);
        case DType::float16:
            return load_halves(out, in, stride, count);
        case DType::boolean:
            return load_each<uint8_t>(out, in, stride, count, [](uint8_t x) { return x ? T(0) : T(-INFINITY); });
        case DType::int32:
            return load_each<int32_t>(out, in, stride, count, same);
    }
}

template <class T>
T load_one(const char* in, DType dtype) {
    T value{};
    load_strided(&value, in, dtype, 0, 1);
    return value;
}

// out[i * stride] = in[i], rounded to nearest even; `dtype` is a floating one.
template <class T>
void store_strided(char* out, DType dtype, int64_t stride, const T* in, int64_t count) {
    const int64_t step = stride * item_size(dtype);
    auto put = [&](auto convert) {
        using Stored = decltype(convert(*in));
        if (stride == 1) {
            for (int64_t i = 0; i < count; ++i) write<Stored>(out + i * int64_t(sizeof(Stored)), convert(in[i]));
        } else {
            for (int64_t i = 0; i < count; ++i) write<Stored>(out + i * step, convert(in[i]));
        }
    };
    if (dtype == DType::float32) put([](T x) { return float(x); });
    if (dtype == DType::float64) put([](T x) { return double(x); });
    if (dtype == DType::bfloat16) put([](T x) { return float_to_bfloat(float(x)); });
    if (dtype == DType::float16) put([](T x) { return float_to_half(float(x)); });
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
