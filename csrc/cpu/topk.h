// The k largest scores of every row with their keys.
//
// Invariant: entry t of a row's list is not smaller than entry t + 1, and of equal scores the lower key comes first.
// Keys arrive in rising order, so an equal newcomer goes behind; scores of -inf (unseen) never enter.
//
// A row's largest score is the largest of the maxima of its tiles of keys. Once it is taken its tile, a few keys, gets
// a new maximum, and the next score is the largest maximum again. What is searched are the maxima of a few groups of
// tiles.
#pragma once

#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

// The smallest number above v (v + 0 turns -0 into 0, whose neighbours in bits are its neighbours in value).
template <class T>
inline typename Lanes<T>::V next_above(typename Lanes<T>::V v) {
    using L = Lanes<T>;
    typedef std::make_unsigned_t<typename L::Int> Integer;  // wraps around where a signed one must not
    typedef Integer IntVector __attribute__((vector_size(sizeof(typename L::V))));
    v = v + L::all(0);
    const IntVector bits = (IntVector)L::bits(v);
    const auto up = L::from_bits((typename L::I)(bits + 1)), down = L::from_bits((typename L::I)(bits - 1));
    return L::select(L::less(v, L::all(0)), down, up);
}

constexpr int64_t kMostTopK = 64;

template <class T>
struct TopK {
    using L = Lanes<T>;
    using V = typename L::V;
    using I = typename L::I;
    using Int = typename L::Int;
    static constexpr int64_t kTileKeys = L::kTileKeys;

    int64_t k = 0;
    T* score = nullptr;  // [k][kRows]
    Int* key = nullptr;  // [k][kRows]

    void clear() {
        std::fill(score, score + kRows * k, T(-INFINITY));
        std::fill(key, key + kRows * k, Int(-1));
    }

    // Takes in keys key0 .. key0 + count - 1 of all vectors of rows; `largest` is that of each tile of keys, and loses
    // what is taken in.
    void take_block(const T* scores, T* largest, int64_t key0, int64_t count, int vectors) {
        int v = 0;
        for (; v + 2 <= vectors; v += 2) {  // two at a time, for each waits for its memory
            Rows one(*this, scores, largest, key0, count, v), other(*this, scores, largest, key0, count, v + 1);
            for (int64_t n = 0; n < k; ++n) {
                const bool taken = one.take(n), taken_too = other.take(n);
                if (!taken && !taken_too) break;
            }
        }
        if (v == vectors) return;
        Rows last(*this, scores, largest, key0, count, v);
        for (int64_t n = 0; n < k && last.take(n);) ++n;
    }

    // Takes in the scores of `count` keys from key0 on of one row, which lie one after another up to a whole vector.
    void take_line(const T* scores, int64_t key0, int64_t count, int64_t row) {
        if (k == 0) return;
        const T* last = score + (k - 1) * kRows + row;
        for (int64_t at = 0; at < count; at += L::kWidth) {
            if (!L::any(L::less(L::all(*last), L::load(scores + at)))) continue;
            for (int64_t i = 0; i < L::kWidth; ++i) insert_one(scores[at + i], Int(key0 + at + i), row);
        }
    }

  private:
    typedef Int Ints __attribute__((vector_size(sizeof(V))));

    static I shifted(I v, int64_t by) { return (I)((Ints)v + Int(by)); }
    static I scaled(I v, int64_t by) { return (I)((Ints)v * Int(by)); }
    static I at_most(I v, int64_t most) {
        const I limit = L::all_int(Int(most));
        return L::select_int(L::less_int(limit, v), limit, v);
    }

    // A vector of rows, and what a block still holds for it.
    class Rows {
      public:
        Rows(TopK& top, const T* scores, T* largest, int64_t key0, int64_t count, int vector)
            : top_(top),
              row0_(vector * L::kWidth),
              column_(scores + row0_),
              tile_max_(largest + row0_),
              key0_(key0),
              count_(count),
              tiles_((count + kTileKeys - 1) / kTileKeys),
              together_((tiles_ + kMostGroups - 1) / kMostGroups),
              part_((tiles_ + kParts * together_ - 1) / (kParts * together_)),
              starts_(!L::any(L::less(L::all(T(-INFINITY)), L::load(top.score + row0_)))) {
            for (int64_t group = 0; group < kParts * part_; ++group) {
                auto most = L::all(T(-INFINITY));
                const int64_t end = std::min(tiles_, (group + 1) * together_);
                for (int64_t tile = group * together_; tile < end; ++tile) {
                    most = L::max(L::load(tile_max_ + tile * kRows), most);
                }
                most_[group] = most;
            }
            Int lanes[L::kWidth];
            for (int i = 0; i < L::kWidth; ++i) lanes[i] = Int(i);
            lanes_ = L::load_int(lanes);
            last_ = L::all(T(INFINITY)), last_key_ = L::all_int(-1);
            search(L::all_int(-1), L::all(T(INFINITY)));
        }

        // The n-th largest of the block's scores goes to the lists; false where no row has use for it.
        bool take(int64_t n) {
            const V score = best_;
            if (!L::any(L::less(L::load(top_.score + (top_.k - 1) * kRows + row0_), score))) return false;
            V left;
            const I key = together_ == 1 ? take_from_tile(group_, &left) : take_from_group(&left);
            search(group_, left);
            if (starts_) {
                top_.put(n, score, shifted(key, key0_), row0_);
            } else {
                top_.insert(score, shifted(key, key0_), row0_);
            }
            return true;
        }

      private:
        static constexpr int64_t kMostGroups = 32, kParts = 4;
        static constexpr int64_t kMostTogether =
            ((kBlockKeys<T> + kTileKeys - 1) / kTileKeys + kMostGroups - 1) / kMostGroups;

        TopK& top_;
        const int64_t row0_;
        const T* column_;
        T* tile_max_;
        const int64_t key0_, count_, tiles_, together_, part_;
        const bool starts_;    // the lists are empty
        V most_[kMostGroups];  // the largest score of each group of tiles
        V best_;               // the largest of all,
        I group_;              // and the first group that has it
        V last_;               // what was taken last,
        I last_key_;           // and where it was
        I lanes_;

        // A row's `group` has no more than `left` now.
        void search(I group, V left) {
            V best[kParts], limit = L::all(T(INFINITY));
            I at[kParts], within[kParts], number = L::all_int(0);
            for (int i = 0; i < kParts; ++i) {
                best[i] = L::all(T(-INFINITY)), at[i] = number, within[i] = shifted(group, -i * part_);
            }
            for (int64_t n = 0; n < part_; ++n, number = shifted(number, 1)) {
#pragma GCC unroll 4
                for (int i = 0; i < kParts; ++i) {
                    V& most = most_[i * part_ + n];
                    // Not a selection: compilers make a masked store of that, for which the next load has to wait.
                    most = L::min(most, L::select(L::equal_int(within[i], number), left, limit));
                    at[i] = L::select_int(L::less(best[i], most), number, at[i]);
                    best[i] = L::max(best[i], most);
                }
            }
            best_ = best[0], group_ = at[0];
            for (int i = 1; i < kParts; ++i) {
                group_ = L::select_int(L::less(best_, best[i]), shifted(at[i], i * part_), group_);
                best_ = L::max(best_, best[i]);
            }
        }

        I place(I line) const { return (I)((Ints)line * Int(kRows) + (Ints)lanes_); }

        I take_from_group(V* left) {
            const I first = scaled(group_, together_);
            V held[kMostTogether];
            I tiles[kMostTogether], tile = first;
            for (int64_t i = together_ - 1; i >= 0; --i) {
                tiles[i] = at_most(shifted(first, i), tiles_ - 1);
                held[i] = L::gather(tile_max_, place(tiles[i]));
                tile = L::select_int(L::equal(held[i], best_), tiles[i], tile);
            }
            const I key = take_from_tile(tile, left);
            L::scatter(tile_max_, place(tile), *left);
            for (int64_t i = 0; i < together_; ++i) {
                *left = L::max(L::select(L::equal_int(tiles[i], tile), L::all(T(-INFINITY)), held[i]), *left);
            }
            return key;
        }

        // The first of a tile's keys that has the best score and was not taken before. `left` is the largest of the
        // tile's scores that come after it in order: smaller, or equal and later.
        I take_from_tile(I tile, V* left) {
            const I first = scaled(tile, kTileKeys);
            const I before = L::select_int(L::equal(best_, last_), last_key_, L::all_int(-1));
            V held[kTileKeys];
            I keys[kTileKeys], key = first;
#pragma GCC unroll 8
            for (int64_t i = kTileKeys - 1; i >= 0; --i) {
                keys[i] = at_most(shifted(first, i), count_ - 1);
                held[i] = L::gather(column_, place(keys[i]));
                const V open = L::select(L::less_int(before, keys[i]), held[i], L::all(T(-INFINITY)));
                key = L::select_int(L::equal(open, best_), keys[i], key);
            }
            last_ = best_, last_key_ = key;
            const V above = next_above<T>(best_), none = L::all(T(-INFINITY));
            *left = none;
#pragma GCC unroll 8
            for (int64_t i = 0; i < kTileKeys; ++i) {
                const V limit = L::select(L::less_int(key, keys[i]), above, best_);
                *left = L::max(L::select(L::less(held[i], limit), held[i], none), *left);
            }
            return key;
        }
    };

    void insert_one(T newcomer, Int newcomer_key, int64_t row) {
        T* scores = score + row;
        Int* keys = key + row;
        int64_t t = k;
        for (; t > 0 && scores[(t - 1) * kRows] < newcomer; --t) {
            if (t == k) continue;
            scores[t * kRows] = scores[(t - 1) * kRows], keys[t * kRows] = keys[(t - 1) * kRows];
        }
        if (t < k) scores[t * kRows] = newcomer, keys[t * kRows] = newcomer_key;
    }

    // Entry n of every row, after which it has none; -inf is no score.
    void put(int64_t n, V taken, I taken_key, int64_t row0) {
        const auto none = L::equal(taken, L::all(T(-INFINITY)));
        L::store(score + n * kRows + row0, taken);
        L::store_int(key + n * kRows + row0, L::select_int(none, L::all_int(-1), taken_key));
    }

    // Every row's list takes in a score. It comes to lie behind those that are not smaller, which from there on move
    // down.
    void insert(V carried, I carried_key, int64_t row0) {
        typename L::M moving = {};
        for (int64_t t = 0; t < k; ++t) {
            T* here = score + t * kRows + row0;
            Int* key_here = key + t * kRows + row0;
            const auto held = L::load(here);
            const auto held_key = L::load_int(key_here);
            moving = L::either(moving, L::less(held, carried));
            L::store(here, L::max(held, carried));
            L::store_int(key_here, L::select_int(moving, carried_key, held_key));
            carried = L::min(held, carried), carried_key = L::select_int(moving, held_key, carried_key);
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
