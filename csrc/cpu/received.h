// Column sums of a task's probabilities: what each key receives from its rows.
// A column is summed over the lanes in one order, whoever runs the task and whether its exponentials were kept.
#pragma once

#include "cpu/softmax.h"

namespace attncap {
namespace ATTNCAP_ISA {

// received[k] += sum over rows of exponentials[k][row] * factor[row], for `Vectors` vectors of rows.
//
// Where every factor and exponential is finite this is a plain sum. Otherwise a row that does not see the key, or has
// factor 0 because it does not count, must still give exactly 0: `guarded` looks for that.
template <class T, int Vectors>
void add_columns_as(const T* exponentials, const T* factor, int64_t count, bool guarded, T* received) {
    using L = Lanes<T>;
    typename L::V factors[Vectors];
    for (int v = 0; v < Vectors; ++v) factors[v] = L::load(factor + v * L::kWidth);
    auto column = [&](int64_t k) {
        auto sum = L::all(0);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            auto e = L::load(exponentials + k * kRows + v * L::kWidth), f = factors[v];
            if (guarded) {
                const auto nothing = L::either(L::equal(e, L::all(0)), L::equal(f, L::all(0)));
                e = L::select(nothing, L::all(0), e), f = L::select(nothing, L::all(0), f);
            }
            sum = L::fma(e, f, sum);
        }
        return sum;
    };
    int64_t k = 0;
    for (; k + L::kWidth <= count; k += L::kWidth) {
        typename L::V sums[L::kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < L::kWidth; ++i) sums[i] = column(k + i);
        L::store(received + k, L::load(received + k) + L::sum_each(sums));
    }
    for (; k < count; ++k) received[k] += L::sum(column(k));
}

template <class T>
void add_columns(const T* exponentials, const T* factor, int64_t count, int vectors, bool guarded, T* received) {
    constexpr int kMost = 4;
    for (int v = 0; v < vectors; v += kMost) {
        const int64_t shift = v * Lanes<T>::kWidth;
        with_constant<kMost>(std::min(kMost, vectors - v), [&](auto some) {
            add_columns_as<T, decltype(some)::value>(exponentials + shift, factor + shift, count, guarded, received);
        });
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
