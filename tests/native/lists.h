// The k largest of every row, block by block, against a stable sort.
#pragma once

#include "cpu/narrow.h"
#include "cpu/topk.h"
#include "lanes.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Scores [keys][kRows] of one of several kinds; lane 0 may hold NaNs, of which nothing is promised.
template <class T>
std::vector<T> scores_of_kind(int kind, int64_t keys) {
    std::vector<T> scores(keys * kRows);
    for (int64_t k = 0; k < keys; ++k) {
        for (int64_t row = 0; row < kRows; ++row) {
            T& score = scores[k * kRows + row];
            if (kind == 0) score = T(check::uniform(-1, 1));
            if (kind == 1) score = T(check::integer(-2, 2));
            if (kind == 2) score = T(k);
            if (kind == 3) score = T(-k);
            if (kind == 4) score = check::integer(0, 300) == 0 ? T(check::integer(0, 3)) : T(-INFINITY);
            if (kind == 5) score = row == 0 && k % 5 == 0 ? T(NAN) : T(check::integer(0, 1));
        }
    }
    return scores;
}

// The lists of rows row0 .. row1 - 1 after all scores.
template <class T>
void check_lists(const TopK<T>& top, const std::vector<T>& scores, int64_t row0, int64_t row1, int kind) {
    using Int = typename Lanes<T>::Int;
    for (int64_t row = row0; row < row1; ++row) {
        if (kind == 5 && row == 0) continue;
        std::vector<Int> order;
        for (int64_t key = 0; key < int64_t(scores.size()) / kRows; ++key) {
            if (scores[key * kRows + row] > T(-INFINITY)) order.push_back(Int(key));
        }
        std::stable_sort(order.begin(), order.end(),
                         [&](Int a, Int b) { return scores[a * kRows + row] > scores[b * kRows + row]; });
        for (int64_t t = 0; t < top.k; ++t) {
            const bool there = t < int64_t(order.size());
            const Int want = there ? order[t] : -1, key = top.key[t * kRows + row];
            const T score = there ? scores[want * kRows + row] : T(-INFINITY);
            check::that(key == want && top.score[t * kRows + row] == score, "top-k: k, kind, row, place, key",
                        {double(top.k), double(kind), double(row), double(t), double(key)});
        }
    }
}

// In lanes of rows, or row after row.
template <class T>
void check_topk(bool lines) {
    using L = Lanes<T>;
    constexpr int64_t kTiles = (kBlockKeys<T> + L::kTileKeys - 1) / L::kTileKeys;
    std::vector<T> largest(kTiles * kRows);
    for (int64_t k : {1, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64}) {
        for (int kind = 0; kind < 6; ++kind) {
            TopK<T> top;
            top.k = k;
            std::vector<T> held(kRows * k);
            std::vector<typename L::Int> held_keys(kRows * k);
            top.score = held.data(), top.key = held_keys.data();
            top.clear();
            const int64_t blocks[] = {check::integer(1, int(kBlockKeys<T>)), kBlockKeys<T>, check::integer(1, 40)};
            const int vectors = check::integer(1, int(kRows / L::kWidth)), vector = check::integer(0, vectors - 1);
            const int64_t row0 = lines ? 0 : vector * L::kWidth, row1 = lines ? kNarrowRows : row0 + L::kWidth;
            const auto scores = scores_of_kind<T>(kind, blocks[0] + blocks[1] + blocks[2]);
            int64_t key0 = 0;
            for (int64_t count : blocks) {
                const T* block = &scores[key0 * kRows];
                for (int64_t row = row0; lines && row < row1; ++row) {
                    std::vector<T> line(whole_vectors<T>(count), T(-INFINITY));
                    for (int64_t key = 0; key < count; ++key) line[key] = block[key * kRows + row];
                    top.take_line(line.data(), key0, count, row);
                }
                if (!lines) {
                    tile_maxima(block, 0, count, count, vectors, largest.data());
                    top.take_block(block, largest.data(), key0, count, vectors);
                }
                key0 += count;
            }
            check_lists(top, scores, row0, row1, kind);
        }
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
