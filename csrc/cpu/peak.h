// What this processor's multipliers can do at most: the yardstick of benchmarks/.
#pragma once

#include <chrono>

#include "cpu/simd.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Billions of floating-point operations a second of one thread that multiplies and adds in registers alone.
template <class T>
double fma_rate(double seconds) {
    using L = Lanes<T>;
    constexpr int kSums = 12, kTurns = 4096;
    typename L::V sum[kSums];
    volatile T start = T(1e-3);
    for (int i = 0; i < kSums; ++i) sum[i] = L::all(start + T(i));
    const auto factor = L::all(start);
    const auto begin = std::chrono::steady_clock::now();
    double elapsed = 0, operations = 0;
    while (elapsed < seconds) {
        for (int turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 12
            for (int i = 0; i < kSums; ++i) sum[i] = L::fma(sum[i], factor, factor);
        }
        operations += 2.0 * kSums * kTurns * L::kWidth;
        elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    }
    auto total = sum[0];
    for (int i = 1; i < kSums; ++i) total = total + sum[i];
    volatile T used = L::sum(total);
    (void)used;
    return operations / elapsed / 1e9;
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
