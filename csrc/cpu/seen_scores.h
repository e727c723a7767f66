// Scores of a task as its softmax sees them: with their bias, -inf for keys that a row does not see.
#pragma once

#include <utility>

#include "cpu/mask.h"
#include "cpu/task.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Biases the scores of keys key0 .. key0 + count - 1.
template <class T>
void bias_scores(const Task& task, int64_t key0, int64_t count, int vectors, T* scores) {
    const Array& mask = task.problem.attn_mask;
    if (mask.stride[2] == 0 && (task.heads == 1 || mask.stride[1] == 0)) {
        add_key_mask(mask, task.at(mask, 0, key0), count, vectors, scores);
    } else {
        add_row_mask<T>(mask, task.lanes(), count, scores, [&](int64_t lane) { return task.at(mask, lane, key0); });
    }
}

// Biases and hides the scores of `count` keys from key0 on. Gives the range of these whose scores stay as they were.
template <class T>
std::pair<int64_t, int64_t> mask_scores(const Task& task, const SeenRange<T>& seen, int64_t key0, int64_t count,
                                        int vectors, T* scores) {
    int64_t first = 0, last = count;
    // Whatever `change` does to the keys of a range that are not among begin .. end - 1.
    auto outside = [&](int64_t begin, int64_t end, auto change) {
        const int64_t low = std::clamp<int64_t>(begin - key0, 0, count);
        const int64_t high = std::clamp<int64_t>(end - key0, low, count);
        if (low > 0) change(0, low);
        if (high < count) change(high, count);
        first = std::max(first, low), last = std::min(last, high);
    };
    if (task.problem.attn_mask.given()) {
        outside(seen.open_begin, seen.open_end, [&](int64_t low, int64_t high) {
            bias_scores(task, key0 + low, high - low, vectors, scores + low * kRows);
        });
    }
    outside(seen.all_begin, seen.all_end,
            [&](int64_t low, int64_t high) { hide_unseen(seen, key0, low, high, vectors, scores); });
    return {std::min(first, last), last};
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
