// The online softmax of softmax.h for rows whose scores lie in lines, key after key: lanes run along the keys.
//
// Invariant: after the last key of a block a line holds scores of -inf, later exponentials of 0, up to a whole vector.
#pragma once

#include "cpu/softmax.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
void cap_line(T* scores, int64_t count, T softcap) {
    using L = Lanes<T>;
    for (int64_t k = 0; k < count; k += L::kWidth) {
        L::store(scores + k, L::all(softcap) * tanh<T>(L::load(scores + k) / L::all(softcap)));
    }
}

// What a row's mask, which begins at `from`, adds to its scores.
template <class T>
void bias_line(T* scores, int64_t count, const Array& mask, const char* from) {
    using L = Lanes<T>;
    constexpr int64_t kChunk = 64;
    const int64_t step = mask.stride[3] * item_size(mask.dtype);
    T bias[kChunk] = {};
    for (int64_t first = 0; first < count; first += kChunk) {
        const int64_t some = std::min(kChunk, count - first);
        load_strided(bias, from + first * step, mask.dtype, mask.stride[3], some);
        for (int64_t k = 0; k < some; k += L::kWidth) {
            T* score = scores + first + k;
            L::store(score, biased<T>(L::load(score), L::load(bias + k)));
        }
    }
}

template <class T>
T largest_of_line(const T* scores, int64_t count) {
    using L = Lanes<T>;
    auto best = L::all(T(-INFINITY));
    for (int64_t k = 0; k < count; k += L::kWidth) best = L::max(best, L::load(scores + k));
    T lanes[L::kWidth];
    L::store(lanes, best);
    return *std::max_element(lanes, lanes + L::kWidth);
}

// Scores become exp(score - shift) in place; the sums over them go to the state of `row`, from which the first key is
// `apart` keys away.
template <class T, bool Entropy, bool Collision, bool Distance>
void exponentiate_line_as(T* scores, int64_t count, T apart, int64_t row, RowState<T>* s) {
    using L = Lanes<T>;
    constexpr int64_t kWidth = L::kWidth, kTogether = 4;
    const auto shift = L::all(s->shift[row]);
    T lanes[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) lanes[i] = apart + T(i);
    const auto base = L::load(lanes);
    ExponentialSums<T, Entropy, Collision> sums;
    auto take = [&](int64_t k, auto some) {
        constexpr int kSome = decltype(some)::value;
        typename L::V p[kSome];
        sums.take(scores + k, kWidth, shift, p);
#pragma GCC unroll 8
        for (int i = 0; Distance && i < kSome; ++i) {
            sums.moved = L::fma(p[i], L::abs(base + L::all(T(k + i * kWidth))), sums.moved);
        }
    };
    for (int64_t k = 0; k < count;) {
        const int64_t end = std::min(k + kSummed * kWidth, count);
        constexpr int64_t kStep = kTogether * kWidth;
        for (; k + kStep <= end; k += kStep) take(k, std::integral_constant<int, kTogether>{});
        for (; k < end; k += kWidth) take(k, std::integral_constant<int, 1>{});
        s->mass[row] += L::sum(sums.mass);
        if constexpr (Entropy) s->weighted[row] += L::sum(sums.weighted);
        if constexpr (Collision) s->squares[row] += L::sum(sums.squares);
        if constexpr (Distance) s->moved[row] += L::sum(sums.moved);
        sums = {};
    }
}

template <class T>
void exponentiate_line(const Problem& problem, T* scores, int64_t count, T apart, int64_t row, RowState<T>* s) {
    with_statistics(problem, [&](auto entropy, auto collision, auto distance) {
        exponentiate_line_as<T, entropy.value, collision.value, distance.value>(scores, count, apart, row, s);
    });
}

template <class T>
T sum_of_line(const T* exponentials, int64_t count) {
    T total = 0;
    for (int64_t k = 0; k < count;) {
        T sum = 0;
        for (const int64_t next = std::min(k + kSummed, count); k < next; ++k) sum += exponentials[k];
        total += sum;
    }
    return total;
}

// sum of the exponentials of keys whose tag is `tag`; none has a negative one.
template <class T>
T tag_sum_of_line(const T* exponentials, const int32_t* key_tags, int64_t count, int32_t tag) {
    using L = Lanes<T>;
    if (tag < 0) return 0;
    const auto wanted = L::all_int(tag);
    auto total = L::all(0);
    for (int64_t k = 0; k < count;) {
        auto sum = L::all(0);
        for (const int64_t next = std::min(k + kSummed * L::kWidth, count); k < next; k += L::kWidth) {
            typename L::Int tags[L::kWidth];
            for (int64_t i = 0; i < L::kWidth; ++i) tags[i] = k + i < count ? key_tags[k + i] : -1;
            sum = sum + L::select(L::equal_int(L::load_int(tags), wanted), L::load(exponentials + k), L::all(0));
        }
        total = total + sum;
    }
    return L::sum(total);
}

// received[k] += exponentials[k] * factor, where an exponential of 0 gives 0 whatever the factor.
template <class T>
void add_line(const T* exponentials, T factor, int64_t count, T* received) {
    if (factor == 0) return;
    for (int64_t k = 0; k < count; ++k) received[k] += exponentials[k] == 0 ? T(0) : exponentials[k] * factor;
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
