// The two matrix products on register tiles. Lanes are query rows throughout: queries are packed transposed
// once per task, while keys and values are read as they lie, one element broadcast to all rows.
//
// The tiles are not inlined: what callers keep in registers would push accumulators out of them.
//
//   kRows   query rows of a task; every [n][kRows] array below has this row stride
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/simd.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kRows = 64;

// Keys between two rescalings: their scores stay in the second-level cache. Top-k selects the better the more there
// are. Whole tiles of keys fill a block.
#if defined(ATTNCAP_AMX)
constexpr int64_t kBlockBytes = 528 << 10;
#elif defined(ATTNCAP_AVX512)
constexpr int64_t kBlockBytes = 516 << 10;
#else
constexpr int64_t kBlockBytes = 144 << 10;
#endif
template <class T>
constexpr int64_t kBlockKeys = kBlockBytes / (kRows * int64_t(sizeof(T)));

// `count` rounded up to whole vectors.
template <class T>
constexpr int64_t whole_vectors(int64_t count) {
    return (count + Lanes<T>::kWidth - 1) / Lanes<T>::kWidth * Lanes<T>::kWidth;
}

// [kWidth][words] rows, `stride` bytes apart and readable up to the next multiple of kWidth words, to [words][kRows];
// numbers of T are multiplied by `scale` on the way.
template <class Step>
void transpose_in(const char* rows, int64_t stride, int64_t words, typename Step::T scale,
                  typename Step::Word* columns) {
    using L = typename Step::L;
    static_assert(sizeof(typename Step::Word) == sizeof(typename Step::T), "words move as lanes of T");
    for (int64_t d = 0; d < words; d += L::kWidth) {
        typename L::V square[L::kWidth];
        for (int i = 0; i < L::kWidth; ++i) {
            square[i] = L::load(reinterpret_cast<const typename Step::T*>(rows + i * stride) + d);
        }
        L::transpose(square);
        for (int i = 0; i < L::kWidth; ++i) {
            if constexpr (!Step::kScalesSums) square[i] = square[i] * L::all(scale);
            L::store(reinterpret_cast<typename Step::T*>(columns) + (d + i) * kRows, square[i]);
        }
    }
}

// [dim][kRows] columns times each row's factor (hidden rows become 0) to [kWidth][dim] rows, `stride` apart and
// writable up to the next multiple of kWidth.
template <class T>
void transpose_out(const T* columns, int64_t dim, typename Lanes<T>::V factor, typename Lanes<T>::M hidden, T* rows,
                   int64_t stride) {
    using L = Lanes<T>;
    for (int64_t d = 0; d < dim; d += L::kWidth) {
        typename L::V square[L::kWidth];
        for (int i = 0; i < L::kWidth; ++i) {
            square[i] = L::select(hidden, L::all(0), L::load(columns + (d + i) * kRows) * factor);
        }
        L::transpose(square);
        for (int i = 0; i < L::kWidth; ++i) L::store(rows + i * stride + d, square[i]);
    }
}

// scores[key][row] = sum_d keys[key][d] * query[d][row], times scale where that is Step's way, for `Keys` keys and
// `Vectors` vectors of rows; `largest` gets each row's largest of these while they are in registers.
template <class Step, int Vectors, int Keys>
[[gnu::noinline]] void score_tile(const typename Step::Word* query, const char* keys, int64_t key_stride, int64_t words,
                                  typename Step::T scale, typename Step::T* scores, typename Step::T* largest) {
    using L = typename Step::L;
    using Word = typename Step::Word;
    typename L::V sum[Keys][Vectors];
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[k][v] = L::all(0);
    }
    for (int64_t d = 0; d < words; ++d) {
        typename Step::V rows[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) rows[v] = Step::load(query + d * kRows + v * L::kWidth);
#pragma GCC unroll 8
        for (int k = 0; k < Keys; ++k) {
            Word word;
            std::memcpy(&word, keys + k * key_stride + d * int64_t(sizeof(Word)), sizeof word);
            const auto key = Step::all(word);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[k][v] = Step::add_product(key, rows[v], sum[k][v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
        auto best = L::all(typename Step::T(-INFINITY));
#pragma GCC unroll 8
        for (int k = 0; k < Keys; ++k) {
            const auto score = Step::kScalesSums ? sum[k][v] * L::all(scale) : sum[k][v];
            L::store(scores + k * kRows + v * L::kWidth, score);
            best = L::max(best, score);
        }
        L::store(largest + v * L::kWidth, best);
    }
}

// largest[tile][row] of the tiles of kTileKeys keys that hold keys first .. last - 1 of `scores`, which has `count`
// keys.
template <class T>
void tile_maxima(const T* scores, int64_t first, int64_t last, int64_t count, int vectors, T* largest) {
    using L = Lanes<T>;
    for (int64_t key = first / L::kTileKeys * L::kTileKeys; key < last; key += L::kTileKeys) {
        const int64_t end = std::min<int64_t>(count, key + L::kTileKeys);
        for (int v = 0; v < vectors; ++v) {
            auto best = L::load(scores + key * kRows + v * L::kWidth);
            for (int64_t k = key + 1; k < end; ++k) best = L::max(best, L::load(scores + k * kRows + v * L::kWidth));
            L::store(largest + key / L::kTileKeys * kRows + v * L::kWidth, best);
        }
    }
}

// scores = sums * scale of `Keys` keys and vectors first .. last - 1 of rows, the others -inf; `largest` as above.
template <class T, int Keys>
void scale_tile(const T* sums, int first, int last, int vectors, T scale, T* scores, T* largest) {
    using L = Lanes<T>;
    for (int v = 0; v < vectors; ++v) {
        const bool active = first <= v && v < last;
        auto best = L::all(T(-INFINITY));
#pragma GCC unroll 8
        for (int k = 0; k < Keys; ++k) {
            const int64_t at = k * kRows + v * L::kWidth;
            const auto score = active ? L::load(sums + at) * L::all(scale) : L::all(T(-INFINITY));
            L::store(scores + at, score);
            best = L::max(best, score);
        }
        L::store(largest + v * L::kWidth, best);
    }
}

// out[d][row] = out[d][row] * decay[row] + sum_k values[k][d] * prob[k][row] for `Dims` dims and `Vectors` vectors;
// the stride of values is in words.
template <class Step, int Vectors, int Dims>
[[gnu::noinline]] void value_tile(const typename Step::Word* prob, const typename Step::Word* values,
                                  int64_t value_stride, int64_t keys, const typename Step::T* decay,
                                  typename Step::T* out) {
    using L = typename Step::L;
    typename L::V sum[Dims][Vectors];
#pragma GCC unroll 8
    for (int d = 0; d < Dims; ++d) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            sum[d][v] = L::load(out + d * kRows + v * L::kWidth) * L::load(decay + v * L::kWidth);
        }
    }
    for (int64_t k = 0; k < keys; ++k) {
        typename Step::V rows[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) rows[v] = Step::load(prob + k * kRows + v * L::kWidth);
#pragma GCC unroll 8
        for (int d = 0; d < Dims; ++d) {
            const auto value = Step::all(values[k * value_stride + d]);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[d][v] = Step::add_product(value, rows[v], sum[d][v]);
        }
    }
#pragma GCC unroll 8
    for (int d = 0; d < Dims; ++d) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) L::store(out + d * kRows + v * L::kWidth, sum[d][v]);
    }
}

// Calls body(std::integral_constant<int, n>) for an n in 1 .. Most.
template <int Most, class Body>
inline void with_constant(int n, Body&& body) {
    if constexpr (Most >= 1) {
        if (n == Most) {
            body(std::integral_constant<int, Most>{});
        } else {
            with_constant<Most - 1>(n, body);
        }
    }
}

// Scores of `count` <= kTileKeys keys for vectors first .. last - 1 of rows; strides of keys are in bytes.
template <class Step>
void score_rows(const typename Step::Word* query, const char* keys, int64_t key_stride, int64_t words, int count,
                int first, int last, typename Step::T scale, typename Step::T* scores, typename Step::T* largest) {
    using L = typename Step::L;
    with_constant<L::kTileKeys>(count, [&](auto tile) {
        for (int v = first; v < last; v += L::kTileVectors) {
            with_constant<L::kTileVectors>(std::min(L::kTileVectors, last - v), [&](auto vectors) {
                const int64_t shift = v * L::kWidth;
                score_tile<Step, decltype(vectors)::value, decltype(tile)::value>(
                    query + shift, keys, key_stride, words, scale, scores + shift, largest + shift);
            });
        }
    });
}

// out = out * decay + prob^T values, for all `dims` columns of `keys` words of values.
template <class Step>
void accumulate_values(const typename Step::Word* prob, const typename Step::Word* values, int64_t value_stride,
                       int64_t keys, int64_t dims, int vectors, const typename Step::T* decay, typename Step::T* out) {
    using L = typename Step::L;
    for (int v = 0; v < vectors; v += L::kTileVectors) {
        with_constant<L::kTileVectors>(std::min(L::kTileVectors, vectors - v), [&](auto tile_vectors) {
            const int64_t shift = v * L::kWidth;
            const int64_t tiles = (dims + L::kTileKeys - 1) / L::kTileKeys;
            for (int64_t i = 0; i < tiles; ++i) {  // of even size: a narrow one would wait for its loads
                const int64_t d = i * dims / tiles, next = (i + 1) * dims / tiles;
                with_constant<L::kTileKeys>(int(next - d), [&](auto tile) {
                    value_tile<Step, decltype(tile_vectors)::value, decltype(tile)::value>(
                        prob + shift, values + d, value_stride, keys, decay + shift, out + d * kRows + shift);
                });
            }
        });
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
