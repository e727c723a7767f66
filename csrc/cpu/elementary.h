// exp, expm1, tanh and log on vectors, within about one unit in the last place of the type.
// Coefficients: Chebyshev fits on the reduced interval, made for this file (40-digit arithmetic).
#pragma once

#include <type_traits>

#include "cpu/simd.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
struct Constants;

template <>
struct Constants<float> {
    // exp(x) is taken as 0 up to kExpMin, so that 2^n below stays a normal number.
    static constexpr float kExpMin = -87.0f;
    static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    static constexpr float kLn2High = 0.693359375f, kLn2Low = -0.00021219444005469058f;
    static constexpr int kMantissaBits = 23;
    static constexpr int32_t kOne = 0x3f800000, kExponentMask = 0x7f800000;
    // (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2, highest power first; error 8e-9.
    static constexpr float kExp[] = {0.0013926183587713494f, 0.0083631790527225774f, 0.041666554617204574f,
                                     0.16666576989698776f, 0.5f};
    // (log(f) - 2s) / s^3 in s^2, s = (f - 1)/(f + 1), on sqrt(1/2) <= f <= sqrt(2); error 2e-11.
    static constexpr float kLog[] = {0.23330581938241894f, 0.28550816599711549f, 0.40000121876972002f,
                                     0.66666666554451646f};
};

template <>
struct Constants<double> {
    static constexpr double kExpMin = -708.0;
    static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr double kLn2High = 0.6931467056274414, kLn2Low = 4.749325039031672321e-7;
    static constexpr int kMantissaBits = 52;
    static constexpr int64_t kOne = 0x3ff0000000000000, kExponentMask = 0x7ff0000000000000;
    static constexpr double kExp[] = {1.6086627956780369e-10, 2.0918137737642736e-9, 2.5052071094293547e-8,
                                      2.7557263279088497e-7,  2.7557319247218731e-6, 2.4801587336442238e-5,
                                      1.9841269841263299e-4,  1.3888888888879074e-3, 8.3333333333333340e-3,
                                      4.1666666666666677e-2,  0.16666666666666667,   0.5};
    static constexpr double kLog[] = {0.13086767009948174, 0.13268759668560613, 0.15386240205813478,
                                      0.18181795630884753, 0.22222222391800469, 0.28571428570803230,
                                      0.40000000000000878, 0.66666666666666666};
};

template <class T, int N>
inline typename Lanes<T>::V polynomial(const T (&coefficients)[N], typename Lanes<T>::V x) {
    using L = Lanes<T>;
    auto y = L::all(coefficients[0]);
    for (int i = 1; i < N; ++i) y = L::fma(y, x, L::all(coefficients[i]));
    return y;
}

// x = n ln 2 + r: gives exp(r) - 1 and 2^n. Needs |x| below about 700 (87 for float).
template <class T>
inline typename Lanes<T>::V reduced_expm1(typename Lanes<T>::V x, typename Lanes<T>::V* power) {
    using L = Lanes<T>;
    using C = Constants<T>;
    auto shifted = L::fma(x, L::all(T(1.4426950408889634074)), L::all(C::kRound));
    auto n = shifted - L::all(C::kRound);
    auto r = L::fma(n, L::all(-C::kLn2High), x);
    r = L::fma(n, L::all(-C::kLn2Low), r);
    // The low bits of `shifted` hold n in two's complement: moved into the exponent they make 2^n.
    typedef std::make_unsigned_t<typename L::Int> Integer;
    typedef Integer IntVector __attribute__((vector_size(sizeof(typename L::V))));
    IntVector exponent = ((IntVector)L::bits(shifted) << C::kMantissaBits) + Integer(C::kOne);
    *power = L::from_bits((typename L::I)exponent);
    return L::fma(r * r, polynomial<T>(C::kExp, r), r);
}

// Whether exp(x) is taken for other than 0.
template <class T>
inline typename Lanes<T>::M weighs(typename Lanes<T>::V x) {
    return Lanes<T>::above(x, Lanes<T>::all(Constants<T>::kExpMin));
}

// Each x <= 0, or NaN, becomes exp(x) in lanes kept, which are those where it weighs, and 0 in the others.
// The N evaluations go step by step side by side: one alone would wait for its own results most of the time.
template <class T, int N>
inline void exp_nonpositive(typename Lanes<T>::V (&x)[N], const typename Lanes<T>::M (&kept)[N]) {
    using L = Lanes<T>;
    using C = Constants<T>;
    if constexpr (L::kPowers > 0) {
        // x = n ln 2 + r with n a multiple of 1 / kPowers, whose low bits `shifted` holds as an integer.
        constexpr T kRound = C::kRound / L::kPowers;
        typename L::V shifted[N], n[N], r[N], y[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) shifted[i] = L::fma(x[i], L::all(T(1.4426950408889634074)), L::all(kRound));
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) n[i] = shifted[i] - L::all(kRound);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) r[i] = L::fma(n[i], L::all(T(-0.69314718055994530942)), x[i]);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) y[i] = L::fma(r[i], L::all(L::kTail[1]), L::all(L::kTail[0]));
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) y[i] = L::fma(r[i], y[i], L::all(1)) * r[i];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) x[i] = L::times_power(y[i], n[i], L::bits(shifted[i]), kept[i]);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            typename L::V power;
            const auto y = reduced_expm1<T>(L::max(L::all(C::kExpMin), x[i]), &power);
            x[i] = L::select(kept[i], L::fma(power, y, power), L::all(0));
        }
    }
}

template <class T, int N>
inline void exp_nonpositive(typename Lanes<T>::V (&x)[N]) {
    typename Lanes<T>::M kept[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) kept[i] = weighs<T>(x[i]);
    exp_nonpositive<T>(x, kept);
}

template <class T>
inline typename Lanes<T>::V exp_nonpositive(typename Lanes<T>::V x) {
    typename Lanes<T>::V one[1] = {x};
    exp_nonpositive<T>(one);
    return one[0];
}

// max(a - b, floor) makes exp's argument finite where both are -inf, and where a row has seen nothing yet.
template <class T>
inline typename Lanes<T>::V bounded_difference(typename Lanes<T>::V a, typename Lanes<T>::V b) {
    using L = Lanes<T>;
    return L::max(L::all(T(2) * Constants<T>::kExpMin), a - b);
}

template <class T>
inline typename Lanes<T>::V tanh(typename Lanes<T>::V x) {
    using L = Lanes<T>;
    // tanh|x| = -e / (e + 2) with e = exp(-2|x|) - 1, which loses nothing near 0.
    typename L::V power;
    auto twice = L::max(L::all(Constants<T>::kExpMin), L::all(T(-2)) * L::abs(x));
    auto y = reduced_expm1<T>(twice, &power);
    auto e = L::fma(power, y, power - L::all(1));
    auto magnitude = (L::all(0) - e) / (e + L::all(2));
    return L::select(L::less(x, L::all(0)), L::all(0) - magnitude, magnitude);
}

// log(x) for finite normal x > 0.
template <class T>
inline typename Lanes<T>::V log_positive(typename Lanes<T>::V x) {
    using L = Lanes<T>;
    using C = Constants<T>;
    typedef typename L::Int Integer;
    typedef Integer IntVector __attribute__((vector_size(sizeof(typename L::V))));
    // x = 2^n f with f in [sqrt(1/2), sqrt(2)): n counts from the bits of sqrt(1/2).
    T root = T(0.70710678118654752440);
    Integer root_bits;
    std::memcpy(&root_bits, &root, sizeof root);
    IntVector bits = (IntVector)L::bits(x);
    IntVector n = (bits - root_bits) >> C::kMantissaBits;
    auto f = L::from_bits((typename L::I)(bits - n * (Integer(1) << C::kMantissaBits)));
    auto s = (f - L::all(1)) / (f + L::all(1));
    auto z = s * s;
    auto tail = s * z * polynomial<T>(C::kLog, z);
    auto power = L::to_float((typename L::I)n);
    return L::fma(power, L::all(C::kLn2High), L::fma(power, L::all(C::kLn2Low), tail + s + s));
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
