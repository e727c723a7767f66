// Rows of bfloat16 in pairs, and the products of such: two neighbouring rows share words, the first one below.
#pragma once

#include "cpu/row_product.h"

namespace attncap {
namespace ATTNCAP_ISA {

// [dims] words of two rows with a step between numbers in bytes, as far as `keep` has their bits.
template <class T>
void pair_rows(const char* first, const char* second, int64_t step, int64_t dims, uint32_t keep, uint32_t* out) {
    constexpr int64_t kWords = 2 * Lanes<T>::kWidth;
    int64_t d = 0;
    for (; step == 2 && d + kWords <= dims; d += kWords) {
        Pairs<T>::interleave(first + 2 * d, second + 2 * d, 0xffff0000, out + d);
    }
    for (; d < dims; ++d) {
        out[d] = read<uint16_t>(first + d * step) | (uint32_t(read<uint16_t>(second + d * step)) << 16);
    }
    for (d = 0; keep != 0xffffffff && d < dims; ++d) out[d] &= keep;
}

// [(count + 1) / 2][dims] words of neighbouring keys.
template <class T>
void pair_keys(const KeyRows<T>& keys, int64_t key0, int64_t count, int64_t dims, uint32_t* words) {
    for (int64_t k = 0; k < count; k += 2, words += dims) {
        const bool both = k + 1 < count;
        const char* first = keys.at(key0 + k);
        pair_rows<T>(first, both ? keys.at(key0 + k + 1) : first, keys.step(), dims, both ? 0xffffffff : 0xffff, words);
    }
}

// accumulate_values of pairs, values being [words][dims]; `turned` is room for as many words.
template <class T>
void accumulate_pairs(const uint32_t* prob, const uint32_t* values, int64_t words, int64_t dims, int vectors,
                      const T* decay, [[maybe_unused]] uint32_t* turned, T* out) {
    int64_t whole = 0;
    T ones[kRows];
    if constexpr (kHasTiles) {
        if (dims % kTile == 0) {
            whole = words / kTile * kTile;
            turn_words(values, whole, dims, turned);
            multiply_columns(decay, dims, vectors, out);
            std::fill(ones, ones + kRows, T(1));
            decay = ones;
            constexpr int64_t kBytes = kRows * int64_t(sizeof(T));
            multiply_tiles({reinterpret_cast<const char*>(turned), whole * 4}, dims / kTile,
                           {reinterpret_cast<const char*>(prob), kBytes}, vectors, whole / kTile,
                           {reinterpret_cast<char*>(out), kBytes}, true);
        }
    }
    if (whole == words) return;
    accumulate_values<Pairs<T>>(prob + whole * kRows, values + whole * dims, dims, words - whole, dims, vectors, decay,
                                out);
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
