// The memory of one thread, taken once per call: it grows with the head dims and the statistics asked for, and with
// the number of keys only where exponentials are kept for received_mass: those of lanes of rows the caller bounds,
// those of few rows are kNarrowRows lines.
#pragma once

#include "cpu/arena.h"
#include "cpu/paired_values.h"
#include "cpu/softmax.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
int64_t block_count(int64_t keys) {
    return (keys + kBlockKeys<T> - 1) / kBlockKeys<T>;
}

template <class T>
struct Workspace {
    using Int = typename Lanes<T>::Int;
    T *query, *keys, *values, *features, *scores, *out, *feature_out, *largest, *block_max, *block_shift, *kept, *lines,
        *line_out, *line_features;
    int64_t line;  // numbers from one of the lines to the next, see line_block.h
    T *factor, *row, *ones, *staging, *paired_prob;
    TurnedValues<T> turned;
    bool counted[kRows] = {}, all_counted = false;
    int32_t* key_tags;
    RowState<T> state;

    // `kept_keys` > 0 keeps the exponentials of that many keys.
    Workspace(const Problem& problem, int64_t most_keys, int64_t kept_keys) {
        arena_.lay_out([&] { layout(problem, most_keys, kept_keys); });
        state.top.k = problem.topk;
        fill(ones, 1, 1);
        for (int64_t k = 0; problem.distance && k < std::min(kBlockKeys<T>, most_keys); ++k) state.apart[k] = T(k);
    }

    ProductMemory<T> of_scores() const { return {query, staging, keys}; }

    void clear_state(const Problem& problem) {
        for (T* sum : {state.mass, state.weighted, state.squares, state.moved, state.sink, state.diagonal})
            fill(sum, 1, 0);
        fill(state.max, 1, T(-INFINITY));
        fill(state.tags, problem.tags, 0);
        fill(state.offset_score, int64_t(problem.offsets.size()), T(-INFINITY));
        fill(out, problem.value_dim, 0);
        fill(feature_out, problem.features, 0);
        state.top.clear();
    }

  private:
    Arena arena_;

    static void fill(T* array, int64_t count, T value) { std::fill(array, array + count * kRows, value); }

    template <class Item>
    void take(Item** array, int64_t count) {
        arena_.take(array, count);
    }

    void layout(const Problem& problem, int64_t most_keys, int64_t kept_keys) {
        const int64_t tags = problem.tags, offsets = int64_t(problem.offsets.size());
        // Short sequences need less than a block: what a call takes, it also has to touch for the first time.
        const int64_t block_keys = std::min(kBlockKeys<T>, most_keys);
        const int64_t block_tiles = (block_keys + Lanes<T>::kTileKeys - 1) / Lanes<T>::kTileKeys;
        // Rounded up to whole vectors, so that square transposes need no edges.
        const int64_t key_dim = whole_vectors<T>(problem.key_dim), value_dim = whole_vectors<T>(problem.value_dim);
        take(&query, key_dim * kRows);
        take(&paired_prob,
             kHasPairs && sizeof(T) == 4 ? whole_steps<T>(std::min(kConvertValues, block_keys)) / 2 * kRows : 0);
        take(&staging, std::max(key_dim, value_dim) * Lanes<T>::kWidth);
        take(&keys, key_dim * kConvertKeys);
        take(&values, value_dim * kConvertValues);
        take(&features, problem.features * kConvertValues);
        take(&scores, block_keys * kRows);
        if (MatrixTiles<T>::kHere && problem.value.dtype == DType::bfloat16) turned.take(&arena_, most_keys, value_dim);
        take(&out, value_dim * kRows);
        take(&feature_out, problem.features * kRows);
        take(&largest, block_tiles * kRows);
        take(&block_max, kRows);
        take(&block_shift, problem.received ? block_count<T>(most_keys) * kRows : 0);
        take(&kept, kept_keys * kRows);
        line = whole_vectors<T>(problem.received ? most_keys : block_keys) + Lanes<T>::kWidth;
        take(&lines, line * kNarrowRows);
        take(&line_out, value_dim * kNarrowRows);
        take(&line_features, whole_vectors<T>(problem.features) * kNarrowRows);
        take(&factor, kRows);
        take(&row, kRows);
        take(&ones, kRows);
        take(&key_tags, block_keys);
        for (T** sum : {&state.max, &state.mass, &state.weighted, &state.squares, &state.moved, &state.sink,
                        &state.diagonal, &state.decay, &state.shift}) {
            take(sum, kRows);
        }
        take(&state.apart, problem.distance ? block_keys : 0);
        take(&state.tags, tags * kRows);
        take(&state.offset_score, offsets * kRows);
        take(&state.position, kRows);
        take(&state.query_tags, tags * kRows);
        take(&state.top.score, problem.topk * kRows);
        take(&state.top.key, problem.topk * kRows);
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
