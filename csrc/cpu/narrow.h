// The two matrix products for a task of very few rows (decoding), where lanes of rows would stay empty: here lanes
// run along the head dim, every key and value is read once, as it is stored, and memory is what limits.
//
// Scores lie in lines: those of a row one after another, `line` numbers from one row to the next.
#pragma once

#include "cpu/convert.h"
#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kNarrowRows = 8;

// What is read is asked for this much before: hardware alone foresees too little of such short rows.
constexpr int64_t kFetchAhead = 8 << 10;

inline void fetch(const char* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + kFetchAhead + at);
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
        fetch(key, dim * Stored::kBytes);
        typename L::V sum[Rows];
        for (auto& one : sum) one = L::all(0);
        for (int64_t d = 0; d < whole; d += L::kWidth) {
            const auto here = Stored::load_lanes(key + d * Stored::kBytes);
#pragma GCC unroll 8
            for (int row = 0; row < Rows; ++row) sum[row] = L::fma(L::load(query + row * dim + d), here, sum[row]);
        }
#pragma GCC unroll 8
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

// scores[row][key] = scale <query, key> of `count` keys, written up to a whole vector; `query` is [rows][dim].
template <class T, class Stored>
void narrow_scores(const T* query, int64_t rows, const char* keys, int64_t stride, int64_t dim, int64_t count, T scale,
                   T* scores, int64_t line) {
    using L = Lanes<T>;
    with_constant<kNarrowRows>(int(rows), [&](auto some_rows) {
        constexpr int kSome = decltype(some_rows)::value;
        for (int64_t k = 0; k < count; k += L::kWidth) {
            T lanes[kSome][L::kWidth];
            const int64_t some = std::min<int64_t>(L::kWidth, count - k);
            dots<T, Stored, kSome>(query, keys + k * stride, stride, some - 1, dim, lanes);
            for (int row = 0; row < kSome; ++row) {
                L::store(scores + row * line + k, L::all(scale) * L::load(lanes[row]));
            }
        }
    });
}

// Values that are read anew for every tile of dims stay in the first-level cache.
constexpr int64_t kNarrowValueBytes = kFetchAhead;

// Vectors of dims whose sums for so many rows fit the registers.
template <class T>
constexpr int narrow_vectors(int rows) {
    const int room = sizeof(typename Lanes<T>::V) == 64 ? 16 : 8;
    int vectors = 8;
    while (vectors * rows > room) vectors /= 2;
    return vectors;
}

// out[row] = out[row] * decay[row] + prob[row] values for Vectors * kWidth dims, `width` numbers from one row of out
// to the next. These few keys are summed by themselves: a long sum would round equal numbers all the same way.
template <class T, class Stored, int Rows, int Vectors>
void narrow_value_tile(const T* prob, int64_t line, const char* values, int64_t stride, int64_t keys, const T* decay,
                       T* out, int64_t width) {
    using L = Lanes<T>;
    typename L::V sum[Rows][Vectors];
    for (auto& row : sum) {
        for (auto& one : row) one = L::all(0);
    }
    for (int64_t k = 0; k < keys; ++k) {
        const char* from = values + k * stride;
        fetch(from, Vectors * L::kWidth * Stored::kBytes);
        typename L::V value[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) value[v] = Stored::load_lanes(from + v * L::kWidth * Stored::kBytes);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            const auto p = L::all(prob[row * line + k]);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[row][v] = L::fma(p, value[v], sum[row][v]);
        }
    }
    for (int row = 0; row < Rows; ++row) {
        for (int v = 0; v < Vectors; ++v) {
            T* here = out + row * width + v * L::kWidth;
            L::store(here, L::fma(L::load(here), L::all(decay[row]), sum[row][v]));
        }
    }
}

// out = out * decay + prob values, for rows of values `stride` bytes apart.
template <class T, class Stored, int Rows>
void narrow_values_of(const T* prob, int64_t line, const char* values, int64_t stride, int64_t keys, int64_t dims,
                      const T* decay, T* out, int64_t width) {
    constexpr int64_t kWidth = Lanes<T>::kWidth;
    int64_t d = 0;
    auto tiles = [&](auto vectors) {
        constexpr int kTile = decltype(vectors)::value;
        if constexpr (kTile <= narrow_vectors<T>(Rows)) {
            for (; d + kTile * kWidth <= dims; d += kTile * kWidth) {
                narrow_value_tile<T, Stored, Rows, kTile>(prob, line, values + d * Stored::kBytes, stride, keys, decay,
                                                          out + d, width);
            }
        }
    };
    tiles(std::integral_constant<int, 8>{});
    tiles(std::integral_constant<int, 4>{});
    tiles(std::integral_constant<int, 2>{});
    tiles(std::integral_constant<int, 1>{});
    for (; d < dims; ++d) {
        for (int row = 0; row < Rows; ++row) {
            T sum = 0;
            for (int64_t k = 0; k < keys; ++k) {
                sum += prob[row * line + k] * Stored::load(values + k * stride + d * Stored::kBytes);
            }
            out[row * width + d] = out[row * width + d] * decay[row] + sum;
        }
    }
}

template <class T, class Stored>
void narrow_values(const T* prob, int64_t line, const char* values, int64_t stride, int64_t keys, int64_t dims,
                   int64_t rows, const T* decay, T* out, int64_t width) {
    T ones[kNarrowRows];
    std::fill(ones, ones + kNarrowRows, T(1));
    with_constant<kNarrowRows>(int(rows), [&](auto some) {
        constexpr int kSome = decltype(some)::value;
        const int64_t together = std::max<int64_t>(8, kNarrowValueBytes / std::max<int64_t>(1, dims * Stored::kBytes));
        for (int64_t k = 0; k < keys; k += together) {
            narrow_values_of<T, Stored, kSome>(prob + k, line, values + k * stride, stride,
                                               std::min(together, keys - k), dims, k == 0 ? decay : ones, out, width);
        }
    });
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
