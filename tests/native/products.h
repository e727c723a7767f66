// The products on register tiles and on narrow rows, column sums and pairs, on small integers: exact in any order.
#pragma once

#include "cpu/narrow.h"
#include "cpu/received.h"
#include "stored.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr double kUntouched = 1e6;

template <class T>
void check_turned_in_and_out() {
    using L = Lanes<T>;
    for (int64_t words : {1, 3, 8, 16, 21, 33}) {
        const int64_t whole = (words + L::kWidth - 1) / L::kWidth * L::kWidth, stride = whole + 2;
        const auto rows = check::integers<T>(L::kWidth * stride);
        std::vector<T> columns(whole * kRows, T(kUntouched)), back(L::kWidth * stride, T(kUntouched));
        transpose_in<Plain<T>>(reinterpret_cast<const char*>(rows.data()), stride * sizeof(T), words, T(2),
                               columns.data());
        T factor[L::kWidth];
        for (int i = 0; i < L::kWidth; ++i) factor[i] = T(i % 3);
        transpose_out(columns.data(), words, L::load(factor), mask_of<T>(2), back.data(), stride);
        for (int64_t i = 0; i < L::kWidth; ++i) {
            for (int64_t d = 0; d < words; ++d) {
                const T x = rows[i * stride + d];
                check::that(columns[d * kRows + i] == 2 * x, "transpose_in: row, word", {double(i), double(d)});
                const T want = i == 1 ? T(0) : 2 * x * factor[i];
                check::that(back[i * stride + d] == want, "transpose_out: row, word", {double(i), double(d)});
            }
            check::that(columns[i] != T(kUntouched), "transpose_in", {});
            if (L::kWidth < kRows) check::that(columns[L::kWidth] == T(kUntouched), "transpose_in writes too far");
            check::that(back[i * stride + whole] == T(kUntouched), "transpose_out writes too far", {double(words)});
        }
    }
}

// Words of Step's that hold so many numbers each.
template <class Step>
std::vector<typename Step::Word> words_of(const std::vector<float>& numbers, int per_word) {
    using Word = typename Step::Word;
    std::vector<Word> words(numbers.size() / per_word);
    for (size_t i = 0; i < words.size(); ++i) {
        if (per_word == 1)
            words[i] = Word(numbers[i]);
        else
            words[i] = Word(float_to_bfloat(numbers[2 * i]) | uint32_t(float_to_bfloat(numbers[2 * i + 1])) << 16);
    }
    return words;
}

// `word(key, d)` is what a key's word says, as numbers; `Step` multiplies the like.
template <class Step>
void check_score_tiles(int per_word) {
    using T = typename Step::T;
    using L = typename Step::L;
    using Word = typename Step::Word;
    const auto packed = [&](const std::vector<float>& numbers) { return words_of<Step>(numbers, per_word); };
    const int vectors = int(kRows / L::kWidth);
    for (int64_t words : {1, 2, 7, 16, 33}) {
        const auto queries = check::integers<float>(words * kRows * per_word);
        const auto query = packed(queries);
        for (int count = 1; count <= L::kTileKeys; ++count) {
            const int64_t stride = words + 3;
            const auto numbers = check::integers<float>(count * stride * per_word);
            const auto keys = packed(numbers);
            const int first = check::integer(0, vectors - 1), last = check::integer(first, vectors);
            std::vector<T> scores((count + 1) * kRows, T(kUntouched)), largest(kRows, T(kUntouched));
            score_rows<Step>(query.data(), reinterpret_cast<const char*>(keys.data()), stride * sizeof(Word), words,
                             count, first, last, T(2), scores.data(), largest.data());
            for (int64_t row = 0; row < kRows; ++row) {
                const bool active = row / L::kWidth >= first && row / L::kWidth < last;
                T best = active ? T(-INFINITY) : T(kUntouched);
                for (int k = 0; k <= count; ++k) {
                    T want = T(kUntouched);
                    if (active && k < count) {
                        want = 0;
                        for (int64_t d = 0; d < words * per_word; ++d) {
                            const float q = queries[(d / per_word * kRows + row) * per_word + d % per_word];
                            want += T(q * numbers[k * stride * per_word + d]);
                        }
                        if (Step::kScalesSums) want *= 2;
                        best = std::max(best, want);
                    }
                    check::that(scores[k * kRows + row] == want, "score_rows: keys, key, row",
                                {double(count), double(k), double(row)});
                }
                check::that(largest[row] == best, "largest of a tile", {double(count), double(row)});
            }
        }
    }
}

template <class T>
void check_tile_maxima() {
    using L = Lanes<T>;
    for (int64_t count = 1; count <= 3 * L::kTileKeys + 1; ++count) {
        const auto scores = check::integers<T>(count * kRows, 1000);
        const int64_t tiles = (count + L::kTileKeys - 1) / L::kTileKeys;
        std::vector<T> largest((tiles + 1) * kRows, T(kUntouched));
        tile_maxima(scores.data(), 0, count, count, int(kRows / L::kWidth), largest.data());
        for (int64_t row = 0; row < kRows; ++row) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                T best = T(-INFINITY);
                for (int64_t k = tile * L::kTileKeys; k < std::min<int64_t>(count, (tile + 1) * L::kTileKeys); ++k) {
                    best = std::max(best, scores[k * kRows + row]);
                }
                check::that(largest[tile * kRows + row] == best, "tile_maxima", {double(count), double(tile)});
            }
            check::that(largest[tiles * kRows + row] == T(kUntouched), "tile_maxima writes too far", {double(count)});
        }
    }
}

template <class T>
void check_value_tiles() {
    using L = Lanes<T>;
    for (int64_t dims = 1; dims <= 3 * L::kTileKeys + 2; ++dims) {
        for (int vectors = 1; vectors <= kRows / L::kWidth; vectors += 1 + vectors / 2) {
            const int64_t keys = check::integer(0, 9), stride = dims + 1;
            const auto prob = check::integers<T>(keys * kRows + 1), values = check::integers<T>(keys * stride + 1);
            const auto decay = check::integers<T>(kRows, 2), before = check::integers<T>((dims + 1) * kRows);
            auto out = before;
            accumulate_values<Plain<T>>(prob.data(), values.data(), stride, keys, dims, vectors, decay.data(),
                                        out.data());
            for (int64_t d = 0; d <= dims; ++d) {
                for (int64_t row = 0; row < kRows; ++row) {
                    const bool active = d < dims && row < vectors * L::kWidth;
                    T want = before[d * kRows + row] * (active ? decay[row] : T(1));
                    for (int64_t k = 0; active && k < keys; ++k) want += prob[k * kRows + row] * values[k * stride + d];
                    check::that(out[d * kRows + row] == want, "accumulate_values: dims, dim, row",
                                {double(dims), double(d), double(row)});
                }
            }
        }
    }
}

// Memory of exactly `count` numbers as Stored has them, so that a sanitizer sees a read beyond.
template <class Stored, class T>
std::vector<char> stored(const std::vector<T>& numbers, DType dtype) {
    std::vector<char> bytes(numbers.size() * Stored::kBytes);
    store_strided(bytes.data(), dtype, 1, numbers.data(), int64_t(numbers.size()));
    return bytes;
}

template <class T, class Stored>
void check_narrow_products(DType dtype) {
    using L = Lanes<T>;
    for (int64_t dim : {1, 3, 8, 16, 17, 40, 67}) {
        for (int64_t rows = 1; rows <= kNarrowRows; ++rows) {
            const int64_t count = check::integer(1, dim == 67 ? 200 : 2 * L::kWidth + 1);
            const int64_t stride = dim + check::integer(0, 3);
            const auto numbers = check::integers<T>((count - 1) * stride + dim);
            const auto memory = stored<Stored>(numbers, dtype);
            const auto query = check::integers<T>(rows * dim);
            const int64_t line = whole_vectors<T>(count) + check::integer(0, 3);
            std::vector<T> scores((rows - 1) * line + whole_vectors<T>(count));
            narrow_scores<T, Stored>(query.data(), rows, memory.data(), stride * Stored::kBytes, dim, count, T(2),
                                     scores.data(), line);
            for (int64_t k = 0; k < count; ++k) {
                for (int64_t row = 0; row < rows; ++row) {
                    T want = 0;
                    for (int64_t d = 0; d < dim; ++d) want += 2 * query[row * dim + d] * numbers[k * stride + d];
                    check::that(scores[row * line + k] == want, "narrow_scores: dim, key, row",
                                {double(dim), double(k), double(row)});
                }
            }
            const int64_t width = dim + check::integer(0, 3);
            const auto prob = check::integers<T>(rows * line), before = check::integers<T>((rows - 1) * width + dim);
            const auto decay = check::integers<T>(rows, 2);
            auto out = before;
            narrow_values<T, Stored>(prob.data(), line, memory.data(), stride * Stored::kBytes, count, dim, rows,
                                     decay.data(), out.data(), width);
            for (int64_t at = 0; at < int64_t(out.size()); ++at) {
                const int64_t row = at / width, d = at % width;
                T want = before[at] * (d < dim ? decay[row] : T(1));
                for (int64_t k = 0; d < dim && k < count; ++k) want += prob[row * line + k] * numbers[k * stride + d];
                check::that(out[at] == want, "narrow_values: dim, at, row", {double(dim), double(d), double(row)});
            }
        }
    }
}

template <class T>
void check_columns() {
    using L = Lanes<T>;
    for (int turn = 0; turn < 60; ++turn) {
        const int64_t count = check::integer(0, 3 * L::kWidth), keys = count + 1;
        const int vectors = check::integer(1, int(kRows / L::kWidth));
        const bool guarded = turn % 2 == 1;
        auto exponentials = check::integers<T>(keys * kRows), factor = check::integers<T>(kRows);
        auto received = check::integers<T>(keys);
        if (guarded) {  // a row that sees no key but has an infinite factor, one that sees NaN but does not count
            for (int64_t k = 0; k < keys; ++k) exponentials[k * kRows] = 0, exponentials[k * kRows + 1] = T(NAN);
            factor[0] = T(INFINITY), factor[1] = 0;
        }
        const auto before = received;
        add_columns(exponentials.data(), factor.data(), count, vectors, guarded, received.data());
        for (int64_t k = 0; k < keys; ++k) {
            T want = before[k];
            for (int64_t row = guarded ? 2 : 0; k < count && row < vectors * L::kWidth; ++row) {
                want += exponentials[k * kRows + row] * factor[row];
            }
            check::that(received[k] == want, "add_columns: keys, key", {double(count), double(k)});
        }
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
