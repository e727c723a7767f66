// What the Hopper forward is told, and the table of what it is compiled for.
#pragma once

#include "cuda/device.h"
#include "cuda/schedule.h"
#include "statistics/candidates.h"
#include "statistics/softmax.h"

namespace attncap {

constexpr int MOST_OFFSETS = 4;

// What is summed while keys stream by; lse, max, sink and diagonal ride along at no cost and are always served.
enum class Level { plain, entropy, topk, everything };

// As many keys as leave registers for the statistics (benchmarks/gate_cuda shows spills).
constexpr int tile_keys(int dim, Level level) {
    const bool few = level == Level::everything;
    if (dim == 256) return few ? 32 : 64;
    if (dim == 128) return few ? 64 : level == Level::plain ? 128 : 96;
    return few ? 96 : 128;
}

template <typename T_, int DIM_, Level LEVEL_, bool SOFTCAP_>
struct Forward {
    using T = T_;
    static constexpr int DIM = DIM_;
    static constexpr Level LEVEL = LEVEL_;
    static constexpr bool SOFTCAP = SOFTCAP_;

    static constexpr int CONSUMERS = 2;  // warpgroups that each own 64 rows; one more loads
    static constexpr int ROWS = 64 * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
    static constexpr int KEYS = tile_keys(DIM, LEVEL);
    static constexpr int STAGES = DIM == 64 || (DIM == 128 && KEYS < 128) ? 4 : 2;
    static constexpr int PANELS = DIM / 64;  // of 64 columns, the width of a swizzled row

    static constexpr bool ENTROPY = LEVEL != Level::plain;
    static constexpr bool SCARCE = DIM == 256 && ENTROPY;  // registers, of which the output takes more than half
    static constexpr bool EVERYTHING = LEVEL == Level::everything;  // collision, distance, offsets, top-k up to 64
    static constexpr bool TOPK = LEVEL == Level::topk || EVERYTHING;
    static constexpr int FEW = 2;  // scores of a row that a thread keeps, which bound a top 4 * FEW
    static constexpr int MOST_TOPK = EVERYTHING ? 64 : 4 * FEW;
    static constexpr int CAPACITY = KEYS / 4 + (EVERYTHING ? 64 : 48);  // of a thread's list of candidates of a row
    static_assert(KEYS % 32 == 0, "a thread's columns are whole groups of 8");
    // Candidates that a CTA has room for: 64 lists a warp, one for each lane and each of its two rows.
    static constexpr int64_t LIST_ENTRIES = int64_t(CONSUMERS) * 4 * 64 * CAPACITY;
};

struct ForwardParams {
    device::TensorMap query, key, value;  // (columns, rows, heads, batch)
    Schedule schedule;
    int group;        // query heads of a key head
    int left, right;  // keys seen before and after a row's position, UNLIMITED where all are
    float unit;       // bits that a step of 1 in x is worth: x is the product of query and key, or the capped score
    float score;      // what a step of 1 in x is worth
    float hidden;     // hidden_score(unit)
    float softcap, scale_by_cap;

    int sink, diagonal, topk, offsets;  // keys of the sink; the diagonal's reach; k; number of offsets
    int offset[MOST_OFFSETS];
    const float* sink_logits;   // (heads), or null
    const uint8_t* query_mask;  // (batch, rows), or null
    int64_t query_mask_stride[2];

    // Outputs, null where not asked for. Statistics are (batch, heads, total_rows, .) without gaps.
    char* out;
    int64_t out_stride[3];  // of batch, head and row, in elements
    int64_t total_rows;
    float *lse, *max_logit, *entropy, *collision, *sink_mass, *diagonal_mass, *distance, *null_mass, *offset_mass;
    float* topk_prob;
    int32_t* topk_index;
    RowScale* scales;  // (batch, heads, total_rows), for passes that follow
    Candidate* lists;  // LIST_ENTRIES for each CTA
    int* taken;        // blocks that CTAs have taken besides the first of each; 0 on entry
};

}  // namespace attncap
