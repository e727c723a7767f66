// The two matrix products for a task of very few rows (decoding), where lanes of rows would stay empty: here lanes
// run along the head dim, every key and value is read once, as it is stored, and memory is what limits.
//
// Scores and outputs are those of tiles.h, [key][kRows] and [dim][kRows]; lanes past the rows hold -inf.
#pragma once

#include "cpu/convert.h"
#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kNarrowRows = 4;
// Keys whose exponentials meet their values at a time: a line each, far apart, in the first-level cache.
constexpr int64_t kNarrowKeys = 128;

// What is read is asked for this many keys before: hardware alone foresees too little of such short rows.
constexpr int64_t kFetchAhead = 32;

inline void fetch(const char* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

// scores[row][i] of keys 0 .. last for `Rows` query rows, kWidth keys a row, of which those past the last repeat it.
// `query` is [Rows][dim]; rows of keys are `stride` bytes apart.
template <class T, class Stored, int Rows>
inline void dots(const T* query, const char* keys, int64_t stride, int64_t last, int64_t dim,
                 T (&scores)[Rows][Lanes<T>::kWidth]) {
    using L = Lanes<T>;
    const int64_t whole = dim / L::kWidth * L::kWidth;
    typename L::V sums[Rows][L::kWidth];
    for (int i = 0; i < L::kWidth; ++i) {
        const char* key = keys + std::min<int64_t>(i, last) * stride;
        fetch(key + kFetchAhead * stride, dim * Stored::kBytes);
        typename L::V sum[Rows];
        for (auto& one : sum) one = L::all(0);
        for (int64_t d = 0; d < whole; d += L::kWidth) {
            const auto here = Stored::load_lanes(key + d * Stored::kBytes);
#pragma GCC unroll 4
            for (int row = 0; row < Rows; ++row) sum[row] = L::fma(L::load(query + row * dim + d), here, sum[row]);
        }
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) sums[row][i] = sum[row];
    }
    for (int row = 0; row < Rows; ++row) {
        L::store(scores[row], L::sum_each(sums[row]));
        for (int64_t d = whole; d < dim; ++d) {
            for (int64_t i = 0; i <= last; ++i) {
                scores[row][i] += query[row * dim + d] * Stored::load(keys + i * stride + d * Stored::kBytes);
            }
        }
    }
}

// `query` is [rows][dim].
template <class T, class Stored>
void narrow_scores(const T* query, int64_t rows, const char* keys, int64_t stride, int64_t dim, int64_t count, T scale,
                   T* scores) {
    using L = Lanes<T>;
    with_constant<kNarrowRows>(int(rows), [&](auto some_rows) {
        constexpr int kSome = decltype(some_rows)::value;
        for (int64_t k = 0; k < count; k += L::kWidth) {
            const int64_t some = std::min<int64_t>(L::kWidth, count - k);
            T lanes[kSome][L::kWidth];
            dots<T, Stored, kSome>(query, keys + k * stride, stride, some - 1, dim, lanes);
            for (int first = 0; first < kSome; first += L::kWidth) {
                typename L::V square[L::kWidth];
                for (int i = 0; i < L::kWidth; ++i) {
                    const bool there = first + i < kSome;
                    square[i] = there ? L::all(scale) * L::load(lanes[there ? first + i : 0]) : L::all(T(-INFINITY));
                }
                L::transpose(square);
                for (int64_t i = 0; i < some; ++i) L::store(scores + (k + i) * kRows + first, square[i]);
            }
        }
    });
}

// out = out * decay + prob^T values for Vectors * kWidth dims; the first tile fetches `fetched` bytes of later rows.
template <class T, class Stored, int Rows, int Vectors>
void narrow_value_tile(const T* prob, const char* values, int64_t stride, int64_t keys, int64_t fetched, const T* decay,
                       T* out) {
    using L = Lanes<T>;
    typename L::V sum[Rows][Vectors];
    for (auto& row : sum) {
        for (auto& one : row) one = L::all(0);
    }
    for (int64_t k = 0; k < keys; ++k) {
        fetch(values + (k + kFetchAhead) * stride, fetched);
        typename L::V value[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            value[v] = Stored::load_lanes(values + k * stride + v * L::kWidth * Stored::kBytes);
        }
#pragma GCC unroll 4
        for (int row = 0; row < Rows; ++row) {
            const auto p = L::all(prob[k * kRows + row]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sum[row][v] = L::fma(p, value[v], sum[row][v]);
        }
    }
    for (int row = 0; row < Rows; ++row) {
        T lanes[Vectors * L::kWidth];
        for (int v = 0; v < Vectors; ++v) L::store(lanes + v * L::kWidth, sum[row][v]);
        for (int i = 0; i < Vectors * L::kWidth; ++i) {
            T& here = out[i * kRows + row];
            here = here * decay[row] + lanes[i];
        }
    }
}

// out = out * decay + prob^T values; rows of values are `stride` bytes apart.
template <class T, class Stored>
void narrow_values(const T* prob, const char* values, int64_t stride, int64_t keys, int64_t dims, int64_t rows,
                   const T* decay, T* out) {
    constexpr int kVectors = sizeof(typename Lanes<T>::V) == 64 ? 4 : 2;
    constexpr int64_t kWidth = Lanes<T>::kWidth;
    with_constant<kNarrowRows>(int(rows), [&](auto some) {
        constexpr int kSome = decltype(some)::value;
        int64_t d = 0;
        auto tile = [&](auto vectors) {
            constexpr int kTile = decltype(vectors)::value;
            for (; d + kTile * kWidth <= dims; d += kTile * kWidth) {
                narrow_value_tile<T, Stored, kSome, kTile>(prob, values + d * Stored::kBytes, stride, keys,
                                                           d == 0 ? dims * Stored::kBytes : 0, decay, out + d * kRows);
            }
        };
        tile(std::integral_constant<int, kVectors>{});
        tile(std::integral_constant<int, 1>{});
        for (; d < dims; ++d) {
            for (int64_t row = 0; row < rows; ++row) {
                T sum = 0;
                for (int64_t k = 0; k < keys; ++k) {
                    sum += prob[k * kRows + row] * Stored::load(values + k * stride + d * Stored::kBytes);
                }
                out[d * kRows + row] = out[d * kRows + row] * decay[row] + sum;
            }
        }
    });
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
