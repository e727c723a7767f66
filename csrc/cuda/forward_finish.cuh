// What a consumer thread writes of its two rows: from sums to statistics.
#pragma once

#include "cuda/forward_topk.cuh"

namespace attncap {

// Where row r of a thread's two stands among the statistics, whether it exists, and whether it counts.
struct Place {
    int64_t at;
    bool exists, counts;
};

template <typename C>
ATTNCAP_DEVICE Place place_of(const Rows<C>& rows, int r, const Block& block, const ForwardParams& params) {
    const int row = block.first_row + rows.first_row() + 8 * r;
    Place place;
    place.exists = row < block.rows;
    place.at = (int64_t(block.batch) * params.schedule.heads + block.head) * params.total_rows + block.row0 + row;
    place.counts = place.exists;
    if (place.exists && params.query_mask != nullptr)
        place.counts = params.query_mask[block.batch * params.query_mask_stride[0] +
                                         (block.row0 + row) * params.query_mask_stride[1]] != 0;
    return place;
}

// Sums of row r over its quad's keys.
template <typename C>
ATTNCAP_DEVICE RowSums row_sums(const Rows<C>& rows, int r) {
    RowSums sums;
    sums.total = quad_sum(rows.sums[r].total);
    if constexpr (C::ENTROPY) sums.weighted = quad_sum(rows.sums[r].weighted);
    if constexpr (C::EVERYTHING) {
        sums.squares = quad_sum(rows.sums[r].squares);
        sums.distance = quad_sum(rows.sums[r].distance);
    }
    return sums;
}

ATTNCAP_DEVICE void write(float* statistic, int64_t at, float value) {
    if (statistic != nullptr) statistic[at] = value;
}

// One lane of a quad: the statistics of a row, those of no key where it does not count.
template <typename C>
ATTNCAP_DEVICE void write_statistics(const RowResult& result, float sink, float diagonal, const Place& place,
                                     const ForwardParams& params) {
    const float counted = place.counts ? 1.0f : 0.0f;
    params.lse[place.at] = result.lse;  // a backward needs it of rows that do not count too
    if (params.scales != nullptr) params.scales[place.at] = place.counts ? result.scale : RowScale{};
    write(params.max_logit, place.at, place.counts ? result.max_logit : -infinity());
    write(params.sink_mass, place.at, counted * result.share * sink);
    write(params.diagonal_mass, place.at, counted * result.share * diagonal);
    write(params.null_mass, place.at, counted * result.null_mass);
    if constexpr (C::ENTROPY) write(params.entropy, place.at, counted * result.entropy);
    if constexpr (C::EVERYTHING) {
        write(params.collision, place.at, counted * result.collision);
        write(params.distance, place.at, counted * result.distance);
    }
}

template <typename C>
ATTNCAP_DEVICE void write_offsets(const Rows<C>& rows, int r, float share, const Place& place,
                                  const ForwardParams& params) {
    ATTNCAP_UNROLL
    for (int i = 0; i < MOST_OFFSETS; ++i) {
        if (i >= params.offsets) continue;
        const float x = quad_largest(rows.offset_x[r][i]);
        const bool seen = place.counts && x > params.hidden;
        const float mass = seen ? power_of_two(fmaf(x, params.unit, -rows.peak[r] * params.unit)) * share : 0.0f;
        if (place.exists && lane() % 4 == 0) params.offset_mass[place.at * params.offsets + i] = mass;
    }
}

// Row r of the output, in the inputs' type: a thread writes two columns of every eight.
template <typename C>
ATTNCAP_DEVICE void write_out(const float (&acc)[C::DIM / 2], int r, const RowResult& result, int row,
                              const Block& block, const ForwardParams& params) {
    const int64_t place = block.batch * params.out_stride[0] + block.head * params.out_stride[1] +
                          (block.row0 + row) * params.out_stride[2];
    char* out = params.out + 2 * (place + 2 * (lane() % 4));
    ATTNCAP_UNROLL
    for (int j = 0; j < C::DIM / 8; ++j) {
        // Rows without a key share tiles with others, whose values may be no numbers.
        const float low = result.sees ? acc[4 * j + 2 * r] * result.share : 0.0f;
        const float high = result.sees ? acc[4 * j + 2 * r + 1] * result.share : 0.0f;
        *reinterpret_cast<uint32_t*>(out + 16 * j) = device::pack<typename C::T>(low, high);
    }
}

template <typename C>
ATTNCAP_DEVICE void finish(const float (&acc)[C::DIM / 2], Rows<C>& rows, TopK<C>& candidates, const Block& block,
                           const ForwardParams& params) {
    const bool null_given = params.sink_logits != nullptr;
    const float null_bits = null_given ? params.sink_logits[block.head] * LOG2_E : 0.0f;
    ATTNCAP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const Place place = place_of(rows, r, block, params);
        const RowResult result =
            finished(row_sums(rows, r), rows.peak[r], params.hidden, params.unit, params.score, null_given, null_bits);
        const float sink = quad_sum(rows.sink[r]), diagonal = quad_sum(rows.diagonal[r]);
        if (place.exists) {
            write_out<C>(acc, r, result, block.first_row + rows.first_row() + 8 * r, block, params);
            if (lane() % 4 == 0) write_statistics<C>(result, sink, diagonal, place, params);
        }
        if constexpr (C::EVERYTHING) write_offsets(rows, r, result.share, place, params);
        if constexpr (C::TOPK) {
            if (params.topk > 0) {
                const int64_t at = place.at * params.topk;
                candidates.write(r, place.counts, params.unit, rows.peak[r] * params.unit, result.share, params.topk,
                                 place.exists ? params.topk_prob + at : nullptr, params.topk_index + at);
            }
        }
    }
}

}  // namespace attncap
