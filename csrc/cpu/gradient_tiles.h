// The product of a backward whose sum runs over lanes: what each key gets from the rows of a task.
// Invariant: terms are added in rising order, whatever the tile.
#pragma once

#include <utility>

#include "cpu/tile_registers.h"
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

// to += left right for rows begin .. keys - 1 of `left` and `vectors` vectors of columns of `right`. terms(k0, k1)
// gives the range of words r that can be other than zero for keys k0 .. k1 - 1.
template <class Step, class Terms>
void add_product(Matrix<const typename Step::Word> left, int64_t keys, Matrix<const typename Step::Word> right,
                 int vectors, Terms terms, Matrix<typename Step::T> to, int64_t begin = 0) {
    using L = typename Step::L;
    const int tiles = (vectors + L::kTileVectors - 1) / L::kTileVectors;
    for (int i = 0; i < tiles; ++i) {  // of even size, as in accumulate_values
        const int first = i * vectors / tiles, next = (i + 1) * vectors / tiles;
        with_constant<L::kTileVectors>(next - first, [&](auto tile_vectors) {
            for (int64_t k = begin; k < keys; k += L::kTileKeys) {
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

// The same of pairs, whole tiles of keys by tile registers where there are any: `left` and `right` have numbers in all
// kRows / 2 words then.
template <class T, class Terms>
void add_paired_product(Matrix<const uint32_t> left, int64_t keys, Matrix<const uint32_t> right, int vectors,
                        Terms terms, Matrix<T> to) {
    int64_t whole = 0;
    if constexpr (kHasTiles) {
        whole = keys / kTile * kTile;
        const auto bytes = [](auto* data, int64_t stride) {
            using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>, const char, char>;
            return ByteRows<Byte>{reinterpret_cast<Byte*>(data), stride * 4};
        };
        for (int64_t k = 0; k < whole; k += 2 * kTile) {
            const int64_t count = std::min(2 * kTile, whole - k);
            const std::pair<int64_t, int64_t> range = terms(k, k + count);
            const int64_t from = range.first / kTile, next = (range.second + kTile - 1) / kTile;
            if (range.second <= range.first) continue;
            multiply_tiles(bytes(left.data, left.stride).at(k, from * kTile), count / kTile,
                           bytes(right.data, right.stride).at(from * kTile, 0), vectors, next - from,
                           bytes(to.data, to.stride).at(k, 0), true);
        }
    }
    add_product<Pairs<T>>(left, keys, right, vectors, terms, to, whole);
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
