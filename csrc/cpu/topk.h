// The k largest scores of every row with their keys, kept sorted down the list for a vector of rows at once.
//
// Invariant: list entry t of a row is not smaller than entry t + 1, and of equal scores the lower key comes first.
// Keys arrive in rising order, so an equal newcomer goes behind; scores of -inf (unseen) never enter.
#pragma once

#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
struct TopK {
    using L = Lanes<T>;
    using Int = typename L::Int;
    int64_t k = 0;
    T* score = nullptr;  // [k][kRows]
    Int* key = nullptr;  // [k][kRows]

    void clear() {
        for (int64_t i = 0; i < k * kRows; ++i) score[i] = T(-INFINITY), key[i] = -1;
    }

    // What a score must exceed to enter the list of its row.
    typename L::V threshold(int vector) const { return L::load(score + (k - 1) * kRows + vector * L::kWidth); }

    // Enters `candidate` at key `index` where `enters` is set.
    void insert(int vector, typename L::M enters, typename L::V candidate, Int index) {
        auto carried = L::select(enters, candidate, L::all(T(-INFINITY)));
        auto carried_key = L::all_int(index);
        // A lane that has found its place shifts everything below it, equal scores too.
        auto shifting = L::less(carried, carried);
        for (int64_t t = 0; t < k; ++t) {
            T* here = score + t * kRows + vector * L::kWidth;
            Int* here_key = key + t * kRows + vector * L::kWidth;
            const auto held = L::load(here);
            const auto held_key = L::load_int(here_key);
            shifting = L::either(shifting, L::less(held, carried));
            L::store(here, L::select(shifting, carried, held));
            L::store_int(here_key, L::select_int(shifting, carried_key, held_key));
            carried = L::select(shifting, held, carried);
            carried_key = L::select_int(shifting, held_key, carried_key);
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
