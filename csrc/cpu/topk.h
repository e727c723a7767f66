// The k largest scores of every row with their keys.
//
// Invariant: list entry t of a row is not smaller than entry t + 1, and of equal scores the lower key comes first.
// Keys arrive in rising order, so an equal newcomer goes behind; scores of -inf (unseen) never enter.
//
// Few keys of a block matter to a row. The block's keys are cut into groups of kGroupKeys; the k-th largest of the
// group maxima is a lower bound of the k-th largest score, so only groups that reach it are looked into, and what
// reaches it there is inserted, all rows of a vector at once.
#pragma once

#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kGroupKeys = 4;

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
    using Int = typename L::Int;
    int64_t k = 0;
    T* score = nullptr;  // [k][kRows]
    Int* key = nullptr;  // [k][kRows]
    // Scratch for one vector of rows.
    T* group_max = nullptr;        // [kBlockKeys / kGroupKeys][kWidth]
    Int* reached = nullptr;        // group * kWidth + lane of every group that reaches its row's bound
    T* candidate = nullptr;        // [kBlockKeys][kWidth]
    Int* candidate_key = nullptr;  // [kBlockKeys][kWidth]

    void clear() {
        for (int64_t i = 0; i < k * kRows; ++i) score[i] = T(-INFINITY), key[i] = -1;
    }

    // Takes in keys key0 .. key0 + count - 1 of one vector of rows, gives their largest scores.
    V take_block(const T* scores, int64_t key0, int64_t count, int vector) {
        const T* column = scores + vector * L::kWidth;
        const int64_t groups = (count + kGroupKeys - 1) / kGroupKeys;
        auto largest = L::all(T(-INFINITY));
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * kGroupKeys;
            auto best = L::load(column + first * kRows);
            for (int64_t i = first + 1; i < std::min(count, first + kGroupKeys); ++i) {
                best = L::max(best, L::load(column + i * kRows));
            }
            L::store(group_max + g * L::kWidth, best);
            largest = L::max(largest, best);
        }
        const auto held = L::load(score + (k - 1) * kRows + vector * L::kWidth);
        auto bound = next_above<T>(held);
        // Once the list is full its last entry is bound enough, unless scores rise with the keys.
        int64_t hits = kMany;
        if (!L::any(L::equal(held, L::all(T(-INFINITY))))) hits = find_groups(groups, bound);
        if (hits >= kMany) {
            bound = L::max(kth_largest(groups), bound);
            hits = find_groups(groups, bound);
        }
        const int64_t most = find_candidates(column, key0, count, bound, hits);
        with_capacity([&](auto capacity) { insert<decltype(capacity)::value>(vector, most); });
        return largest;
    }

  private:
    static constexpr int64_t kMany = 16 * L::kWidth;  // groups reached, of all rows together

    int64_t counts_[L::kWidth];

    template <class Body>
    void with_capacity(Body&& body) const {
        if (k <= 1) return body(std::integral_constant<int, 1>{});
        if (k <= 4) return body(std::integral_constant<int, 4>{});
        if (k <= 8) return body(std::integral_constant<int, 8>{});
        if (k <= 16) return body(std::integral_constant<int, 16>{});
        if (k <= 32) return body(std::integral_constant<int, 32>{});
        return body(std::integral_constant<int, 64>{});
    }

    // The k-th largest group maximum of each row; -inf where there are fewer groups.
    V kth_largest(int64_t groups) const {
        V result = L::all(T(-INFINITY));
        with_capacity([&](auto capacity) {
            constexpr int n = decltype(capacity)::value;
            T sorted[n * L::kWidth];
            V list[n];
            for (int t = 0; t < n; ++t) list[t] = L::all(T(-INFINITY));
            for (int64_t g = 0; g < groups; ++g) {
                auto carried = L::load(group_max + g * L::kWidth);
#pragma GCC unroll 16
                for (int t = 0; t < n; ++t) {
                    const auto higher = L::max(list[t], carried);
                    carried = L::min(list[t], carried);
                    list[t] = higher;
                }
            }
            for (int t = 0; t < n; ++t) L::store(sorted + t * L::kWidth, list[t]);
            result = L::load(sorted + (k - 1) * L::kWidth);
        });
        return result;
    }

    // Lists the groups that reach their row's bound, in rising order of keys; gives how many.
    int64_t find_groups(int64_t groups, V bound) {
        int64_t hits = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const auto reaches = L::less_equal(bound, L::load(group_max + g * L::kWidth));
            hits += L::list_lanes(reaches, Int(g * L::kWidth), reached + hits);
        }
        return hits;
    }

    // Collects what reaches its row's bound in the groups listed; gives the largest number of a row.
    int64_t find_candidates(const T* column, int64_t key0, int64_t count, V bound, int64_t hits) {
        T bounds[L::kWidth];
        L::store(bounds, bound);
        std::fill(counts_, counts_ + L::kWidth, 0);
        for (int64_t hit = 0; hit < hits; ++hit) {
            const int64_t lane = reached[hit] % L::kWidth, first = reached[hit] / L::kWidth * kGroupKeys;
            int64_t n = counts_[lane];
            auto offer = [&](int64_t i) {
                // Written always and counted only when it reaches the bound: no branch to mispredict.
                const T value = column[i * kRows + lane];
                candidate[n * L::kWidth + lane] = value;
                candidate_key[n * L::kWidth + lane] = Int(key0 + i);
                n += bounds[lane] <= value;
            };
            if (first + kGroupKeys <= count) {
#pragma GCC unroll 4
                for (int64_t i = 0; i < kGroupKeys; ++i) offer(first + i);
            } else {
                for (int64_t i = first; i < count; ++i) offer(i);
            }
            counts_[lane] = n;
        }
        return *std::max_element(counts_, counts_ + L::kWidth);
    }

    // Inserts `most` candidates a row; the list passes through registers once.
    template <int Capacity>
    void insert(int vector, int64_t most) {
        if (most == 0) return;
        V held[Capacity];
        typename L::I held_key[Capacity];
        const int64_t shift = vector * L::kWidth;
        for (int t = 0; t < Capacity; ++t) {
            const bool exists = t < k;
            held[t] = exists ? L::load(score + t * kRows + shift) : L::all(T(-INFINITY));
            held_key[t] = exists ? L::load_int(key + t * kRows + shift) : L::all_int(-1);
        }
        Int counts[L::kWidth];
        std::copy(counts_, counts_ + L::kWidth, counts);
        const auto count = L::load_int(counts);
        for (int64_t c = 0; c < most; ++c) {
            const auto exists = L::less_int(L::all_int(Int(c)), count);
            auto carried = L::select(exists, L::load(candidate + c * L::kWidth), L::all(T(-INFINITY)));
            auto carried_key = L::load_int(candidate_key + c * L::kWidth);
            // A row that has found its place shifts everything below it, equal scores too.
            auto shifting = L::less(carried, carried);
#pragma GCC unroll 16
            for (int t = 0; t < Capacity; ++t) {
                shifting = L::either(shifting, L::less(held[t], carried));
                const auto moved = held[t];
                const auto moved_key = held_key[t];
                held[t] = L::select(shifting, carried, moved);
                held_key[t] = L::select_int(shifting, carried_key, moved_key);
                carried = L::select(shifting, moved, carried);
                carried_key = L::select_int(shifting, moved_key, carried_key);
            }
        }
        for (int t = 0; t < Capacity && t < k; ++t) {
            L::store(score + t * kRows + shift, held[t]);
            L::store_int(key + t * kRows + shift, held_key[t]);
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
