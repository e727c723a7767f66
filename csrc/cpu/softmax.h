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

// Keys summed by themselves before they join a row's sum: a long sum would round equal numbers all the same way.
constexpr int64_t kSummed = 64;

// Pointers into the workspace, each [kRows] or [n][kRows].
template <class T>
struct RowState {
    using Int = typename Lanes<T>::Int;
    T *max, *mass, *weighted, *squares, *moved, *sink, *diagonal, *decay, *shift;
    T* apart;             // 0, 1, 2, ... for the keys of a block
    T* tags;              // [tags][kRows]
    T* offset_score;      // [offsets][kRows] raw scores, -inf where not seen
    Int* position;        // of each row
    int32_t* query_tags;  // [tags][kRows]
    TopK<T> top;
};

// What scores are taken relative to: the largest score, or 0 where there is none yet or it is NaN. A NaN among the
// scores still makes the row's sums NaN, while exp(-inf - shift) stays exactly 0 for keys that the row does not see.
template <class T>
inline typename Lanes<T>::V shift_of(typename Lanes<T>::V largest) {
    using L = Lanes<T>;
    const auto usable = L::less(L::all(T(-INFINITY)), largest);
    return L::select(usable, largest, L::all(0));
}

// The block's largest score of every row, from those of its tiles of keys; the top-k lists take the block in.
template <class T>
void scan_scores(const T* scores, T* largest, int64_t key0, int64_t count, int vectors, RowState<T>* state,
                 T* block_max) {
    using L = Lanes<T>;
    const int64_t tiles = (count + L::kTileKeys - 1) / L::kTileKeys;
    for (int v = 0; v < vectors; ++v) {
        auto best = L::all(T(-INFINITY));
        for (int64_t tile = 0; tile < tiles; ++tile) {
            best = L::max(best, L::load(largest + tile * kRows + v * L::kWidth));
        }
        L::store(block_max + v * L::kWidth, best);
    }
    if (state->top.k > 0) state->top.take_block(scores, largest, key0, count, vectors);
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

// Sums over exponentials of neighbouring keys, lane by lane.
template <class T, bool Entropy, bool Collision>
struct ExponentialSums {
    using L = Lanes<T>;
    typename L::V mass = L::all(0), weighted = mass, squares = mass, moved = mass;

    // N vectors of scores, `step` apart, become exp(score - shift) in place and in p, and join all sums but `moved`.
    // N is a constant, so that their evaluations interleave.
    template <int N>
    void take(T* scores, int64_t step, typename L::V shift, typename L::V (&p)[N]) {
        typename L::V t[N];
        typename L::M kept[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            p[i] = t[i] = L::load(scores + i * step) - shift;
            kept[i] = weighs<T>(t[i]);
        }
        exp_nonpositive<T>(p, kept);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            L::store(scores + i * step, p[i]);
            mass = mass + p[i];
            if constexpr (Entropy) weighted = L::fma_kept(kept[i], p[i], t[i], weighted);
            if constexpr (Collision) squares = L::fma(p[i], p[i], squares);
        }
    }
};

// How a range of keys lies to the rows of a vector, as far as the distance between them is wanted.
enum class Lie { kNotAsked, kAside, kAmong };

// A range of keys of one vector of rows, whose scores become exponentials.
template <class T>
struct Column {
    T* scores;        // of the block's first key
    uint32_t* pairs;  // null, or where exponentials of two neighbouring keys go as a word of bfloat16s
    int64_t first, last;
    typename Lanes<T>::V shift;
    const T* apart;  // kAside: apart[step * key] + base is the distance between a key and the row; both never negative
    int64_t step;
    typename Lanes<T>::V base;  // kAmong: key - row of the block's first key
};

// Scores become exp(score - shift) in place; the sums over the range go to the state, whose vector begins at r.
template <class T, bool Entropy, bool Collision, Lie lie>
void exponentiate_column(const Column<T>& c, RowState<T>* s, int64_t r) {
    using L = Lanes<T>;
    ExponentialSums<T, Entropy, Collision> sums;
    auto take = [&](int64_t k, auto some) {
        constexpr int kSome = decltype(some)::value;
        typename L::V p[kSome];
        sums.take(c.scores + k * kRows, kRows, c.shift, p);
#pragma GCC unroll 8
        for (int i = 0; i < kSome; ++i) {
            auto& moved = sums.moved;
            if constexpr (lie == Lie::kAside) moved = L::fma(p[i], L::all(c.apart[c.step * (k + i)]), moved);
            if constexpr (lie == Lie::kAmong) moved = L::fma(p[i], L::abs(c.base + L::all(T(k + i))), moved);
        }
        if constexpr (kHasPairs && sizeof(T) == 4) {
            if (!c.pairs) return;
#pragma GCC unroll 8
            for (int i = 0; i < kSome; i += 2) {
                const auto second = i + 1 < kSome ? p[(i + 1) % kSome] : L::all(0);
                Pairs<T>::store_rounded(c.pairs + (k + i) / 2 * kRows, p[i], second);
            }
        }
    };
    constexpr int kTogether = 4;
    auto add_up = [&] {
        if constexpr (lie == Lie::kAside) sums.moved = L::fma(sums.mass, c.base, sums.moved);
        L::store(s->mass + r, L::load(s->mass + r) + sums.mass);
        if constexpr (Entropy) L::store(s->weighted + r, L::load(s->weighted + r) + sums.weighted);
        if constexpr (Collision) L::store(s->squares + r, L::load(s->squares + r) + sums.squares);
        if constexpr (lie != Lie::kNotAsked) L::store(s->moved + r, L::load(s->moved + r) + sums.moved);
        sums = {};
    };
    int64_t k = c.first;
    while (k + kTogether <= c.last) {
        const int64_t end = std::min(k + kSummed, c.last);
        for (; k + kTogether <= end; k += kTogether) take(k, std::integral_constant<int, kTogether>{});
        add_up();
    }
    for (; k + 2 <= c.last; k += 2) take(k, std::integral_constant<int, 2>{});
    if (k < c.last) take(k, std::integral_constant<int, 1>{});
    add_up();
}

// The whole block of `count` keys. `apart` is 0, 1, 2, ... for as many.
template <class T, bool Entropy, bool Collision, bool Distance>
void exponentiate_as(T* scores, int64_t key0, int64_t count, int vectors, RowState<T>* s, uint32_t* pairs) {
    using L = Lanes<T>;
    for (int v = 0; v < vectors; ++v) {
        const int64_t r = v * L::kWidth;
        Column<T> c{scores + r, pairs ? pairs + r : nullptr, 0, count, L::load(s->shift + r), nullptr, 0, L::all(0)};
        if constexpr (!Distance) {
            exponentiate_column<T, Entropy, Collision, Lie::kNotAsked>(c, s, r);
        } else {
            // Keys before all rows, among them, and after all; even, for the sake of the pairs.
            const auto [low, high] = std::minmax_element(s->position + r, s->position + r + L::kWidth);
            const int64_t among = std::clamp<int64_t>(*low - key0, 0, count) & ~int64_t(1);
            const int64_t after = std::min((std::clamp<int64_t>(*high - key0, among, count) + 1) & ~int64_t(1), count);
            // The distance of the key that lies nearest to the rows, one lane each; exact below 2^24.
            auto distance = [&](int64_t key, int sign) {
                T lanes[L::kWidth];
                for (int i = 0; i < L::kWidth; ++i) lanes[i] = T(sign * (key0 + key - int64_t(s->position[r + i])));
                return L::load(lanes);
            };
            if (among > 0) {
                c.last = among, c.apart = s->apart + among - 1, c.step = -1, c.base = distance(among - 1, -1);
                exponentiate_column<T, Entropy, Collision, Lie::kAside>(c, s, r);
            }
            if (after > among) {
                c.first = among, c.last = after, c.base = distance(0, 1);
                exponentiate_column<T, Entropy, Collision, Lie::kAmong>(c, s, r);
            }
            if (count > after) {
                c.first = after, c.last = count, c.apart = s->apart - after, c.step = 1, c.base = distance(after, 1);
                exponentiate_column<T, Entropy, Collision, Lie::kAside>(c, s, r);
            }
        }
    }
}

// Calls body(entropy, collision, distance), each a constant that says whether it is wanted.
template <class Body>
void with_statistics(const Problem& problem, Body&& body) {
    auto with = [](bool flag, auto&& next) { flag ? next(std::true_type{}) : next(std::false_type{}); };
    with(problem.entropy, [&](auto entropy) {
        with(problem.collision, [&](auto collision) {
            with(problem.distance, [&](auto distance) { body(entropy, collision, distance); });
        });
    });
}

template <class T>
void exponentiate(const Problem& problem, T* scores, int64_t key0, int64_t count, int vectors, RowState<T>* s,
                  uint32_t* pairs) {
    with_statistics(problem, [&](auto entropy, auto collision, auto distance) {
        exponentiate_as<T, entropy.value, collision.value, distance.value>(scores, key0, count, vectors, s, pairs);
    });
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
        T* total = s->sink + v * L::kWidth;
        for (int64_t k = 0; k < end - key0;) {
            auto sum = L::all(0);
            for (const int64_t next = std::min(k + kSummed, end - key0); k < next; ++k) {
                sum = sum + L::load(exponentials + k * kRows + v * L::kWidth);
            }
            L::store(total, L::load(total) + sum);
        }
    }
}

// sum of the exponentials of keys whose tag equals the row's; negative key tags match nothing. Of all vectors together,
// whose sums do not wait for one another.
template <class T, int Vectors>
void add_tag_of(const T* exponentials, const int32_t* key_tags, int64_t count, const int32_t* row_tags, T* sums) {
    using L = Lanes<T>;
    typename L::I wanted[Vectors];
    for (int v = 0; v < Vectors; ++v) {
        typename L::Int tags[L::kWidth];
        for (int lane = 0; lane < L::kWidth; ++lane) tags[lane] = row_tags[v * L::kWidth + lane];
        wanted[v] = L::load_int(tags);
    }
    for (int64_t k = 0; k < count;) {
        typename L::V sum[Vectors];
        for (auto& one : sum) one = L::all(0);
        for (const int64_t next = std::min(k + kSummed, count); k < next; ++k) {
            if (key_tags[k] < 0) continue;
            const auto tag = L::all_int(key_tags[k]);
            const T* p = exponentials + k * kRows;
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) {
                sum[v] = sum[v] + L::select(L::equal_int(wanted[v], tag), L::load(p + v * L::kWidth), L::all(0));
            }
        }
        for (int v = 0; v < Vectors; ++v) {
            T* total = sums + v * L::kWidth;
            L::store(total, L::load(total) + sum[v]);
        }
    }
}

template <class T>
void add_tag(const T* exponentials, const int32_t* key_tags, int64_t count, int64_t tag, int vectors, RowState<T>* s) {
    using L = Lanes<T>;
    for (int v = 0; v < vectors; v += L::kTileVectors) {
        with_constant<L::kTileVectors>(std::min(L::kTileVectors, vectors - v), [&](auto some) {
            const int64_t r = v * L::kWidth, of_tag = tag * kRows + r;
            add_tag_of<T, decltype(some)::value>(exponentials + r, key_tags, count, s->query_tags + of_tag,
                                                 s->tags + of_tag);
        });
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
