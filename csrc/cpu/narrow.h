// The two matrix products for a task of very few rows (decoding), where lanes of rows would stay empty: here lanes
// run along the head dim, every key and value is read once, and memory is what limits.
//
// Scores and outputs are those of tiles.h, [key][kRows] and [dim][kRows]; lanes past the rows hold -inf.
#pragma once

#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kNarrowRows = 4;

template <class T>
inline T dot(const T* a, const T* b, int64_t dim) {
    using L = Lanes<T>;
    auto first = L::all(0), second = L::all(0);
    int64_t d = 0;
    for (; d + 2 * L::kWidth <= dim; d += 2 * L::kWidth) {
        first = L::fma(L::load(a + d), L::load(b + d), first);
        second = L::fma(L::load(a + d + L::kWidth), L::load(b + d + L::kWidth), second);
    }
    for (; d + L::kWidth <= dim; d += L::kWidth) first = L::fma(L::load(a + d), L::load(b + d), first);
    T total = L::sum(first + second);
    for (; d < dim; ++d) total += a[d] * b[d];
    return total;
}

// `query` is [rows][query_stride].
template <class T>
void narrow_scores(const T* query, int64_t query_stride, int64_t rows, const T* keys, int64_t key_stride, int64_t dim,
                   int64_t count, T scale, T* scores) {
    for (int64_t k = 0; k < count; ++k) {
        Lanes<T>::store(scores + k * kRows, Lanes<T>::all(T(-INFINITY)));
        for (int64_t row = 0; row < rows; ++row) {
            scores[k * kRows + row] = scale * dot(query + row * query_stride, keys + k * key_stride, dim);
        }
    }
}

// out = out * decay + prob^T values
template <class T>
void narrow_values(const T* prob, const T* values, int64_t value_stride, int64_t keys, int64_t dims, int64_t rows,
                   const T* decay, T* out) {
    using L = Lanes<T>;
    constexpr int kVectors = 4, kDims = kVectors * L::kWidth;
    for (int64_t row = 0; row < rows; ++row) {
        int64_t d = 0;
        for (; d + kDims <= dims; d += kDims) {
            typename L::V sum[kVectors];
            for (auto& one : sum) one = L::all(0);
            for (int64_t k = 0; k < keys; ++k) {
                const auto p = L::all(prob[k * kRows + row]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    sum[v] = L::fma(p, L::load(values + k * value_stride + d + v * L::kWidth), sum[v]);
                }
            }
            T lanes[kDims];
            for (int v = 0; v < kVectors; ++v) L::store(lanes + v * L::kWidth, sum[v]);
            for (int i = 0; i < kDims; ++i) {
                T& here = out[(d + i) * kRows + row];
                here = here * decay[row] + lanes[i];
            }
        }
        for (; d < dims; ++d) {
            T sum = 0;
            for (int64_t k = 0; k < keys; ++k) sum += prob[k * kRows + row] * values[k * value_stride + d];
            out[d * kRows + row] = out[d * kRows + row] * decay[row] + sum;
        }
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
