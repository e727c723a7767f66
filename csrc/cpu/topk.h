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
    T* score = nullptr;  // [room][kRows]
    Int* key = nullptr;  // [room][kRows]
    // Scratch for one vector of rows.
    Int* tiles = nullptr;         // [block's tiles] those that some row reaches
    Reached* reached = nullptr;   // [kReachedRoom] words that are not 0
    T* slot_score = nullptr;      // [kSlots][kWidth] -inf between calls
    Int* slot_key = nullptr;      // [kSlots][kWidth]

    static constexpr int64_t kReachedRoom = kTogether + kTileWords + 1;

    // Calls body(std::integral_constant<int, room>) with the entries that a list has room for.
    template <class Body>
    static auto with_room(int64_t k, Body&& body) {
        if (k <= 1) return body(std::integral_constant<int, 1>{});
        if (k <= 4) return body(std::integral_constant<int, 4>{});
        if (k <= 8) return body(std::integral_constant<int, 8>{});
        if (k <= 16) return body(std::integral_constant<int, 16>{});
        if (k <= 32) return body(std::integral_constant<int, 32>{});
        return body(std::integral_constant<int, 64>{});
    }
    static int64_t room_for(int64_t k) {
        return k == 0 ? 0 : with_room(k, [](auto room) { return int64_t(room.value); });
    }

    void clear() {
        std::fill(score, score + kRows * room_for(k), T(-INFINITY));
        std::fill(key, key + kRows * room_for(k), Int(-1));
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
    static constexpr int64_t kMany = 16 * L::kWidth;  // tiles reached, of all rows together

    // The k-th entry of each row's list.
    V held_least(int64_t row0) const { return L::load(score + (k - 1) * kRows + row0); }

    // The k-th largest maximum among groups of tiles, a bound for each row; -inf where there are too few. Few groups
    // are quicker to go through and bound nearly as well. Tiles of a group lie apart, for like scores are neighbours.
    V kth_largest(const T* tile_max, int64_t count) const {
        return with_room(k, [&](auto room) {
            constexpr int kRoom = decltype(room)::value;
            V list[kRoom];
            for (int t = 0; t < kRoom; ++t) list[t] = L::all(T(-INFINITY));
            const int64_t together = std::max<int64_t>(1, count / (3 * kRoom)), groups = count / together;
            for (int64_t group = 0; group < groups; ++group) {
                auto carried = L::load(tile_max + group * kRows);
                for (int64_t tile = group + groups; tile < count; tile += groups) {
                    carried = L::max(carried, L::load(tile_max + tile * kRows));
                }
#pragma GCC unroll 16
                for (int t = 0; t < kRoom; ++t) {
                    const auto higher = L::max(list[t], carried);
                    carried = L::min(list[t], carried);
                    list[t] = higher;
                }
            }
            T sorted[kRoom * L::kWidth];
            for (int t = 0; t < kRoom; ++t) L::store(sorted + t * L::kWidth, list[t]);
            return L::load(sorted + (k - 1) * L::kWidth);
        });
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
        uint64_t flags = reached[0].flags;
        for (int64_t n = 0, word = 0; n < candidates; ++n) {
            const int64_t place = __builtin_ctzll(flags), lane = place % L::kWidth;
            const int64_t key = reached[word].key + place / L::kWidth, slot = filled[lane]++;
            slot_score[slot * L::kWidth + lane] = column[key * kRows + lane];
            slot_key[slot * L::kWidth + lane] = Int(key0 + key);
            if (slot + 1 == kSlots) {
                insert_slots(kSlots, row0);
                std::fill(filled, filled + L::kWidth, 0);
            }
            // On to the next word where this one has ended, without a branch: it would go either way at random.
            flags &= flags - 1;
            const uint64_t next = reached[word + 1].flags, ended = flags == 0;
            flags |= next & (0 - ended);
            word += int64_t(ended);
        }
        insert_slots(*std::max_element(filled, filled + L::kWidth), row0);
    }

    // All rows' lists take in a slot at a time; an entry goes behind those that are not smaller.
    void insert_slots(int64_t filled, int64_t row0) {
        with_room(k, [&](auto room) {
            constexpr int kRoom = decltype(room)::value;
            V held[kRoom];
            I held_key[kRoom];
            for (int t = 0; t < kRoom; ++t) {
                held[t] = L::load(score + t * kRows + row0), held_key[t] = L::load_int(key + t * kRows + row0);
            }
            for (int64_t slot = 0; slot < filled; ++slot) {
                auto carried = L::load(slot_score + slot * L::kWidth);
                auto carried_key = L::load_int(slot_key + slot * L::kWidth);
                L::store(slot_score + slot * L::kWidth, L::all(T(-INFINITY)));
#pragma GCC unroll 16
                for (int t = 0; t < kRoom; ++t) {
                    const auto before = L::less(held[t], carried);
                    const auto lower = L::min(held[t], carried);
                    const auto lower_key = L::select_int(before, held_key[t], carried_key);
                    held[t] = L::max(held[t], carried);
                    held_key[t] = L::select_int(before, carried_key, held_key[t]);
                    carried = lower, carried_key = lower_key;
                }
            }
            for (int t = 0; t < kRoom; ++t) {
                L::store(score + t * kRows + row0, held[t]), L::store_int(key + t * kRows + row0, held_key[t]);
            }
        });
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
