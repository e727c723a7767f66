// The gradient of a mask that is added to the scores.
// Invariant: the caller lets no two tasks run at once that share an entry; what a task adds to an entry it sums first.
#pragma once

#include "cpu/gradient_workspace.h"
#include "cpu/task.h"

namespace attncap {
namespace ATTNCAP_ISA {

// `gradient` (B, H, Q, K) += the derivatives by the scores of `count` keys from key0 on, [key][kRows], 0 in lanes past
// the rows; along a stride of 0 they are summed up.
template <class T>
void add_mask_gradient(const Array& gradient, const Task& task, int64_t key0, int64_t count, int vectors,
                       const T* slope, T* lanes) {
    using L = Lanes<T>;
    const auto entry = [&](int64_t lane, int64_t k) { return reinterpret_cast<T*>(task.at(gradient, lane, key0 + k)); };
    const bool one_for_all_rows = gradient.stride[2] == 0 && (task.heads == 1 || gradient.stride[1] == 0);
    if (one_for_all_rows) {
        for (int64_t k = 0; k < count; ++k) {
            auto sum = L::load(slope + k * kRows);
            for (int v = 1; v < vectors; ++v) sum = sum + L::load(slope + k * kRows + v * L::kWidth);
            *entry(0, k) += L::sum(sum);
        }
    } else if (gradient.stride[3] == 0) {
        for (int v = 0; v < vectors; ++v) {
            auto sum = L::all(0);
            for (int64_t k = 0; k < count; ++k) sum = sum + L::load(slope + k * kRows + v * L::kWidth);
            L::store(lanes + v * L::kWidth, sum);
        }
        for (int64_t i = 0; i < task.lanes(); ++i) *entry(i, 0) += lanes[i];
    } else {
        for (int64_t i = 0; i < task.lanes(); ++i) {
            T* to = entry(i, 0);
            for (int64_t k = 0; k < count; ++k) to[k * gradient.stride[3]] += slope[k * kRows + i];
        }
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
