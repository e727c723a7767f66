// The two matrix products on register tiles. Lanes are query rows throughout: queries are packed transposed
// once per task, while keys and values are read as they lie, one element broadcast to all rows.
//
//   kRows   query rows of a task; every [n][kRows] array below has this row stride
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/simd.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kRows = 64;

// [kWidth][dim] rows, `stride` apart and readable up to the next multiple of kWidth, times `factor`, to [dim][kRows].
template <class T>
void transpose_in(const T* rows, int64_t stride, int64_t dim, T factor, T* columns) {
    using L = Lanes<T>;
    for (int64_t d = 0; d < dim; d += L::kWidth) {
        typename L::V square[L::kWidth];
        for (int i = 0; i < L::kWidth; ++i) square[i] = L::load(rows + i * stride + d);
        L::transpose(square);
        for (int i = 0; i < L::kWidth; ++i) L::store(columns + (d + i) * kRows, square[i] * L::all(factor));
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

// scores[key][row] = sum_d keys[key][d] * query[d][row] for `Keys` keys and `Vectors` vectors of rows.
template <class T, int Vectors, int Keys>
inline void score_tile(const T* query, const T* keys, int64_t key_stride, int64_t dim, T* scores) {
    using L = Lanes<T>;
    typename L::V sum[Keys][Vectors];
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[k][v] = L::all(0);
    }
    for (int64_t d = 0; d < dim; ++d) {
        typename L::V rows[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) rows[v] = L::load(query + d * kRows + v * L::kWidth);
#pragma GCC unroll 8
        for (int k = 0; k < Keys; ++k) {
            const auto key = L::all(keys[k * key_stride + d]);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[k][v] = L::fma(key, rows[v], sum[k][v]);
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) L::store(scores + k * kRows + v * L::kWidth, sum[k][v]);
    }
}

// out[d][row] = out[d][row] * decay[row] + sum_k values[k][d] * prob[k][row] for `Dims` dims and `Vectors` vectors.
template <class T, int Vectors, int Dims>
inline void value_tile(const T* prob, const T* values, int64_t value_stride, int64_t keys, const T* decay, T* out) {
    using L = Lanes<T>;
    typename L::V sum[Dims][Vectors];
#pragma GCC unroll 8
    for (int d = 0; d < Dims; ++d) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) {
            sum[d][v] = L::load(out + d * kRows + v * L::kWidth) * L::load(decay + v * L::kWidth);
        }
    }
    for (int64_t k = 0; k < keys; ++k) {
        typename L::V rows[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) rows[v] = L::load(prob + k * kRows + v * L::kWidth);
#pragma GCC unroll 8
        for (int d = 0; d < Dims; ++d) {
            const auto value = L::all(values[k * value_stride + d]);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[d][v] = L::fma(value, rows[v], sum[d][v]);
        }
    }
#pragma GCC unroll 8
    for (int d = 0; d < Dims; ++d) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) L::store(out + d * kRows + v * L::kWidth, sum[d][v]);
    }
}

// Calls body.template operator()<N>() for the N in 1 .. Most that equals n.
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

// Scores of keys 0 .. count - 1 for vectors first .. last - 1 of rows.
template <class T>
void score_rows(const T* query, const T* keys, int64_t key_stride, int64_t dim, int64_t count, int first, int last,
                T* scores) {
    using L = Lanes<T>;
    for (int v = first; v < last; v += L::kTileVectors) {
        with_constant<L::kTileVectors>(std::min(L::kTileVectors, last - v), [&](auto vectors) {
            const int64_t shift = v * L::kWidth;
            for (int64_t k = 0; k < count; k += L::kTileKeys) {
                with_constant<L::kTileKeys>(int(std::min<int64_t>(L::kTileKeys, count - k)), [&](auto tile) {
                    score_tile<T, decltype(vectors)::value, decltype(tile)::value>(
                        query + shift, keys + k * key_stride, key_stride, dim, scores + k * kRows + shift);
                });
            }
        });
    }
}

// out = out * decay + prob^T values, for all `dims` columns of `keys` values.
template <class T>
void accumulate_values(const T* prob, const T* values, int64_t value_stride, int64_t keys, int64_t dims, int vectors,
                       const T* decay, T* out) {
    using L = Lanes<T>;
    for (int v = 0; v < vectors; v += L::kTileVectors) {
        with_constant<L::kTileVectors>(std::min(L::kTileVectors, vectors - v), [&](auto tile_vectors) {
            const int64_t shift = v * L::kWidth;
            for (int64_t d = 0; d < dims; d += L::kTileKeys) {
                with_constant<L::kTileKeys>(int(std::min<int64_t>(L::kTileKeys, dims - d)), [&](auto tile) {
                    value_tile<T, decltype(tile_vectors)::value, decltype(tile)::value>(
                        prob + shift, values + d, value_stride, keys, decay + shift, out + d * kRows + shift);
                });
            }
        });
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
