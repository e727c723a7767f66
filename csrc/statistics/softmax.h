// Online softmax of a row, with the statistics that ride along; one meaning for host and device.
//
// Scores are held as x, of which a step of 1 is `unit` bits. Invariant, after the keys seen so far: `peak` is the
// largest x and `reference` its bits, and with t = x * unit - reference, which is at most 0,
//
//     total = sum 2^t   weighted = sum 2^t t   squares = sum 4^t   distance = sum 2^t |position - key|
//
// Several threads may each hold the sums of a part of the keys, relative to the same reference; their sums are the
// row's.
#pragma once

#include "statistics/elementary.h"

namespace attncap {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float LEAST_BITS = -1.0e4f;  // 2^t is 0 there, and 2^t t is 0 and no NaN
constexpr float LARGEST = 3.402823466e+38f;

// What stands for the score of a key that is not seen: so low that its probability is 0 beside any seen key's, and
// finite in bits, so that nothing is a NaN. A row whose peak it is has seen no key.
ATTNCAP_INLINE float hidden_score(float unit) { return -0.25f * LARGEST / (unit > 1.0f ? unit : 1.0f); }

struct RowSums {
    float total = 0.0f, weighted = 0.0f, squares = 0.0f, distance = 0.0f;
};

// How sums relative to one reference become relative to another: by `shift` bits, a factor 2^shift.
struct Rescaling {
    float shift = 0.0f, factor = 1.0f;
};

ATTNCAP_INLINE Rescaling rescaling(float old_reference, float new_reference) {
    const float shift = larger(old_reference - new_reference, LEAST_BITS);
    return {shift, power_of_two(shift)};
}

ATTNCAP_INLINE RowSums rescaled(const RowSums& sums, const Rescaling& by) {
    RowSums now;
    now.total = sums.total * by.factor;
    now.weighted = by.factor * (sums.weighted + sums.total * by.shift);
    now.squares = sums.squares * (by.factor * by.factor);
    now.distance = sums.distance * by.factor;
    return now;
}

ATTNCAP_INLINE RowSums added(const RowSums& a, const RowSums& b) {
    return {a.total + b.total, a.weighted + b.weighted, a.squares + b.squares, a.distance + b.distance};
}

// Sums over a part of a row's outcomes, and what they are relative to.
struct Partial {
    float reference;
    RowSums sums;
};

// The sums over both parts, relative to the larger reference.
ATTNCAP_INLINE Partial joined(const Partial& a, const Partial& b) {
    const float reference = larger(a.reference, b.reference);
    return {reference, added(rescaled(a.sums, rescaling(a.reference, reference)),
                             rescaled(b.sums, rescaling(b.reference, reference)))};
}

// The outcome without a key: it has a probability, and a part in the entropy alone.
ATTNCAP_INLINE Partial null_outcome(float bits) { return {larger(bits, -0.25f * LARGEST), {1.0f, 0.0f, 0.0f, 0.0f}}; }

// What turns scores of a row into probabilities: p = 2^(x unit - reference - bits). Apart, for their sum has lost the
// digits of large scores; without a key, or where the row does not count, every p is 0.
struct RowScale {
    float reference = 0.0f, bits = infinity();
};

// Statistics of a row, masses apart: those of no key where it sees none.
struct RowResult {
    bool sees = false;
    float lse = -infinity(), max_logit = -infinity();
    float entropy = 0.0f, collision = 0.0f, distance = 0.0f, null_mass = 0.0f;
    float share = 0.0f;  // what a sum of 2^t times something is multiplied by to become a sum over probabilities
    RowScale scale;
};

// The row of sums over all its keys, relative to `peak`. `hidden` stands for keys it does not see, `score` is what a
// step of 1 in x is worth; `null_bits`, the bits of the outcome without a key, counts if `null_given`.
ATTNCAP_INLINE RowResult finished(const RowSums& sums, float peak, float hidden, float unit, float score,
                                  bool null_given, float null_bits) {
    RowResult row;
    row.sees = peak > hidden;
    if (!row.sees) return row;
    const float own = peak * unit;
    Partial all = {own, sums};
    const bool with_null = null_given && null_bits > -infinity();
    if (with_null) all = joined(all, null_outcome(null_bits));
    const float bits = logarithm(all.sums.total), inverse = 1.0f / all.sums.total;
    row.scale = {all.reference, bits};
    row.share = rescaling(own, all.reference).factor * inverse;
    row.lse = (all.reference + bits) * LN_2;
    row.max_logit = peak * score;
    row.entropy = larger((bits - all.sums.weighted * inverse) * LN_2, 0.0f);
    row.collision = all.sums.squares * (inverse * inverse);
    row.distance = all.sums.distance * inverse;
    if (with_null) row.null_mass = rescaling(null_bits, all.reference).factor * inverse;
    return row;
}

// cap tanh(product * scale_by_cap), exact to float32 near 0 too, where a difference from 1 would lose digits.
ATTNCAP_INLINE float soft_capped(float product, float scale_by_cap, float cap) {
    const float y = product * scale_by_cap, away = y < 0.0f ? -y : y;
    const float decay = power_of_two(-2.0f * LOG2_E * away);
    const float far = 1.0f - 2.0f * decay / (1.0f + decay);
    const float square = y * y;
    const float near =
        y * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315 + square * (62.0f / 2835)))));
    return cap * (away < 0.25f ? near : y < 0.0f ? -far : far);
}

}  // namespace attncap
