// A consumer thread's candidates for the top k of its two rows (statistics/candidates.h).
#pragma once

#include "cuda/forward_rows.cuh"

namespace attncap {

ATTNCAP_DEVICE Candidate quad_first(Candidate candidate) {
    ATTNCAP_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
        const Candidate other = {device::shuffle_xor(candidate.score, mask), device::shuffle_xor(candidate.key, mask)};
        if (precedes(other, candidate)) candidate = other;
    }
    return candidate;
}

ATTNCAP_DEVICE int quad_sum(int x) {
    x += device::shuffle_xor(x, 1);
    return x + device::shuffle_xor(x, 2);
}

template <typename C>
struct TopK {
    static constexpr int GROUPS = Rows<C>::COLUMNS / 8;          // of columns, whose largest scores are looked at first
    static constexpr int FULL = C::CAPACITY - Rows<C>::COLUMNS;  // a longer list might not hold a tile's candidates
    static_assert(Rows<C>::COLUMNS % 8 == 0, "groups are whole");
    static_assert(!C::TOPK || FULL >= C::MOST_TOPK, "a list that is cut to the top k has room for a tile");

    Best<C::FEW> best[2];
    float bound[2];  // what a score must reach; infinite for rows that do not count
    int count[2];
    Candidate* lists;  // of all CTAs

    ATTNCAP_DEVICE void begin(const ForwardParams& params, const bool (&counts)[2]) {
        lists = params.lists;
        for (int r = 0; r < 2; ++r) {
            best[r].clear(params.hidden);
            // The least that is above the hidden score, which is negative.
            bound[r] = counts[r] ? float_of(bits_of(params.hidden) - 1) : infinity();
            count[r] = 0;
        }
    }

    // Takes the scores that reach the bound from a tile, whose largest in each group of 8 columns are given.
    ATTNCAP_DEVICE void collect(const float (&s)[C::KEYS / 2], const float (&group)[2][GROUPS], int start, int topk,
                                bool first) {
        if (first && bounded_by_best(topk)) bound_by_groups(group);
        bool mine = false;
        ATTNCAP_UNROLL
        for (int r = 0; r < 2; ++r) {
            ATTNCAP_UNROLL
            for (int g = 0; g < GROUPS; ++g) mine = mine || group[r][g] >= bound[r];
        }
        if (!device::any(mine)) return;
        if (ATTNCAP_SELDOM(some_list_is_full())) make_room(topk);
        ATTNCAP_UNROLL
        for (int r = 0; r < 2; ++r) {
            ATTNCAP_UNROLL
            for (int g = 0; g < GROUPS; ++g)
                if (group[r][g] >= bound[r]) append_group(s, r, g, start);
            if (bounded_by_best(topk)) bound[r] = larger(bound[r], quad_smallest(best[r].least()));
        }
    }

    // Writes the top k of row r, whose probabilities are 2^(x unit - reference) times `share`; none if it does not
    // count.
    ATTNCAP_DEVICE void write(int r, bool counts, float unit, float reference, float share, int topk, float* prob,
                              int32_t* index) {
        CandidateList own = list(r);
        own.cut({bound[r], INT32_MAX});
        Candidate last = {infinity(), -1};
        for (int i = 0; i < topk; ++i) {
            last = quad_first(own.next(last));
            if (i % 4 != lane() % 4 || prob == nullptr) continue;
            const bool found = counts && last.score > -infinity();
            prob[i] = found ? power_of_two(fmaf(last.score, unit, -reference)) * share : 0.0f;
            index[i] = found ? last.key : -1;
        }
    }

  private:
    static constexpr int NARROWINGS = 10;

    // Whether what the quad's lanes keep bounds the k-th largest score.
    static ATTNCAP_DEVICE bool bounded_by_best(int topk) { return !C::EVERYTHING || topk <= 4 * C::FEW; }

    // Where the list is found again each time: it is seldom wanted, and registers are dear.
    ATTNCAP_DEVICE CandidateList list(int r) const {
        const int thread = device::again(device::thread()), warp = thread / 32 - 4;
        Candidate* own = lists + device::block() * C::LIST_ENTRIES + warp * 64 * C::CAPACITY;
        return {own + 32 * r + thread % 32, 64, count[r]};
    }

    ATTNCAP_DEVICE bool some_list_is_full() const { return device::any(count[0] > FULL || count[1] > FULL); }

    // Before the first scores are taken: each group's largest is a score of its own, so that they bound too.
    ATTNCAP_DEVICE void bound_by_groups(const float (&group)[2][GROUPS]) {
        ATTNCAP_UNROLL
        for (int r = 0; r < 2; ++r) {
            auto largest = best[r];
            ATTNCAP_UNROLL
            for (int g = 0; g < GROUPS; ++g) largest.add(group[r][g]);
            bound[r] = larger(bound[r], quad_smallest(largest.least()));
        }
    }

    ATTNCAP_DEVICE void append_group(const float (&s)[C::KEYS / 2], int r, int group, int start) {
        CandidateList own = list(r);
        ATTNCAP_UNROLL
        for (int c = 8 * group; c < 8 * group + 8; ++c) {
            const float x = s[Rows<C>::place(r, c)];
            if (!(x >= bound[r])) continue;  // nor what is no number
            own.append({x, Rows<C>::first_key(start) + Rows<C>::column(c)});
            best[r].add(x);
        }
        count[r] = own.count;
    }

    // Scores that are below the top k by far leave every list; where that is not enough, for many tie, all others do.
    ATTNCAP_DEVICE void make_room(int topk) {
        if (!bounded_by_best(topk)) {
            ATTNCAP_UNROLL
            for (int r = 0; r < 2; ++r) narrow(r, topk);
            if (!some_list_is_full()) return;
        }
        ATTNCAP_UNROLL
        for (int r = 0; r < 2; ++r) cut(r, topk);
    }

    // Raises the bound to one that k candidates of the row reach, and not many more: by halving what lies between.
    ATTNCAP_DEVICE void narrow(int r, int topk) {
        CandidateList own = list(r);
        float low = infinity(), high = -infinity();
        own.each([&](const Candidate& candidate) {
            if (!exists(candidate)) return;
            low = smaller(low, candidate.score);
            high = larger(high, candidate.score);
        });
        low = quad_smallest(low);
        high = quad_largest(high);
        const bool enough = quad_sum(own.count) >= topk;
        ATTNCAP_KEEP_ROLLED
        for (int step = 0; step < NARROWINGS; ++step) {
            const float middle = low + 0.5f * (high - low);
            if (quad_sum(own.reaching(middle)) >= topk)
                low = middle;
            else
                high = middle;
        }
        if (!enough) return;
        bound[r] = larger(bound[r], low);
        own.cut({bound[r], INT32_MAX});
        count[r] = own.count;
    }

    // Leaves of the row's candidates its top k so far.
    ATTNCAP_DEVICE void cut(int r, int topk) {
        CandidateList own = list(r);
        Candidate last = {infinity(), -1};
        for (int i = 0; i < topk; ++i) last = quad_first(own.next(last));
        own.cut(last);
        count[r] = own.count;
        bound[r] = larger(bound[r], last.score);
    }
};

}  // namespace attncap
