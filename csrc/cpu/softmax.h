// The online softmax of a task and the sums that ride on it.
//
// Invariant between blocks of keys, with m the largest score so far and t = score - m <= 0:
//   mass = sum exp(t)   weighted = sum exp(t) t   squares = sum exp(t)^2   moved = sum exp(t) |position - key|
// and the partial masses likewise; entropy = log(mass) - weighted / mass. Accumulating t instead of the score keeps
// the entropy's digits at large scores.
#pragma once

#include "cpu/elementary.h"
#include "cpu/topk.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Pointers into the workspace, each [kRows] or [n][kRows].
template <class T>
struct RowState {
    using Int = typename Lanes<T>::Int;
    T *max, *mass, *weighted, *squares, *moved, *sink, *diagonal, *decay, *shift;
    T* tags;              // [tags][kRows]
    T* offset_score;      // [offsets][kRows] raw scores, -inf where not seen
    Int* position;        // of each row
    int32_t* query_tags;  // [tags][kRows]
    TopK<T> top;
};

// max(a - b, floor) makes exp's argument finite where both are -inf, and where a row has seen nothing yet.
template <class T>
inline typename Lanes<T>::V bounded_difference(typename Lanes<T>::V a, typename Lanes<T>::V b) {
    using L = Lanes<T>;
    return L::max(L::all(T(2) * Constants<T>::kExpMin), a - b);
}

// What scores are taken relative to: the largest score, or 0 where there is none yet or it is NaN. A NaN among the
// scores still makes the row's sums NaN, while exp(-inf - shift) stays exactly 0 for keys that the row does not see.
template <class T>
inline typename Lanes<T>::V shift_of(typename Lanes<T>::V largest) {
    using L = Lanes<T>;
    const auto usable = L::less(L::all(T(-INFINITY)), largest);
    return L::select(usable, largest, L::all(0));
}

// The block's largest score of every row; on the way the top-k lists take the block in.
template <class T>
void scan_scores(const T* scores, int64_t key0, int64_t count, int vectors, RowState<T>* state, T* block_max) {
    using L = Lanes<T>;
    for (int v = 0; v < vectors; ++v) {
        auto largest = L::all(T(-INFINITY));
        if (state->top.k > 0) {
            largest = state->top.take_block(scores, key0, count, v);
        } else {
            for (int64_t k = 0; k < count; ++k) largest = L::max(largest, L::load(scores + k * kRows + v * L::kWidth));
        }
        L::store(block_max + v * L::kWidth, largest);
    }
}

// Moves every sum to the new maximum; decay is the factor that the output rows still need.
template <class T>
void rescale(const T* block_max, int vectors, int64_t tags, RowState<T>* s) {
    using L = Lanes<T>;
    for (int v = 0; v < vectors; ++v) {
        const int64_t r = v * L::kWidth;
        const auto old_max = L::load(s->max + r);
        const auto new_max = L::max(old_max, L::load(block_max + r));
        const auto shift = shift_of<T>(new_max);
        const auto change = bounded_difference<T>(old_max, shift);
        const auto decay = exp_nonpositive<T>(change);
        const auto mass = L::load(s->mass + r);
        L::store(s->max + r, new_max);
        L::store(s->shift + r, shift);
        L::store(s->decay + r, decay);
        L::store(s->mass + r, mass * decay);
        L::store(s->weighted + r, decay * L::fma(mass, change, L::load(s->weighted + r)));
        L::store(s->squares + r, decay * decay * L::load(s->squares + r));
        for (T* sum : {s->moved, s->sink, s->diagonal}) L::store(sum + r, decay * L::load(sum + r));
        for (int64_t t = 0; t < tags; ++t) L::store(s->tags + t * kRows + r, decay * L::load(s->tags + t * kRows + r));
    }
}

// Scores become exp(score - shift) in place; the sums over the block go to the state.
template <class T, bool Entropy, bool Collision, bool Distance>
void exponentiate_as(T* scores, int64_t key0, int64_t count, int vectors, RowState<T>* s) {
    using L = Lanes<T>;
    for (int v = 0; v < vectors; ++v) {
        const int64_t r = v * L::kWidth;
        const auto shift = L::load(s->shift + r);
        T ahead[L::kWidth];  // of the block's first key; exact, for it fits the mantissa or rounds as the distance
                             // would
        for (int lane = 0; lane < L::kWidth; ++lane) ahead[lane] = T(key0 - int64_t(s->position[r + lane]));
        auto distance = L::load(ahead);
        auto mass = L::all(0), weighted = L::all(0), squares = L::all(0), moved = L::all(0);
        for (int64_t k = 0; k < count; ++k) {
            T* score = scores + k * kRows + r;
            const auto t = bounded_difference<T>(L::load(score), shift);
            const auto p = exp_nonpositive<T>(t);
            L::store(score, p);
            mass = mass + p;
            if constexpr (Entropy) weighted = L::fma(p, t, weighted);
            if constexpr (Collision) squares = L::fma(p, p, squares);
            if constexpr (Distance) {
                moved = L::fma(p, L::abs(distance), moved);
                distance = distance + L::all(1);
            }
        }
        L::store(s->mass + r, L::load(s->mass + r) + mass);
        if constexpr (Entropy) L::store(s->weighted + r, L::load(s->weighted + r) + weighted);
        if constexpr (Collision) L::store(s->squares + r, L::load(s->squares + r) + squares);
        if constexpr (Distance) L::store(s->moved + r, L::load(s->moved + r) + moved);
    }
}

template <class T>
void exponentiate(const Problem& problem, T* scores, int64_t key0, int64_t count, int vectors, RowState<T>* s) {
    const int which = (problem.entropy ? 4 : 0) + (problem.collision ? 2 : 0) + (problem.distance ? 1 : 0);
    switch (which) {
        case 0:
            return exponentiate_as<T, false, false, false>(scores, key0, count, vectors, s);
        case 1:
            return exponentiate_as<T, false, false, true>(scores, key0, count, vectors, s);
        case 2:
            return exponentiate_as<T, false, true, false>(scores, key0, count, vectors, s);
        case 3:
            return exponentiate_as<T, false, true, true>(scores, key0, count, vectors, s);
        case 4:
            return exponentiate_as<T, true, false, false>(scores, key0, count, vectors, s);
        case 5:
            return exponentiate_as<T, true, false, true>(scores, key0, count, vectors, s);
        case 6:
            return exponentiate_as<T, true, true, false>(scores, key0, count, vectors, s);
        case 7:
            return exponentiate_as<T, true, true, true>(scores, key0, count, vectors, s);
    }
}

// sum of the exponentials of keys key0 .. key1 - 1 that lie at most `reach` from the row, for rows near them.
template <class T>
void add_diagonal(const T* exponentials, int64_t key0, int64_t key1, int64_t reach, int64_t rows, RowState<T>* s) {
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t position = s->position[row];
        const int64_t first = std::max(key0, position - reach), last = std::min(key1 - 1, position + reach);
        T sum = 0;
        for (int64_t key = first; key <= last; ++key) sum += exponentials[(key - key0) * kRows + row];
        s->diagonal[row] += sum;
    }
}

// sum of the exponentials of keys key0 .. end - 1.
template <class T>
void add_sink(const T* exponentials, int64_t key0, int64_t end, int vectors, RowState<T>* s) {
    using L = Lanes<T>;
    for (int v = 0; v < vectors; ++v) {
        auto sum = L::load(s->sink + v * L::kWidth);
        for (int64_t k = 0; k < end - key0; ++k) sum = sum + L::load(exponentials + k * kRows + v * L::kWidth);
        L::store(s->sink + v * L::kWidth, sum);
    }
}

// sum of the exponentials of keys whose tag equals the row's; negative key tags match nothing.
template <class T>
void add_tag(const T* exponentials, const int32_t* key_tags, int64_t count, int64_t tag, int vectors, RowState<T>* s) {
    using L = Lanes<T>;
    using Int = typename L::Int;
    for (int v = 0; v < vectors; ++v) {
        const int64_t r = tag * kRows + v * L::kWidth;
        Int row_tags[L::kWidth];
        for (int lane = 0; lane < L::kWidth; ++lane) row_tags[lane] = s->query_tags[r + lane];
        const auto wanted = L::load_int(row_tags);
        auto sum = L::load(s->tags + r);
        for (int64_t k = 0; k < count; ++k) {
            if (key_tags[k] < 0) continue;
            const auto p = L::load(exponentials + k * kRows + v * L::kWidth);
            sum = sum + L::select(L::equal_int(wanted, L::all_int(key_tags[k])), p, L::all(0));
        }
        L::store(s->tags + r, sum);
    }
}

// Raw scores at the keys position + offset, as far as this block holds them.
template <class T>
void pick_offsets(const T* scores, int64_t key0, int64_t key1, const std::vector<int64_t>& offsets, int64_t rows,
                  RowState<T>* s) {
    for (size_t o = 0; o < offsets.size(); ++o) {
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t key = s->position[row] + offsets[o];
            if (key >= key0 && key < key1) s->offset_score[o * kRows + row] = scores[(key - key0) * kRows + row];
        }
    }
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
