// A consumer thread's two rows: their online softmax over a tile of scores, and the masses of few keys.
//
// Scores of a warpgroup's 64 rows stand in the accumulators of its matrix product: warp w holds rows 16 w .. 16 w + 15,
// and of these a lane holds rows lane / 4 and lane / 4 + 8, of every 8 columns the two from 2 (lane % 4) on. The four
// lanes of a quad share two rows. Below, r is 0 or 1, and c counts a thread's columns of a row: c / 2 blocks of 8.
#pragma once

#include "cuda/forward_params.h"
#include "statistics/softmax.h"

namespace attncap {

ATTNCAP_DEVICE int lane(int thread = device::thread()) { return thread % 32; }

// A number from which others are computed anew wherever they are wanted, if registers are scarce.
template <typename C, typename N>
ATTNCAP_DEVICE N found_again(N number) {
    return C::SCARCE ? device::again(number) : number;
}

template <typename C>
struct Rows {
    static constexpr int COLUMNS = C::KEYS / 4;  // of a row, in a thread

    float peak[2];
    RowSums sums[2];
    float sink[2], diagonal[2];       // relative to the peak, as the sums are
    float offset_x[2][MOST_OFFSETS];  // scores of the keys at the offsets

    // The place of score (r, c) among the accumulators, and its column less that of the thread's first.
    static ATTNCAP_INLINE constexpr int place(int r, int c) { return 4 * (c / 2) + 2 * r + c % 2; }
    static ATTNCAP_INLINE constexpr int column(int c) { return 8 * (c / 2) + c % 2; }

    // The key of a thread's first column in a tile that starts at `start`.
    static ATTNCAP_DEVICE int first_key(int start) { return start + 2 * (lane(thread()) % 4); }

    // Of the first of the two; the other is 8 further. Within the block, and where it stands.
    static ATTNCAP_DEVICE int first_row() { return 16 * (thread() / 32 - 4) + lane(thread()) / 4; }
    static ATTNCAP_DEVICE int position(const Block& block) { return block.first_position() + first_row(); }

    ATTNCAP_DEVICE void begin(float hidden) {
        for (int r = 0; r < 2; ++r) {
            peak[r] = hidden;
            sums[r] = RowSums{};
            sink[r] = diagonal[r] = 0.0f;
            for (int i = 0; i < MOST_OFFSETS; ++i) offset_x[r][i] = peak[r];
        }
    }

  private:
    // The distance wants it for every tile.
    static ATTNCAP_DEVICE int thread() { return C::EVERYTHING ? device::thread() : found_again<C>(device::thread()); }
};

// The largest or the sum over a quad, by the same tree in each of its lanes.
ATTNCAP_DEVICE float quad_largest(float x) {
    x = larger(x, device::shuffle_xor(x, 1));
    return larger(x, device::shuffle_xor(x, 2));
}

ATTNCAP_DEVICE float quad_smallest(float x) {
    x = smaller(x, device::shuffle_xor(x, 1));
    return smaller(x, device::shuffle_xor(x, 2));
}

ATTNCAP_DEVICE float quad_sum(float x) {
    x += device::shuffle_xor(x, 1);
    return x + device::shuffle_xor(x, 2);
}

template <int N>
ATTNCAP_DEVICE void cap_scores(float (&s)[N], const ForwardParams& params) {
    ATTNCAP_UNROLL
    for (int i = 0; i < N; ++i) s[i] = soft_capped(s[i], params.scale_by_cap, params.softcap);
}

// Columns of one row within a tile from `low` to `high`, counted from the thread's first.
struct Columns {
    int low, high;

    ATTNCAP_DEVICE bool holds(int column) const { return column >= low && column <= high; }
};

// Scores of keys that rows do not see become the hidden one.
template <typename C>
ATTNCAP_DEVICE void hide_unseen(float (&s)[C::KEYS / 2], const Rows<C>& rows, const Block& block, int start,
                                const ForwardParams& params) {
    const int key = Rows<C>::first_key(start);
    ATTNCAP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int position = rows.position(block) + 8 * r, last = position + params.right;
        const Columns seen = {position - params.left - key, (last < block.keys ? last : block.keys - 1) - key};
        ATTNCAP_UNROLL
        for (int c = 0; c < Rows<C>::COLUMNS; ++c)
            if (!seen.holds(Rows<C>::column(c))) s[Rows<C>::place(r, c)] = params.hidden;
    }
}

// Scores become 2^t, t their bits less the new peak's, and join the sums of row r; the factor of the sums before.
template <typename C>
ATTNCAP_DEVICE float add_to_sums(float (&s)[C::KEYS / 2], Rows<C>& rows, int r, float tile_peak, int start,
                                 const Block& block, float unit) {
    const float peak = larger(rows.peak[r], tile_peak), reference = peak * unit;
    const Rescaling by = rescaling(rows.peak[r] * unit, reference);
    rows.peak[r] = peak;
    // Two chains of sums, for one would wait for its own additions.
    RowSums sums[2] = {rescaled(rows.sums[r], by), RowSums{}};
    const float ahead = float(rows.position(block) + 8 * r - Rows<C>::first_key(start));
    ATTNCAP_UNROLL
    for (int c = 0; c < Rows<C>::COLUMNS; ++c) {
        float& x = s[Rows<C>::place(r, c)];
        RowSums& into = sums[c % 2];
        const float t = fmaf(x, unit, -reference);
        x = power_of_two(t);
        into.total += x;
        if constexpr (C::ENTROPY) into.weighted = fmaf(x, t, into.weighted);
        if constexpr (C::EVERYTHING) {
            into.squares = fmaf(x, x, into.squares);
            into.distance = fmaf(x, fabsf(ahead - float(Rows<C>::column(c))), into.distance);
        }
    }
    RowSums& total = rows.sums[r];
    total.total = sums[0].total + sums[1].total;
    total.weighted = sums[0].weighted + sums[1].weighted;
    total.squares = sums[0].squares + sums[1].squares;
    total.distance = sums[0].distance + sums[1].distance;
    rows.sink[r] *= by.factor;
    rows.diagonal[r] *= by.factor;
    return by.factor;
}

template <typename C>
ATTNCAP_DEVICE float mass_of_band(const float (&s)[C::KEYS / 2], int r, const Columns& band) {
    float mass = 0.0f;
    ATTNCAP_UNROLL
    for (int c = 0; c < Rows<C>::COLUMNS; ++c) mass += band.holds(Rows<C>::column(c)) ? s[Rows<C>::place(r, c)] : 0.0f;
    return mass;
}

// Whether keys start .. start + KEYS - 1 hold one from `first` to `last`.
template <typename C>
ATTNCAP_DEVICE bool touches(int start, int first, int last) {
    return last >= start && first < start + C::KEYS;
}

// Sink and diagonal, from the tiles that hold them. `s` holds 2^t.
template <typename C>
ATTNCAP_DEVICE void add_masses(const float (&s)[C::KEYS / 2], Rows<C>& rows, const Block& block, int start,
                               const ForwardParams& params) {
    const int key = Rows<C>::first_key(start);
    const int first = block.first_position(), last = first + C::ROWS - 1;
    if (start < params.sink) {
        ATTNCAP_UNROLL
        for (int r = 0; r < 2; ++r) rows.sink[r] += mass_of_band<C>(s, r, {-key, params.sink - 1 - key});
    }
    if (params.diagonal >= 0 && touches<C>(start, first - params.diagonal, last + params.diagonal)) {
        ATTNCAP_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int ahead = rows.position(block) + 8 * r - key;
            rows.diagonal[r] += mass_of_band<C>(s, r, {ahead - params.diagonal, ahead + params.diagonal});
        }
    }
}

// Scores of the keys at the offsets, from the tiles that hold them. `s` holds scores.
template <typename C>
ATTNCAP_DEVICE void note_offsets(const float (&s)[C::KEYS / 2], Rows<C>& rows, const Block& block, int start,
                                 const ForwardParams& params) {
    const int first = block.first_position(), key = Rows<C>::first_key(start);
    ATTNCAP_UNROLL
    for (int i = 0; i < MOST_OFFSETS; ++i) {
        if (i >= params.offsets) continue;
        const int offset = params.offset[i];
        if (!touches<C>(start, first + offset, first + C::ROWS - 1 + offset)) continue;
        ATTNCAP_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int wanted = rows.position(block) + 8 * r + offset - key;
            ATTNCAP_UNROLL
            for (int c = 0; c < Rows<C>::COLUMNS; ++c)
                if (Rows<C>::column(c) == wanted) rows.offset_x[r][i] = s[Rows<C>::place(r, c)];
        }
    }
}

}  // namespace attncap
