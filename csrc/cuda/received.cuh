// received_mass: what each key receives, summed over the rows that count.
//
// A CTA owns tiles of keys of one query head and walks over the rows that see them: no two CTAs add to one number, so
// the sums are the same in every run. Scores are made as S^T = K Q^T, keys being the rows of the products: what a
// thread accumulates belongs to four keys, whose sums stay in its registers, as do the keys themselves. Queries stream
// by.
#pragma once

#include <cstdint>

#include "cuda/device.h"
#include "statistics/softmax.h"

namespace attncap {

constexpr int RECEIVED_KEYS = 256;  // of a CTA

template <typename T_, int DIM_, bool SOFTCAP_>
struct Received {
    using T = T_;
    static constexpr int DIM = DIM_;
    static constexpr bool SOFTCAP = SOFTCAP_;

    static constexpr int KEYS = 32;  // of a warp: two fragments of 16, so that each query loaded is used twice
    static constexpr int WARPS = RECEIVED_KEYS / KEYS, THREADS = 32 * WARPS;
    static constexpr int ROWS = 64, STAGES = 3;
    static constexpr int ROWS_AT_ONCE = 16;          // as many as registers hold beside the keys
    static constexpr int CTAS = DIM == 256 ? 1 : 2;  // on a multiprocessor
    static constexpr int STEPS = DIM / 16;           // of a product
    static constexpr int ROW_BYTES = 2 * DIM, CHUNKS = ROW_BYTES / 16;
};

struct ReceivedParams {
    const char *query, *key;
    int64_t query_stride[3], key_stride[3];  // of batch, head and row, in bytes
    const RowScale* scales;                  // (batch, heads, total_rows)
    float* received;                         // (batch, heads, total_keys)
    int64_t total_rows, total_keys;

    int heads, group;  // query heads; those of a key head
    int tiles;         // of keys of a head; of packed sequences, those of all of them
    int rows, keys, offset;
    // Of packed sequences, else null: (sequence, tile) and (row0, rows, key0, keys, offset).
    const int32_t *table, *sequences;

    int left, right;  // keys seen before and after a row's position
    float unit;       // bits that a step of 1 in x is worth: x is the product of query and key, or the capped score
    float softcap, scale_by_cap;
};

// A tile of keys; `first` counts from the sequence's own first key.
struct KeyTile {
    int batch, head, first;
    int row0, rows, key0, keys, offset;
};

ATTNCAP_DEVICE KeyTile key_tile_of(const ReceivedParams& params, int index) {
    const int head = index / params.tiles, tile = index % params.tiles;
    if (params.table == nullptr) {
        return {head / params.heads, head % params.heads, tile * RECEIVED_KEYS, 0, params.rows, 0,
                params.keys,         params.offset};
    }
    const int32_t* entry = params.table + 2 * tile;
    const int32_t* sequence = params.sequences + 5 * entry[0];
    return {0, head, entry[1] * RECEIVED_KEYS, sequence[0], sequence[1], sequence[2], sequence[3], sequence[4]};
}

// Blocks of rows that see some key of a tile; those from `whole_begin` on, before `whole_end`, see every key.
struct RowWalk {
    int begin, end, whole_begin, whole_end;
};

ATTNCAP_DEVICE RowWalk rows_of(const KeyTile& tile, int size, int left, int right) {
    const int last = tile.first + RECEIVED_KEYS < tile.keys ? tile.first + RECEIVED_KEYS - 1 : tile.keys - 1;
    const auto clamped = [&](int64_t row) { return int(row < 0 ? 0 : row > tile.rows ? tile.rows : row); };
    const int begin = clamped(int64_t(tile.first) - right - tile.offset);
    const int end = clamped(int64_t(last) + left - tile.offset + 1);
    const int whole_begin = clamped(int64_t(last) - right - tile.offset);
    const int whole_end = clamped(int64_t(tile.first) + left - tile.offset + 1);
    // The last block may have rows beyond the sequence's, which count for nothing.
    const int blocks = (tile.rows + size - 1) / size;
    return {begin / size, begin < end ? (end + size - 1) / size : begin / size, (whole_begin + size - 1) / size,
            whole_end == tile.rows ? blocks : whole_end / size};
}

template <typename C>
struct SharedQueries {
    alignas(128) char query[C::STAGES][C::ROWS * C::ROW_BYTES];
    alignas(16) RowScale scales[2][C::ROWS];
    // What every thread knows, here for registers are few.
    KeyTile tile;
    RowWalk walk;
};

// The rows of a tile's head, as one thread sees them: a chunk of 16 bytes of every LINES-th of a block's rows, and the
// scale of one row.
template <typename C>
struct RowReader {
    static constexpr int LINES = C::THREADS / C::CHUNKS;
    static_assert(LINES % 8 == 0, "a thread's chunks have one place in the rows of shared memory");

    const char* query;
    const RowScale* scales;
    const KeyTile& tile;
    int first_line, place;

    ATTNCAP_DEVICE RowReader(const ReceivedParams& params, const KeyTile& of, int thread)
        : query(params.query + of.batch * params.query_stride[0] + of.head * params.query_stride[1] +
                of.row0 * params.query_stride[2] + thread % C::CHUNKS * 16),
          scales(params.scales + (int64_t(of.batch) * params.heads + of.head) * params.total_rows + of.row0),
          tile(of),
          first_line(thread / C::CHUNKS),
          // Chunks lie so that neither copies nor load_matrix meet in a bank.
          place(first_line * C::ROW_BYTES + (thread % C::CHUNKS ^ first_line % 8) * 16) {}

    ATTNCAP_DEVICE void ask_for(const ReceivedParams& params, int first_row, char* to) const {
        ATTNCAP_UNROLL
        for (int line = 0; line < C::ROWS; line += LINES) {
            const int row = first_row + first_line + line;
            const bool exists = row < tile.rows;
            const char* from = query + (exists ? row : 0) * params.query_stride[2];
            device::copy_async(to + place + line * C::ROW_BYTES, from, exists);
        }
    }

    ATTNCAP_DEVICE RowScale scale(int row) const { return row < tile.rows ? scales[row] : RowScale{}; }
};

// The 32 keys of a warp as the left operand of its products.
template <typename C>
struct KeyFragments {
    uint32_t at[2][C::STEPS][4];

    ATTNCAP_DEVICE void load(const ReceivedParams& params, const KeyTile& tile, int first, int lane) {
        const char* head =
            params.key + tile.batch * params.key_stride[0] + tile.head / params.group * params.key_stride[1];
        ATTNCAP_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int key = first + lane / 4 + 8 * i;
            const bool exists = key < tile.keys;
            const char* from = head + (exists ? tile.key0 + key : 0) * params.key_stride[2] + lane % 4 * 4;
            ATTNCAP_UNROLL
            for (int step = 0; step < C::STEPS; ++step) {
                ATTNCAP_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const uint32_t pair = *reinterpret_cast<const uint32_t*>(from + step * 32 + half * 16);
                    at[i / 2][step][i % 2 + 2 * half] = exists ? pair : 0;
                }
            }
        }
    }
};

// Sums over rows of what the four keys of a thread receive.
struct KeySums {
    float at[2][2] = {};
};

// Products of a warp's keys with ROWS_AT_ONCE rows from `first` on.
template <typename C>
struct ScoreTile {
    static constexpr int BLOCKS = C::ROWS_AT_ONCE / 8;
    float at[2][BLOCKS][4] = {};

    ATTNCAP_DEVICE void multiply(const KeyFragments<C>& keys, const char* queries, int first, int lane) {
        const int line = first + lane / 16 * 8 + lane % 8;
        const int place = line * C::ROW_BYTES + (lane / 8 % 2 ^ lane % 8) * 16;
        ATTNCAP_UNROLL
        for (int step = 0; step < C::STEPS; ++step) {
            const char* row = queries + (place ^ 32 * step);
            ATTNCAP_UNROLL
            for (int pair = 0; pair < BLOCKS / 2; ++pair) {
                uint32_t query[4];
                device::load_matrix(query, row + pair * 16 * C::ROW_BYTES);
                ATTNCAP_UNROLL
                for (int m = 0; m < 2; ++m) {
                    device::multiply_16x8x16<typename C::T>(at[m][2 * pair], keys.at[m][step], query[0], query[1]);
                    device::multiply_16x8x16<typename C::T>(at[m][2 * pair + 1], keys.at[m][step], query[2], query[3]);
                }
            }
        }
    }
};

// The keys that a row sees, seen from a thread's first key: the others are 8, 16 and 24 on.
struct Band {
    uint32_t place, width;

    ATTNCAP_DEVICE Band(const ReceivedParams& params, const KeyTile& tile, int first_key)
        : place(uint32_t(first_key) - uint32_t(tile.offset) + uint32_t(params.left)),
          width(uint32_t(params.left) + uint32_t(params.right)) {}

    ATTNCAP_DEVICE bool holds(int row, int key) const { return place + uint32_t(key) - uint32_t(row) <= width; }
};

template <typename C>
ATTNCAP_DEVICE float probability(const ReceivedParams& params, float product, const RowScale& scale) {
    float x = product;
    if constexpr (C::SOFTCAP) x = soft_capped(product, params.scale_by_cap, params.softcap);
    return power_of_two(fmaf(x, params.unit, -scale.reference) - scale.bits);
}

// Adds what the keys receive from one block of rows, whose own sum comes first: it keeps more digits.
template <typename C, bool MASKED>
ATTNCAP_DEVICE void add_rows(KeySums& sums, const KeyFragments<C>& keys, const ReceivedParams& params, const Band& band,
                             const char* queries, const RowScale* scales, int first_row, int lane) {
    KeySums block;
    ATTNCAP_KEEP_ROLLED
    for (int first = 0; first < C::ROWS; first += C::ROWS_AT_ONCE) {
        ScoreTile<C> scores;
        scores.multiply(keys, queries, first, lane);
        ATTNCAP_UNROLL
        for (int n = 0; n < ScoreTile<C>::BLOCKS; ++n) {
            ATTNCAP_UNROLL
            for (int column = 0; column < 2; ++column) {
                const int row = first + 8 * n + lane % 4 * 2 + column;
                const RowScale scale = scales[row];
                const bool counts = scale.bits < infinity();
                ATTNCAP_UNROLL
                for (int m = 0; m < 2; ++m) {
                    ATTNCAP_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const float p = probability<C>(params, scores.at[m][n][2 * half + column], scale);
                        bool gives = counts;
                        if constexpr (MASKED) gives = counts && band.holds(first_row + row, 16 * m + 8 * half);
                        block.at[m][half] += gives ? p : 0.0f;
                    }
                }
            }
        }
    }
    for (int m = 0; m < 2; ++m)
        for (int half = 0; half < 2; ++half) sums.at[m][half] += block.at[m][half];
}

// Four neighbouring lanes have seen different rows of the same keys, which stand `first` and more from the tile's own.
ATTNCAP_DEVICE void store(const KeySums& sums, const ReceivedParams& params, const KeyTile& tile, int first, int lane) {
    const int64_t head = int64_t(tile.batch) * params.heads + tile.head;
    float* received = params.received + head * params.total_keys + tile.key0;
    ATTNCAP_UNROLL
    for (int m = 0; m < 2; ++m) {
        ATTNCAP_UNROLL
        for (int half = 0; half < 2; ++half) {
            float sum = sums.at[m][half];
            sum += device::shuffle_xor(sum, 1);
            sum += device::shuffle_xor(sum, 2);
            const int key = tile.first + first + 16 * m + 8 * half;
            if (lane % 4 == 0 && key < tile.keys) received[key] = sum;
        }
    }
}

template <typename C>
ATTNCAP_KERNEL(C::THREADS, C::CTAS)
received_mass_kernel(ATTNCAP_PARAM ReceivedParams params) {
    SharedQueries<C>& shared = *device::shared_memory<SharedQueries<C>>();
    const KeyTile& tile = shared.tile;
    const RowWalk& walk = shared.walk;
    const int thread = device::thread(), lane = thread % 32;
    const int first_of_warp = thread / 32 * C::KEYS, first_key = first_of_warp + lane / 4;
    if (thread == 0) {
        shared.tile = key_tile_of(params, device::block());
        shared.walk = rows_of(shared.tile, C::ROWS, params.left, params.right);
    }
    device::sync_block();

    const RowReader<C> reader(params, tile, thread);
    const auto ask_for = [&](int block, int stage) {
        if (block < walk.end) reader.ask_for(params, block * C::ROWS, shared.query[stage]);
        device::copy_commit();
    };
    for (int stage = 0; stage < C::STAGES - 1; ++stage) ask_for(walk.begin + stage, stage);
    KeyFragments<C> keys;
    keys.load(params, tile, tile.first + first_of_warp, lane);
    const Band band(params, tile, tile.first + first_key);
    KeySums sums;
    RowScale next_scale = reader.scale(walk.begin * C::ROWS + thread % C::ROWS);
    for (int block = walk.begin, stage = 0; block < walk.end; ++block) {
        // Whoever still reads is one block behind: in the other half of `scales`, in the stage that is asked for next.
        RowScale* scales = shared.scales[block % 2];
        if (thread < C::ROWS) scales[thread] = next_scale;
        device::copy_wait<C::STAGES - 2>();
        device::sync_block();
        ask_for(block + C::STAGES - 1, stage == 0 ? C::STAGES - 1 : stage - 1);
        next_scale = reader.scale((block + 1) * C::ROWS + thread % C::ROWS);
        const char* queries = shared.query[stage];
        if (block >= walk.whole_begin && block < walk.whole_end) {
            add_rows<C, false>(sums, keys, params, band, queries, scales, block * C::ROWS, lane);
        } else {
            add_rows<C, true>(sums, keys, params, band, queries, scales, block * C::ROWS, lane);
        }
        stage = stage == C::STAGES - 1 ? 0 : stage + 1;
    }
    store(sums, params, tile, first_key, lane);
}

}  // namespace attncap
