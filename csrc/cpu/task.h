// The rows that one task computes. A lane is one row of one head; lanes of a head are neighbours.
#pragma once

#include "cpu/convert.h"
#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Up to kRows query rows of one sequence, a lane each: of one head, or all rows of a few heads that share their keys.
struct Task {
    const Problem& problem;
    const Sequence& sequence;
    int64_t head, heads, row0, rows;

    Task(const Problem& p, const Sequence& s, int64_t first_head, int64_t head_count, int64_t first_row)
        : problem(p),
          sequence(s),
          head(first_head),
          heads(head_count),
          row0(first_row),
          rows(std::min(kRows, s.rows - first_row)) {}

    int64_t lanes() const { return heads * rows; }
    int64_t key_head() const { return head / (problem.heads / problem.key_heads); }
    int64_t head_of(int64_t lane) const { return head + lane / rows; }
    int64_t row_of(int64_t lane) const { return sequence.row0 + row0 + lane % rows; }  // in the tensors
    int64_t position_of(int64_t lane) const { return row0 + lane % rows + sequence.offset; }
    // Where a tensor (B, H, Q, ...) has a lane's row.
    char* at(const Array& array, int64_t lane, int64_t n = 0) const {
        return array.at(sequence.batch, head_of(lane), row_of(lane), n);
    }
};

// `count` rows of key_features (B, K, F).
template <class T>
void load_features(const Task& task, int64_t key0, int64_t count, T* rows) {
    const Array& from = task.problem.key_features;
    const int64_t width = task.problem.features;
    for (int64_t k = 0; k < count; ++k) {
        load_strided(rows + k * width, from.at(task.sequence.batch, task.sequence.key0 + key0 + k), from.dtype,
                     from.stride[2], width);
    }
}

// `count` of key_tags (T, B, K).
inline void load_key_tags(const Task& task, int64_t tag, int64_t key0, int64_t count, int32_t* tags) {
    const Array& from = task.problem.key_tags;
    const char* first = from.at(tag, task.sequence.batch, task.sequence.key0 + key0);
    const int64_t step = from.stride[2] * item_size(from.dtype);
    for (int64_t k = 0; k < count; ++k) tags[k] = read<int32_t>(first + k * step);
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
