// The k largest scores of every row with their keys.
//
// Invariant: entry t of a row's list is not smaller than entry t + 1, and of equal scores the lower key comes first.
// Keys arrive in rising order, so an equal newcomer goes behind; scores of -inf (unseen) never enter.
//
// Few keys of a block matter to a row. The k-th largest of the maxima of its tiles of keys is a lower bound of the k-th
// largest score, so only tiles that reach it are looked into. What reaches it there is inserted for a whole vector of
// rows at once, each row's first candidate, its second and so on.
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
    static constexpr int64_t kSlots = 16;                 // candidates of a row that are inserted together
    static constexpr int64_t kTogether = 32 * L::kWidth;  // candidates found before they are inserted, about
    // A tile's flags of reaching the bound, one for each key and row of a vector, fill one word or two.
    static constexpr int64_t kTileWords = (kTileKeys * L::kWidth + 63) / 64, kWordKeys = kTileKeys / kTileWords;
    static_assert(kWordKeys * kTileWords == kTileKeys, "words hold as many keys each");

    struct Reached {
        uint64_t flags;  // bit i * kWidth + lane: whether the row of the lane reaches its bound with key + i
        int64_t key;     // of the block
    };

    int64_t k = 0;
    T* score = nullptr;  // [k][kRows]
    Int* key = nullptr;  // [k][kRows]
    // Scratch for one vector of rows.
    Int* tiles = nullptr;        // [block's tiles] those that some row reaches
    Reached* reached = nullptr;  // [kReachedRoom] words that are not 0
    T* slot_score = nullptr;     // [kSlots][kWidth] -inf between calls
    Int* slot_key = nullptr;     // [kSlots][kWidth]

    static constexpr int64_t kReachedRoom = kTogether + kTileWords + 1;

    void clear() {
        std::fill(score, score + kRows * k, T(-INFINITY));
        std::fill(key, key + kRows * k, Int(-1));
    }

    // Takes in keys key0 .. key0 + count - 1 of one vector of rows; `largest` is that of each tile of keys.
    void take_block(const T* scores, const T* largest, int64_t key0, int64_t count, int vector) {
        const int64_t row0 = vector * L::kWidth;
        const T *column = scores + row0, *tile_max = largest + row0;
        const int64_t blocks_tiles = (count + kTileKeys - 1) / kTileKeys;
        const auto held = held_least(row0);
        auto bound = next_above<T>(held);
        // Once the lists are full their last entry is bound enough, unless scores rise with the keys.
        int64_t found = 0, hits = kMany;
        if (!L::any(L::equal(held, L::all(T(-INFINITY))))) hits = find_tiles(tile_max, blocks_tiles, bound, &found);
        if (hits >= kMany) {
            bound = L::max(kth_largest(tile_max, blocks_tiles), bound);
            find_tiles(tile_max, blocks_tiles, bound, &found);
        }
        for (int64_t n = 0; n < found;) {
            int64_t candidates = 0, words = 0;
            for (; n < found && candidates < kTogether; ++n) {
                const int64_t first = tiles[n] * kTileKeys;
                candidates += list_reached(column, first, std::min(count, first + kTileKeys), bound, &words);
            }
            insert_listed(column, key0, candidates, row0);
            bound = L::max(bound, next_above<T>(held_least(row0)));
        }
    }

  private:
    static constexpr int kSome = 4;  // what goes down a list together
    static_assert(kSlots % kSome == 0, "slots go down in whole groups");
    static constexpr int64_t kMany = 16 * L::kWidth;  // tiles reached, of all rows together

    // The k-th entry of each row's list.
    V held_least(int64_t row0) const { return L::load(score + (k - 1) * kRows + row0); }

    // The k-th largest maximum among groups of tiles, a bound for each row; -inf where there are too few. Few groups
    // are quicker to go through and bound nearly as well. Tiles of a group lie apart, for like scores are neighbours.
    V kth_largest(const T* tile_max, int64_t count) const {
        const int64_t together = std::max<int64_t>(1, count / (2 * k + 8)), groups = count / together;
        auto largest_of = [&](int64_t group) {
            auto largest = L::all(T(-INFINITY));
            for (int64_t tile = group; tile < count; tile += groups) {
                largest = L::max(largest, L::load(tile_max + tile * kRows));
            }
            return largest;
        };
        V list[kMostTopK];
        for (int64_t t = 0; t < k; ++t) list[t] = L::all(T(-INFINITY));
        for (int64_t group = 0; group < groups; group += kSome) {
            V carried[kSome];
            for (int i = 0; i < kSome; ++i) {
                carried[i] = group + i < groups ? largest_of(group + i) : L::all(T(-INFINITY));
            }
            for (int64_t t = 0; t < k; ++t) {
                auto held = list[t];
#pragma GCC unroll 4
                for (int i = 0; i < kSome; ++i) {
                    const auto lower = L::min(held, carried[i]);
                    held = L::max(held, carried[i]), carried[i] = lower;
                }
                list[t] = held;
            }
        }
        return list[k - 1];
    }

    // Lists the tiles in which some row reaches its bound, in rising order; gives in how many tiles how many rows do.
    int64_t find_tiles(const T* tile_max, int64_t count, V bound, int64_t* found) {
        int64_t hits = 0, listed = 0;
        for (int64_t tile = 0; tile < count; ++tile) {
            const int64_t rows = __builtin_popcount(L::flags(L::less_equal(bound, L::load(tile_max + tile * kRows))));
            tiles[listed] = Int(tile);
            listed += rows > 0;
            hits += rows;
        }
        *found = listed;
        return hits;
    }

    // Lists which rows reach their bounds with keys first .. last - 1, of one tile; gives how many times one does.
    int64_t list_reached(const T* column, int64_t first, int64_t last, V bound, int64_t* words) {
        int64_t found = 0;
        for (int64_t key = first; key < last; key += kWordKeys) {
            uint64_t flags = 0;
            auto look = [&](int64_t i) {
                flags |= uint64_t(L::flags(L::less_equal(bound, L::load(column + (key + i) * kRows)))) << i * L::kWidth;
            };
            if (last - key >= kWordKeys) {
#pragma GCC unroll 8
                for (int64_t i = 0; i < kWordKeys; ++i) look(i);
            } else {
                for (int64_t i = 0; i < last - key; ++i) look(i);
            }
            reached[*words] = {flags, key};
            *words += flags != 0;
            found += __builtin_popcountll(flags);
        }
        return found;
    }

    // Spreads the candidates listed over the slots of their rows, and inserts what the slots hold.
    void insert_listed(const T* column, int64_t key0, int64_t candidates, int64_t row0) {
        int64_t filled[L::kWidth] = {};
        // Copies, which stores to the lists cannot change in the compiler's eyes.
        T* const scores = slot_score;
        Int* const keys = slot_key;
        const Reached* word = reached;
        uint64_t flags = word->flags;
        for (int64_t n = 0; n < candidates; ++n) {
            const uint64_t place = uint64_t(__builtin_ctzll(flags)), lane = place % L::kWidth;
            const uint64_t key = uint64_t(word->key) + place / L::kWidth, slot = uint64_t(filled[lane]++);
            scores[slot * L::kWidth + lane] = column[key * kRows + lane];
            keys[slot * L::kWidth + lane] = Int(key0) + Int(key);
            if (slot + 1 == kSlots) {
                insert_slots(kSlots, row0);
                std::fill(filled, filled + L::kWidth, 0);
            }
            // On to the next word where this one has ended, without a branch: it would go either way at random.
            flags &= flags - 1;
            const uint64_t next = word[1].flags, ended = flags == 0;
            flags |= next & (0 - ended);
            word += ended;
        }
        insert_slots(*std::max_element(filled, filled + L::kWidth), row0);
    }

    // All rows' lists take in the slots, a few of which go down a list together, in their order. An entry comes to lie
    // behind those that are not smaller, and from there on all move down.
    void insert_slots(int64_t filled, int64_t row0) {
        for (int64_t slot = 0; slot < filled; slot += kSome) {
            V carried[kSome];
            I carried_key[kSome];
            typename L::M moving[kSome] = {};
#pragma GCC unroll 4
            for (int i = 0; i < kSome; ++i) {
                T* here = slot_score + (slot + i) * L::kWidth;
                carried[i] = L::load(here), carried_key[i] = L::load_int(slot_key + (slot + i) * L::kWidth);
                L::store(here, L::all(T(-INFINITY)));
            }
            for (int64_t t = 0; t < k; ++t) {
                T* here = score + t * kRows + row0;
                Int* key_here = key + t * kRows + row0;
                auto held = L::load(here);
                auto held_key = L::load_int(key_here);
#pragma GCC unroll 4
                for (int i = 0; i < kSome; ++i) {
                    moving[i] = L::either(moving[i], L::less(held, carried[i]));
                    const auto lower = L::min(held, carried[i]);
                    const auto lower_key = L::select_int(moving[i], held_key, carried_key[i]);
                    held = L::max(held, carried[i]), held_key = L::select_int(moving[i], carried_key[i], held_key);
                    carried[i] = lower, carried_key[i] = lower_key;
                }
                L::store(here, held), L::store_int(key_here, held_key);
            }
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
