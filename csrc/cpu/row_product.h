// The product of a task's rows with keys, as the tensors' dtypes, strides and sizes suit best:
//
//   tiles of T     keys as they lie where they are T with unit stride, converted a few at a time otherwise
//   tiles of pairs bfloat16 tensors on processors that multiply bfloat16 pairs: twice the work an instruction, the
//                  products as exact as in float but for numbers below all normal ones, which count as 0; on matrix
//                  registers where it has those
//   narrow rows    up to kNarrowRows lanes
#pragma once

#include "cpu/mask.h"
#include "cpu/narrow.h"
#include "cpu/task.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kConvertKeys = 48;  // keys converted at a time, used at once from the first-level cache

// A key-like tensor (B, G, K, n) of a task's sequence and key head, read as rows of T.
template <class T>
class KeyRows {
  public:
    KeyRows(const Task& task, const Array& array, int64_t dim) : t_(task), array_(array), dim_(dim) {}

    const char* at(int64_t key) const { return array_.at(t_.sequence.batch, t_.key_head(), t_.sequence.key0 + key); }
    int64_t bytes() const { return array_.stride[2] * item_size(array_.dtype); }  // between two keys
    int64_t step() const { return array_.stride[3] * item_size(array_.dtype); }   // between two of a key's numbers
    int64_t dim() const { return dim_; }

    // `count` rows with unit stride: where they lie, or converted into `copy`.
    const T* read(int64_t key0, int64_t count, T* copy, int64_t* stride) const {
        const char* first = at(key0);
        if (array_.dtype == kOwn<T> && (array_.stride[3] == 1 || dim_ == 1)) {
            *stride = array_.stride[2];
            return reinterpret_cast<const T*>(first);
        }
        *stride = dim_;
        for (int64_t k = 0; k < count; ++k) {
            load_strided(copy + k * dim_, first + k * bytes(), array_.dtype, array_.stride[3], dim_);
        }
        return copy;
    }

  private:
    const Task& t_;
    const Array& array_;
    const int64_t dim_;
};

// Where a product keeps what it reads; `dim` is rounded up to whole vectors.
template <class T>
struct ProductMemory {
    T *packed, *staging, *converted;  // [dim][kRows], [kWidth][dim], [kConvertKeys][dim]
};

template <class T>
class RowProduct {
    using L = Lanes<T>;
    using Tiles = MatrixTiles<T>;
    static constexpr bool kPairing = kHasPairs && sizeof(T) == 4;

  public:
    // `rows` (B, H, Q, dim), `keys` (B, G, K, dim).
    RowProduct(const Task& task, const Array& rows, const Array& keys, int64_t dim, double scale,
               const ProductMemory<T>& memory)
        : t_(task),
          rows_(rows),
          given_keys_(keys),
          keys_(task, keys, dim),
          dim_(dim),
          scale_(T(scale)),
          m_(memory),
          vectors_(int((task.lanes() + L::kWidth - 1) / L::kWidth)),
          narrow_(task.lanes() <= kNarrowRows),
          pairs_(kPairing && !narrow_ && can_pair()),
          use_(pairs_) {}

    bool pairs() const { return pairs_; }

    void load_rows() {
        if (narrow_) {
            for (int64_t i = 0; i < t_.lanes(); ++i) load_row(i, m_.packed + i * dim_);
            return;
        }
        if constexpr (kPairing) {
            if (pairs_) return transpose_rows<Pairs<T>>(dim_ / 2);
        }
        transpose_rows<Plain<T>>(dim_);
    }

    // scale * <row, key> of keys key0 .. key1 - 1; tiles of keys that no row of a vector sees are left at -inf.
    // `largest` gets each row's largest score of every tile of kTileKeys keys.
    void operator()(const SeenRange<T>& seen, int64_t key0, int64_t key1, T* scores, T* largest) {
        for (int64_t key = key0; key < key1; key += kConvertKeys) {
            const int64_t count = std::min(kConvertKeys, key1 - key);
            T* here = scores + (key - key0) * kRows;
            T* largest_here = largest + (key - key0) / L::kTileKeys * kRows;
            if (narrow_) {
                spread_lines(key, count, here);
                tile_maxima(here, 0, count, count, vectors_, largest_here);
                continue;
            }
            if constexpr (Tiles::kHere) {
                if (pairs_) {
                    score_on_registers(seen, key, count, here, largest_here);
                    continue;
                }
            } else if constexpr (kPairing) {
                if (pairs_) {
                    score_seen<Pairs<T>>(seen, keys_.at(key), keys_.bytes(), dim_ / 2, key, count, here, largest_here);
                    continue;
                }
            }
            int64_t stride;
            const T* keys = keys_.read(key, count, m_.converted, &stride);
            score_seen<Plain<T>>(seen, reinterpret_cast<const char*>(keys), stride * int64_t(sizeof(T)), dim_, key,
                                 count, here, largest_here);
        }
    }

    // The same for narrow rows, line by line: scores[lane * line + key - key0], written up to a whole vector.
    void lines(int64_t key0, int64_t count, T* scores, int64_t line) {
        auto score = [&](auto stored, const char* keys, int64_t stride, int64_t some, T* here) {
            narrow_scores<T, decltype(stored)>(m_.packed, t_.lanes(), keys, stride, dim_, some, scale_, here, line);
        };
        const bool in_place = as_stored<T>(given_keys_.dtype, given_keys_.stride[3], [&](auto stored) {
            score(stored, keys_.at(key0), keys_.bytes(), count, scores);
        });
        for (int64_t k = 0; !in_place && k < count; k += kConvertKeys) {
            const int64_t some = std::min(kConvertKeys, count - k);
            int64_t stride;
            const T* keys = keys_.read(key0 + k, some, m_.converted, &stride);
            score(StoredOwn<T>{}, reinterpret_cast<const char*>(keys), stride * int64_t(sizeof(T)), some, scores + k);
        }
    }

  private:
    const Task& t_;
    const Array &rows_, &given_keys_;
    const KeyRows<T> keys_;
    const int64_t dim_;
    const T scale_;
    const ProductMemory<T> m_;
    const int vectors_;
    const bool narrow_, pairs_;
    const typename Tiles::Use use_;

    bool can_pair() const {
        return rows_.dtype == DType::bfloat16 && dim_ % 2 == 0 && rows_.stride[3] == 1 && given_keys_.stride[3] == 1;
    }

    void load_row(int64_t lane, T* out) const {
        load_strided(out, t_.at(rows_, lane), rows_.dtype, rows_.stride[3], dim_);
    }

    // Rows to [word][lane]; lanes past the last repeat it.
    template <class Step>
    void transpose_rows(int64_t words) {
        const int64_t whole = (words + L::kWidth - 1) / L::kWidth * L::kWidth, bytes = words * int64_t(sizeof(T));
        auto* columns = reinterpret_cast<typename Step::Word*>(m_.packed);
        const bool own = rows_.stride[3] == 1 && item_size(rows_.dtype) * dim_ == bytes;
        for (int64_t first = 0; first < vectors_ * L::kWidth; first += L::kWidth) {
            if (own && words == whole && first + L::kWidth <= t_.rows) {
                const char* from = t_.at(rows_, first);
                transpose_in<Step>(from, rows_.stride[2] * item_size(rows_.dtype), words, scale_, columns + first);
                continue;
            }
            for (int64_t i = 0; i < L::kWidth; ++i) {
                const int64_t here = std::min(first + i, t_.lanes() - 1);
                T* to = m_.staging + i * whole;
                std::fill(to + words, to + whole, T(0));
                if (own) {
                    std::memcpy(to, t_.at(rows_, here), size_t(bytes));
                } else {
                    load_row(here, to);
                }
            }
            const auto* staged = reinterpret_cast<const char*>(m_.staging);
            transpose_in<Step>(staged, whole * int64_t(sizeof(T)), words, scale_, columns + first);
        }
    }

    template <class Step>
    void score_seen(const SeenRange<T>& seen, const char* keys, int64_t stride, int64_t words, int64_t key0,
                    int64_t count, T* scores, T* largest) {
        static_assert(kConvertKeys % L::kTileKeys == 0, "tiles are cut alike in every chunk");
        const auto* query = reinterpret_cast<const typename Step::Word*>(m_.packed);
        for (int64_t k = 0; k < count; k += L::kTileKeys) {
            const int64_t tile = std::min<int64_t>(L::kTileKeys, count - k);
            int first, last;
            seen.active(key0 + k, key0 + k + tile, vectors_, &first, &last);
            T *here = scores + k * kRows, *largest_here = largest + k / L::kTileKeys * kRows;
            if (last - first < vectors_) {
                std::fill(here, here + tile * kRows, T(-INFINITY));
                std::fill(largest_here, largest_here + kRows, T(-INFINITY));
            }
            score_rows<Step>(query, keys + k * stride, stride, words, int(tile), first, last, scale_, here,
                             largest_here);
        }
    }

    void score_on_registers(const SeenRange<T>& seen, int64_t key0, int64_t count, T* scores, T* largest) {
        static_assert(kConvertKeys % Tiles::kSide == 0, "registers hold as many keys each");
        alignas(64) T sums[kConvertKeys * kRows];
        int first, last;
        seen.active(key0, key0 + count, vectors_, &first, &last);
        int64_t stride;
        const char* keys = keys_in_steps(key0, count, &stride);
        const auto* query = reinterpret_cast<const uint32_t*>(m_.packed);
        Tiles::multiply({keys, stride, 2 * Tiles::kStep, stride * Tiles::kSide, query, steps()},
                        (count + Tiles::kSide - 1) / Tiles::kSide, first, last, true, sums);
        for (int64_t k = 0; k < count; k += L::kTileKeys) {
            with_constant<L::kTileKeys>(int(std::min<int64_t>(L::kTileKeys, count - k)), [&](auto tile) {
                scale_tile<T, decltype(tile)::value>(sums + k * kRows, first, last, vectors_, scale_,
                                                     scores + k * kRows, largest + k / L::kTileKeys * kRows);
            });
        }
    }

    int64_t steps() const { return (dim_ + Tiles::kStep - 1) / Tiles::kStep; }

    // Keys as registers read them, `stride` bytes apart: where they lie, or with zeros after the last dim. Rows after
    // the last, up to a whole register, hold anything.
    const char* keys_in_steps(int64_t key0, int64_t count, int64_t* stride) const {
        if (dim_ % Tiles::kStep == 0 && count % Tiles::kSide == 0) {
            *stride = keys_.bytes();
            return keys_.at(key0);
        }
        *stride = steps() * 2 * Tiles::kStep;
        char* copy = reinterpret_cast<char*>(m_.converted);
        for (int64_t k = 0; k < count; ++k) {
            std::memcpy(copy + k * *stride, keys_.at(key0 + k), size_t(2 * dim_));
            std::fill(copy + k * *stride + 2 * dim_, copy + (k + 1) * *stride, 0);
        }
        return copy;
    }

    // Lines of at most kConvertKeys keys as lanes of rows; those past the last get -inf.
    void spread_lines(int64_t key0, int64_t count, T* scores) {
        constexpr int64_t kLine = whole_vectors<T>(kConvertKeys);
        T lines[kNarrowRows * kLine];
        this->lines(key0, count, lines, kLine);
        for (int64_t k = 0; k < count; ++k) {
            T* to = scores + k * kRows;
            std::fill(to, to + vectors_ * L::kWidth, T(-INFINITY));
            for (int64_t lane = 0; lane < t_.lanes(); ++lane) to[lane] = lines[lane * kLine + k];
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
