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

struct alignas(8) Candidate {
    float score;
    int32_t key;
};

ATTNCAP_INLINE bool precedes(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.key < b.key);
}

// Comes after every candidate, and before none.
ATTNCAP_INLINE Candidate no_candidate() { return {-infinity(), INT32_MAX}; }

ATTNCAP_INLINE bool exists(const Candidate& candidate) { return candidate.key != INT32_MAX; }

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
    static constexpr int BATCH = 8;  // entries that are asked for together, for memory is far

    Candidate* entries;
    int stride;
    int count;

    ATTNCAP_INLINE void append(const Candidate& candidate) { entries[int64_t(count++) * stride] = candidate; }

    // Entries first .. first + BATCH - 1; `no_candidate()` past the last.
    ATTNCAP_INLINE void read(int first, Candidate (&batch)[BATCH]) const {
        ATTNCAP_UNROLL
        for (int i = 0; i < BATCH; ++i)
            batch[i] = first + i < count ? entries[int64_t(first + i) * stride] : no_candidate();
    }

    template <typename Visit>
    ATTNCAP_INLINE void each(const Visit& visit) const {
        ATTNCAP_KEEP_ROLLED
        for (int first = 0; first < count; first += BATCH) {
            Candidate batch[BATCH];
            read(first, batch);
            ATTNCAP_UNROLL
            for (int i = 0; i < BATCH; ++i) visit(batch[i]);
        }
    }

    // The first in order of those that come after `last`; `no_candidate()` where none does.
    ATTNCAP_INLINE Candidate next(const Candidate& last) const {
        Candidate found = no_candidate();
        each([&](const Candidate& candidate) {
            if (precedes(last, candidate) && precedes(candidate, found)) found = candidate;
        });
        return found;
    }

    // Drops what comes after `last`.
    ATTNCAP_INLINE void cut(const Candidate& last) {
        int kept = 0;
        ATTNCAP_KEEP_ROLLED
        for (int first = 0; first < count; first += BATCH) {
            Candidate batch[BATCH];
            read(first, batch);
            ATTNCAP_UNROLL
            for (int i = 0; i < BATCH; ++i)
                if (first + i < count && !precedes(last, batch[i])) entries[int64_t(kept++) * stride] = batch[i];
        }
        count = kept;
    }

    // How many scores reach the bound.
    ATTNCAP_INLINE int reaching(float bound) const {
        int number = 0;
        each([&](const Candidate& candidate) { number += candidate.score >= bound ? 1 : 0; });
        return number;
    }
};

}  // namespace attncap
