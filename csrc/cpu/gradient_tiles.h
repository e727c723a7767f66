// The product of a backward whose sum runs over lanes: what each key gets from the rows of a task.
// Invariant: terms are added in rising order, whatever the tile.
#pragma once

#include <utility>

#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

// A matrix in memory: rows `stride` numbers apart.
template <class T>
struct Matrix {
    T* data;
    int64_t stride;
};

// to[k][lane] += sum of left[k][r] * right[r][lane] over `terms` r, for `Keys` k and `Vectors` vectors of lanes.
template <class T, int Vectors, int Keys>
[[gnu::noinline]] void sum_tile(Matrix<const T> left, Matrix<const T> right, int64_t terms, Matrix<T> to) {
    using L = Lanes<T>;
    typename L::V sum[Keys][Vectors];
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[k][v] = L::load(to.data + k * to.stride + v * L::kWidth);
    }
    for (int64_t r = 0; r < terms; ++r) {
        typename L::V row[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) row[v] = L::load(right.data + r * right.stride + v * L::kWidth);
#pragma GCC unroll 8
        for (int k = 0; k < Keys; ++k) {
            const auto factor = L::all(left.data[k * left.stride + r]);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[k][v] = L::fma(factor, row[v], sum[k][v]);
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) L::store(to.data + k * to.stride + v * L::kWidth, sum[k][v]);
    }
}

// to += left right for `keys` rows of `left` and `vectors` vectors of columns of `right`. terms(k0, k1) gives the range
// of r that can be other than zero for keys k0 .. k1 - 1.
template <class T, class Terms>
void add_product(Matrix<const T> left, int64_t keys, Matrix<const T> right, int vectors, Terms terms, Matrix<T> to) {
    using L = Lanes<T>;
    const int tiles = (vectors + L::kTileVectors - 1) / L::kTileVectors;
    for (int i = 0; i < tiles; ++i) {  // of even size, as in accumulate_values
        const int first = i * vectors / tiles, next = (i + 1) * vectors / tiles;
        with_constant<L::kTileVectors>(next - first, [&](auto tile_vectors) {
            for (int64_t k = 0; k < keys; k += L::kTileKeys) {
                const int64_t count = std::min<int64_t>(L::kTileKeys, keys - k), shift = first * L::kWidth;
                const std::pair<int64_t, int64_t> range = terms(k, k + count);
                const int64_t from = range.first, some = range.second - from;
                if (some <= 0) continue;
                with_constant<L::kTileKeys>(int(count), [&](auto tile_keys) {
                    sum_tile<T, decltype(tile_vectors)::value, decltype(tile_keys)::value>(
                        {left.data + k * left.stride + from, left.stride},
                        {right.data + from * right.stride + shift, right.stride}, some,
                        {to.data + k * to.stride + shift, to.stride});
                });
            }
        });
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
