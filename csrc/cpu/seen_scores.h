// Scores of a task as its softmax sees them: with their bias, -inf for keys that a row does not see.
#pragma once

#include <utility>

#include "cpu/mask.h"
#include "cpu/task.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Biases and hides the scores of `count` keys from key0 on. Gives the range of these that every row sees as far as
// causality and window say.
template <class T>
std::pair<int64_t, int64_t> mask_scores(const Task& task, const SeenRange<T>& seen, int64_t key0, int64_t count,
                                        int vectors, T* scores) {
    const Array& mask = task.problem.attn_mask;
    if (mask.given() && mask.stride[2] == 0 && (task.heads == 1 || mask.stride[1] == 0)) {
        add_key_mask(mask, task.at(mask, 0, key0), count, vectors, scores);
    } else if (mask.given()) {
        add_row_mask<T>(mask, task.lanes(), count, scores, [&](int64_t lane) { return task.at(mask, lane, key0); });
    }
    const int64_t low = std::clamp<int64_t>(seen.all_begin - key0, 0, count);
    const int64_t high = std::clamp<int64_t>(seen.all_end - key0, low, count);
    hide_unseen(seen, key0, 0, low, vectors, scores);
    hide_unseen(seen, key0, high, count, vectors, scores);
    return {low, high};
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
