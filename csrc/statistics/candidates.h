// Candidates for a row's top k, found while its scores stream by.
//
// LANES threads share a row, each seeing its own keys. Each keeps the FEW largest scores it saw: every thread has
// seen FEW scores as large as its own least of them, so at least LANES * FEW scores of the row reach the smallest of
// these, which so bounds the row's (LANES * FEW)-th largest score from below. A score below the bound is not among
// the top LANES * FEW; the others join the thread's list. A list that runs full is cut to the row's top k so far.
//
// Order: the larger score first; of equal ones the smaller key.
#pragma once

#include "statistics/elementary.h"

namespace attncap {

struct Candidate {
    float score;
    int32_t key;
};

ATTNCAP_INLINE bool precedes(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.key < b.key);
}

// Comes after every candidate, and before none.
ATTNCAP_INLINE Candidate no_candidate() { return {-infinity(), INT32_MAX}; }

// The FEW largest of a stream of scores, falling.
template <int FEW>
struct Best {
    float score[FEW];

    ATTNCAP_INLINE void clear(float least) {
        for (int i = 0; i < FEW; ++i) score[i] = least;
    }
    ATTNCAP_INLINE void add(float x) {
        for (int i = 0; i < FEW; ++i) {
            const float kept = larger(score[i], x);
            x = smaller(score[i], x);
            score[i] = kept;
        }
    }
    ATTNCAP_INLINE float least() const { return score[FEW - 1]; }
};

// A thread's list in memory that it shares with no other: entry i stands `stride` entries after entry i - 1.
struct CandidateList {
    Candidate* entries;
    int stride;
    int count;

    ATTNCAP_INLINE const Candidate& operator[](int i) const { return entries[int64_t(i) * stride]; }
    ATTNCAP_INLINE void append(const Candidate& candidate) { entries[int64_t(count++) * stride] = candidate; }

    // The first in order of those that come after `last`; `no_candidate()` where none does.
    ATTNCAP_INLINE Candidate next(const Candidate& last) const {
        Candidate found = no_candidate();
        for (int i = 0; i < count; ++i) {
            const Candidate candidate = (*this)[i];
            if (precedes(last, candidate) && precedes(candidate, found)) found = candidate;
        }
        return found;
    }

    // Drops what comes after `last`.
    ATTNCAP_INLINE void cut(const Candidate& last) {
        int kept = 0;
        for (int i = 0; i < count; ++i) {
            const Candidate candidate = (*this)[i];
            if (!precedes(last, candidate)) entries[int64_t(kept++) * stride] = candidate;
        }
        count = kept;
    }
};

}  // namespace attncap
