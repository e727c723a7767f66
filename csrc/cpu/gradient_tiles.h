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

// to[k][lane] += sum of left[k][r] * right[r][lane] over `terms` words r, for `Keys` k and `Vectors` vectors of lanes.
template <class Step, int Vectors, int Keys>
[[gnu::noinline]] void sum_tile(Matrix<const typename Step::Word> left, Matrix<const typename Step::Word> right,
                                int64_t terms, Matrix<typename Step::T> to) {
    using L = typename Step::L;
    typename L::V sum[Keys][Vectors];
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) sum[k][v] = L::load(to.data + k * to.stride + v * L::kWidth);
    }
    for (int64_t r = 0; r < terms; ++r) {
        typename Step::V row[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) row[v] = Step::load(right.data + r * right.stride + v * L::kWidth);
#pragma GCC unroll 8
        for (int k = 0; k < Keys; ++k) {
            const auto factor = Step::all(left.data[k * left.stride + r]);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sum[k][v] = Step::add_product(factor, row[v], sum[k][v]);
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < Keys; ++k) {
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) L::store(to.data + k * to.stride + v * L::kWidth, sum[k][v]);
    }
}

// to += left right for `keys` rows of `left` and `vectors` vectors of columns of `right`. terms(k0, k1)
// gives the range of words r that can be other than zero for keys k0 .. k1 - 1.
template <class Step, class Terms>
void add_product(Matrix<const typename Step::Word> left, int64_t keys, Matrix<const typename Step::Word> right,
                 int vectors, Terms terms, Matrix<typename Step::T> to) {
    using L = typename Step::L;
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
                    sum_tile<Step, decltype(tile_vectors)::value, decltype(tile_keys)::value>(
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
