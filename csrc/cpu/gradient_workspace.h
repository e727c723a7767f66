// The memory of one thread of a backward, taken once per call: it grows with the head dims and the statistics, never
// with the numbers of rows and keys.
#pragma once

#include "cpu/arena.h"
#include "cpu/row_product.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Keys whose map is in memory at once; it stays in the second-level cache with what it is made of.
constexpr int64_t kMapKeys = 192;

// The derivatives that arrive at the rows of a task, a lane each; 0 in lanes that have none.
template <class T>
struct ArrivedRows {
    T *entropy, *collision, *distance, *sink, *diagonal, *max;  // [kRows]
    T *offsets, *tags, *topk, *features;                        // [n][kRows]
    T* counted;                                                 // [kRows] 1 where a row's statistics count, else 0
    int32_t *query_tags, *topk_key;                             // [n][kRows]
};

// A map's numbers rounded to bfloat16, two of them a word.
struct PairedMaps {
    uint32_t *prob, *slope;   // [kMapKeys][kRows / 2] of neighbouring rows
    uint32_t* slope_of_keys;  // [kMapKeys / 2][kRows] of neighbouring keys
};

template <class T>
struct GradientWorkspace {
    using Int = typename Lanes<T>::Int;
    T *query_packed, *out_packed, *staging, *converted;  // see ProductMemory
    T *query_rows, *out_rows, *feature_rows;             // [kRows][whole vectors]
    T *keys, *features;                                  // [kMapKeys][dim]
    T *prob, *slope, *capped, *largest;                  // [kMapKeys][kRows]
    T* query_sum;                                        // [dim][kRows]
    PairedMaps paired;
    T *received, *mask_sum;             // [kMapKeys], [kRows]
    T *lse, *level, *null_term, *ones;  // [kRows]
    Int *position, *first_key;          // [kRows]
    int32_t* key_tags;                  // [kMapKeys]
    T* sums;                            // of a task that has a key head alone
    ArrivedRows<T> arrived;

    // `sums_room` is that of the sums.
    GradientWorkspace(const Problem& problem, int64_t sums_room) {
        arena_.lay_out([&] { layout(problem, sums_room); });
        std::fill(ones, ones + kRows, T(1));
        std::fill(feature_rows, feature_rows + whole_vectors<T>(problem.features) * kRows, T(0));
    }

    ProductMemory<T> of_scores() const { return {query_packed, staging, converted}; }
    ProductMemory<T> of_slopes() const { return {out_packed, staging, converted}; }

  private:
    Arena arena_;

    template <class Item>
    void take(Item** array, int64_t count) {
        arena_.take(array, count);
    }

    void layout(const Problem& p, int64_t sums_room) {
        const int64_t key_dim = whole_vectors<T>(p.key_dim), value_dim = whole_vectors<T>(p.value_dim);
        const int64_t most_dim = std::max(key_dim, value_dim), offsets = int64_t(p.offsets.size());
        take(&sums, sums_room);
        take(&query_packed, key_dim * kRows);
        take(&out_packed, value_dim * kRows);
        take(&staging, most_dim * Lanes<T>::kWidth);
        take(&converted, most_dim * kConvertKeys);
        take(&query_rows, key_dim * kRows);
        take(&out_rows, value_dim * kRows);
        take(&feature_rows, whole_vectors<T>(p.features) * kRows);
        take(&keys, p.key_dim * kMapKeys);
        take(&features, p.features * kMapKeys);
        take(&prob, kMapKeys * kRows);
        take(&slope, kMapKeys * kRows);
        take(&capped, p.softcap != 0 ? kMapKeys * kRows : 0);
        take(&largest, (kMapKeys / Lanes<T>::kTileKeys + 1) * kRows);
        take(&query_sum, key_dim * kRows);
        const int64_t pairs =
            kHasPairs && sizeof(T) == 4 && p.query.dtype == DType::bfloat16 ? kMapKeys * kRows / 2 : 0;
        for (uint32_t** map : {&paired.prob, &paired.slope, &paired.slope_of_keys}) take(map, pairs);
        take(&received, kMapKeys);
        take(&key_tags, kMapKeys);
        ArrivedRows<T>& a = arrived;
        for (T** rows : {&mask_sum, &lse, &level, &null_term, &ones, &a.entropy, &a.collision, &a.distance, &a.sink,
                         &a.diagonal, &a.max, &a.counted}) {
            take(rows, kRows);
        }
        for (Int** rows : {&position, &first_key}) take(rows, kRows);
        take(&a.offsets, offsets * kRows);
        take(&a.tags, p.tags * kRows);
        take(&a.query_tags, p.tags * kRows);
        take(&a.topk, p.topk * kRows);
        take(&a.topk_key, p.topk * kRows);
        take(&a.features, p.features * kRows);
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
