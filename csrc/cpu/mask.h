// Which keys each row of a task sees, and the bias it adds. An unseen key has the score -inf.
#pragma once

#include "cpu/convert.h"
#include "cpu/elementary.h"
#include "cpu/mask_range.h"
#include "cpu/matrix_tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Row i sees keys low[i] .. high[i] as far as causality and window say; a row may see none (high < low). What is known
// of the mask bounds the keys that some row sees.
template <class T>
struct SeenRange {
    using L = Lanes<T>;
    using Int = typename L::Int;
    Int low[kRows], high[kRows];
    int64_t begin, end;            // keys that some row sees, from a whole step of matrix registers on
    int64_t all_begin, all_end;    // keys that every row sees as far as causality and window say
    int64_t open_begin, open_end;  // keys that no mask changes
    int64_t vector_low[kRows / L::kWidth], vector_high[kRows / L::kWidth];

    void set(const Problem& problem, const MaskRange& mask, int64_t keys, int64_t lanes, const Int* positions) {
        begin = keys, end = 0, all_begin = 0, all_end = keys;
        for (int64_t i = 0; i < kRows; ++i) {
            // Lanes past the last are given the last one's range, so that they never widen anything.
            const int64_t position = positions[std::min(i, lanes - 1)];
            int64_t first = 0, last = keys - 1;
            if (problem.causal) last = std::min(last, position);
            if (problem.window_left >= 0) first = std::max(first, position - problem.window_left);
            if (problem.window_right >= 0) last = std::min(last, position + problem.window_right);
            last = std::max<int64_t>(last, -1);
            first = std::min(first, keys);
            low[i] = Int(first), high[i] = Int(last);
            if (first <= last) begin = std::min(begin, first), end = std::max(end, last + 1);
            all_begin = std::max(all_begin, first), all_end = std::min(all_end, last + 1);
        }
        begin = std::max(begin, mask.begin), end = std::min(end, mask.end);
        if (begin >= end) begin = keys, end = 0;
        open_begin = mask.open_begin, open_end = mask.open_end;
        begin -= begin % MatrixTiles<T>::kStep;
        for (int64_t v = 0; v < kRows / L::kWidth; ++v) {
            const auto lanes = v * L::kWidth;
            vector_low[v] = *std::min_element(low + lanes, low + lanes + L::kWidth);
            vector_high[v] = *std::max_element(high + lanes, high + lanes + L::kWidth);
        }
    }

    // Vectors *first .. *last - 1 hold the rows that may see one of keys key0 .. key1 - 1.
    void active(int64_t key0, int64_t key1, int vectors, int* first, int* last) const {
        *first = 0, *last = vectors;
        while (*first < *last && (vector_high[*first] < key0 || vector_low[*first] >= key1)) ++*first;
        while (*first < *last && (vector_high[*last - 1] < key0 || vector_low[*last - 1] >= key1)) --*last;
    }
};

// score -> softcap * tanh(score / softcap)
template <class T>
void cap_scores(T softcap, int64_t count, int vectors, T* scores) {
    using L = Lanes<T>;
    for (int64_t k = 0; k < count; ++k) {
        for (int v = 0; v < vectors; ++v) {
            T* score = scores + k * kRows + v * L::kWidth;
            L::store(score, L::all(softcap) * tanh<T>(L::load(score) / L::all(softcap)));
        }
    }
}

// Scores of keys key0 + first .. key0 + last - 1 become -inf where a row does not see them.
template <class T>
void hide_unseen(const SeenRange<T>& seen, int64_t key0, int64_t first, int64_t last, int vectors, T* scores) {
    using L = Lanes<T>;
    const auto hidden = L::all(T(-INFINITY));
    for (int64_t k = first; k < last; ++k) {
        const auto here = L::all_int(typename L::Int(key0 + k));
        for (int v = 0; v < vectors; ++v) {
            T* score = scores + k * kRows + v * L::kWidth;
            const auto outside = L::either(L::less_int(here, L::load_int(seen.low + v * L::kWidth)),
                                           L::less_int(L::load_int(seen.high + v * L::kWidth), here));
            L::store(score, L::select(outside, hidden, L::load(score)));
        }
    }
}

// score + bias, or -inf where the bias is -inf, whatever the score was.
template <class T>
inline typename Lanes<T>::V biased(typename Lanes<T>::V score, typename Lanes<T>::V bias) {
    using L = Lanes<T>;
    const auto hidden = L::all(T(-INFINITY));
    return L::select(L::equal(bias, hidden), hidden, score + bias);
}

// A mask that is the same for every row (padding): one bias per key.
template <class T>
void add_key_mask(const Array& mask, const char* from, int64_t count, int vectors, T* scores) {
    using L = Lanes<T>;
    constexpr int64_t kChunk = 64;
    const int64_t step = mask.stride[3] * item_size(mask.dtype);
    T bias[kChunk];
    for (int64_t first = 0; first < count; first += kChunk) {
        const int64_t some = std::min(kChunk, count - first);
        load_strided(bias, from + first * step, mask.dtype, mask.stride[3], some);
        for (int64_t k = 0; k < some; ++k) {
            if (bias[k] == T(0)) continue;
            for (int v = 0; v < vectors; ++v) {
                T* score = scores + (first + k) * kRows + v * L::kWidth;
                L::store(score, biased<T>(L::load(score), L::all(bias[k])));
            }
        }
    }
}

// A mask with rows of its own, which begin at row(lane): squares of lanes and keys are read along the keys and turned.
template <class T, class Row>
void add_row_mask(const Array& mask, int64_t lanes, int64_t count, T* scores, Row row) {
    using L = Lanes<T>;
    constexpr int64_t kWidth = L::kWidth, kChunk = 64;
    const int64_t step = mask.stride[3] * item_size(mask.dtype);
    T bias[kWidth][kChunk] = {};
    for (int64_t lane = 0; lane < lanes; lane += kWidth) {
        for (int64_t first = 0; first < count; first += kChunk) {
            const int64_t some = std::min(kChunk, count - first);
            for (int64_t i = 0; i < kWidth; ++i) {
                const char* from = row(std::min(lane + i, lanes - 1)) + first * step;
                load_strided(bias[i], from, mask.dtype, mask.stride[3], some);
            }
            for (int64_t k = 0; k < some; k += kWidth) {
                typename L::V square[kWidth];
                for (int64_t i = 0; i < kWidth; ++i) square[i] = L::load(bias[i] + k);
                L::transpose(square);
                for (int64_t i = 0; i < std::min(kWidth, some - k); ++i) {
                    T* score = scores + (first + k + i) * kRows + lane;
                    L::store(score, biased<T>(L::load(score), square[i]));
                }
            }
        }
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
