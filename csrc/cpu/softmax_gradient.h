// From the derivatives by probabilities to those by scores, where the two maps lie.
// Invariant: a key whose probability is 0 has a derivative of 0, whatever stood there.
#pragma once

#include "cpu/elementary.h"
#include "cpu/gradient_workspace.h"

namespace attncap {
namespace ATTNCAP_ISA {

// A map of `count` keys from key0 on: prob has scores and gets probabilities; slope has the part of the derivatives by
// probabilities that was summed up in the map, and gets p (G - level).
template <class T>
struct SoftmaxMap {
    GradientWorkspace<T>& w;
    int64_t key0, count;
};

// One vector of rows. `Dense` adds what arrives from all keys alike: entropy, collision, distance, received mass.
template <class T, bool Dense>
void differentiate_rows(const SoftmaxMap<T>& map, int64_t r) {
    using L = Lanes<T>;
    const GradientWorkspace<T>& w = map.w;
    const auto lse = L::load(w.lse + r), level = L::load(w.level + r), zero = L::all(0);
    const auto entropy = L::load(w.arrived.entropy + r), collision = L::load(w.arrived.collision + r);
    const auto distance = L::load(w.arrived.distance + r), counted = L::load(w.arrived.counted + r);
    T ahead[L::kWidth];  // of the map's first key
    for (int i = 0; i < L::kWidth; ++i) ahead[i] = T(map.key0 - int64_t(w.position[r + i]));
    const auto first_ahead = L::load(ahead);
    // `some` keys from k on; a constant, so that their evaluations interleave.
    auto take = [&](int64_t k, auto some) {
        constexpr int kSome = decltype(some)::value;
        T *prob = w.prob + k * kRows + r, *slope = w.slope + k * kRows + r;
        typename L::V t[kSome], p[kSome];
#pragma GCC unroll 4
        for (int i = 0; i < kSome; ++i) p[i] = t[i] = bounded_difference<T>(L::load(prob + i * kRows), lse);
        exp_nonpositive<T>(p);
#pragma GCC unroll 4
        for (int i = 0; i < kSome; ++i) {
            auto by = L::load(slope + i * kRows);
            if constexpr (Dense) {
                by = L::fma(counted, L::all(w.received[k + i]), by) - entropy * t[i];
                by = L::fma(collision + collision, p[i], by);
                by = L::fma(distance, L::abs(first_ahead + L::all(T(k + i))), by);
            }
            L::store(prob + i * kRows, p[i]);
            L::store(slope + i * kRows, L::select(L::equal(p[i], zero), zero, p[i] * (by - level)));
        }
    };
    constexpr int kTogether = 4;
    int64_t k = 0;
    for (; k + kTogether <= map.count; k += kTogether) take(k, std::integral_constant<int, kTogether>{});
    for (; k < map.count; ++k) take(k, std::integral_constant<int, 1>{});
}

template <class T>
void differentiate_softmax(const SoftmaxMap<T>& map, int vectors, bool dense) {
    for (int v = 0; v < vectors; ++v) {
        if (dense) {
            differentiate_rows<T, true>(map, v * Lanes<T>::kWidth);
        } else {
            differentiate_rows<T, false>(map, v * Lanes<T>::kWidth);
        }
    }
}

// slope: from derivatives by capped scores to those by scores before the cap.
template <class T>
void differentiate_cap(const SoftmaxMap<T>& map, T softcap, int vectors) {
    using L = Lanes<T>;
    const auto inverse = L::all(1 / softcap);
    for (int64_t k = 0; k < map.count; ++k) {
        for (int v = 0; v < vectors; ++v) {
            T* slope = map.w.slope + k * kRows + v * L::kWidth;
            const auto tanh = L::load(map.w.capped + k * kRows + v * L::kWidth) * inverse;
            const auto by = L::load(slope), change = L::all(1) - tanh * tanh;
            L::store(slope, L::select(L::equal(by, L::all(0)), by, by * change));  // capped is no number where not seen
        }
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
