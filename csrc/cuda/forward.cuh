// The Hopper forward: attention of blocks of 128 rows over their keys, and the statistics of its softmax.
//
// A CTA is a warpgroup that loads (forward_tiles.cuh) and two that each own 64 rows. A consumer asks the tensor cores
// for the scores of the next tile and for the values under this tile's weights together, and turns the scores into
// weights while the values are still being multiplied. The two consumers take turns in asking, so that one's softmax
// runs under the other's products.
#pragma once

#include "cuda/forward_finish.cuh"
#include "cuda/forward_tiles.cuh"

namespace attncap {

constexpr int LOADING_REGISTERS = 24, CONSUMING_REGISTERS = 240;
constexpr int CLEARED = 3;  // a named barrier; the consumers' turns are 1 and 2

// The consumers' turns at the tensor cores, by a named barrier for each.
struct Turns {
    int own, other;

    explicit ATTNCAP_DEVICE Turns(int warpgroup) : own(1 + warpgroup), other(2 - warpgroup) {
        if (warpgroup == 1) pass();  // the first turn is the other's
    }
    ATTNCAP_DEVICE void wait() const { device::named_sync(own, 256); }
    ATTNCAP_DEVICE void pass() const { device::named_arrive(other, 256); }
};

// Scores of a warpgroup's 64 rows: queries times the tile's keys.
template <typename C>
ATTNCAP_DEVICE void ask_scores(float (&s)[C::KEYS / 2], const char* query, const char* key) {
    using Shared = SharedTiles<C>;
    const uint64_t rows = found_again<C>(device::k_major(query)), keys = device::k_major(key);
    ATTNCAP_UNROLL
    for (int step = 0; step < C::DIM / 16; ++step) {
        const int panel = step / 4, within = step % 4 * 32;
        device::multiply<typename C::T, C::KEYS>(s, device::advance(rows, panel * Shared::QUERY_PANEL + within),
                                                 device::advance(keys, panel * Shared::KEY_PANEL + within), step > 0);
    }
    device::multiply_commit();
}

// Adds the tile's values under the weights to the output.
template <typename C>
ATTNCAP_DEVICE void ask_values(float (&acc)[C::DIM / 2], const uint32_t (&weights)[C::KEYS / 16][4],
                               const char* value) {
    const uint64_t values = device::mn_major(value, SharedTiles<C>::KEY_PANEL);
    ATTNCAP_UNROLL
    for (int step = 0; step < C::KEYS / 16; ++step)
        device::multiply<typename C::T, C::DIM>(acc, weights[step], device::advance(values, step * 16 * 128), true);
    device::multiply_commit();
}

// Scores of a tile become 2^t, and join the statistics; `factor` is what earlier sums of each row are worth now.
template <typename C>
ATTNCAP_DEVICE void attend(float (&s)[C::KEYS / 2], float (&factor)[2], Rows<C>& rows, TopK<C>& candidates,
                           const Block& block, const Walk& tiles, int tile, const ForwardParams& params) {
    const int start = tile * C::KEYS;
    if constexpr (C::SOFTCAP) cap_scores(s, params);
    if (!tiles.whole(tile)) hide_unseen(s, rows, block, start, params);
    if constexpr (C::EVERYTHING) note_offsets(s, rows, block, start, params);
    float peak[2], group[2][TopK<C>::GROUPS];
    ATTNCAP_UNROLL
    for (int r = 0; r < 2; ++r) {
        ATTNCAP_UNROLL
        for (int g = 0; g < TopK<C>::GROUPS; ++g) {
            group[r][g] = s[Rows<C>::place(r, 8 * g)];
            ATTNCAP_UNROLL
            for (int c = 8 * g + 1; c < 8 * g + 8; ++c) group[r][g] = larger(group[r][g], s[Rows<C>::place(r, c)]);
            peak[r] = g == 0 ? group[r][0] : larger(peak[r], group[r][g]);
        }
        peak[r] = quad_largest(peak[r]);
    }
    if constexpr (C::TOPK) {
        if (params.topk > 0) candidates.collect(s, group, start, params.topk, tile == tiles.last);
        device::sync_warp();  // what follows takes whole warps
    }
    ATTNCAP_UNROLL
    for (int r = 0; r < 2; ++r) factor[r] = add_to_sums(s, rows, r, peak[r], start, block, params.unit);
    add_masses(s, rows, block, start, params);
}

// What was summed is relative to new peaks; most tiles raise none.
template <typename C>
ATTNCAP_DEVICE void rescale(float (&acc)[C::DIM / 2], const float (&factor)[2]) {
    if (!device::any(factor[0] != 1.0f || factor[1] != 1.0f)) return;
    ATTNCAP_UNROLL
    for (int i = 0; i < C::DIM / 2; ++i) acc[i] *= factor[i / 2 % 2];
}

// Accumulators of scores are, pair by pair, the left factor's fragments of the next product.
template <typename C>
ATTNCAP_DEVICE void round_weights(uint32_t (&weights)[C::KEYS / 16][4], const float (&s)[C::KEYS / 2]) {
    ATTNCAP_UNROLL
    for (int i = 0; i < C::KEYS / 4; ++i) weights[i / 4][i % 4] = device::pack<typename C::T>(s[2 * i], s[2 * i + 1]);
}

// One lane of each warp says that the warp reads a slot no more, nor waits for it.
ATTNCAP_DEVICE void release_slot(uint64_t* empty) {
    device::sync_warp();
    if (lane() == 0) device::barrier_arrive(empty);
}

template <typename C>
struct Consumer {
    const ForwardParams& params;
    SharedTiles<C>& shared;
    Turns turns;
    int warpgroup;
    int tiles_done = 0;  // tiles whose values are added

    ATTNCAP_DEVICE Consumer(const ForwardParams& params, SharedTiles<C>& shared, int warpgroup)
        : params(params), shared(shared), turns(warpgroup), warpgroup(warpgroup) {}

    ATTNCAP_DEVICE void consume() {
        for (int number = 0;; ++number) {
            const int index = next_block(number);
            if (index >= params.schedule.size()) return;
            const Block block = params.schedule.at(index, C::ROWS);
            float acc[C::DIM / 2];
            ATTNCAP_UNROLL
            for (int i = 0; i < C::DIM / 2; ++i) acc[i] = 0.0f;
            Rows<C> rows;
            TopK<C> candidates;
            rows.begin(params.hidden);
            if constexpr (C::TOPK) {
                const bool counts[2] = {place_of(rows, 0, block, params).counts,
                                        place_of(rows, 1, block, params).counts};
                candidates.begin(params, counts);
            }
            const Walk tiles = walk(block, C::ROWS, C::KEYS, params.left, params.right);
            device::barrier_wait(&shared.query_full, Ring<1>::parity(number));
            if (!tiles.empty())
                attend_all(acc, rows, candidates, block, tiles);
            else
                release_slot(&shared.query_empty);
            finish(acc, rows, candidates, params.schedule.at(device::again(index), C::ROWS), params);
        }
    }

  private:
    ATTNCAP_DEVICE void attend_all(float (&acc)[C::DIM / 2], Rows<C>& rows, TopK<C>& candidates, const Block& block,
                                   const Walk& tiles) {
        const char* query = shared.query + warpgroup * 64 * 128;
        float s[C::KEYS / 2], factor[2];
        uint32_t weights[C::KEYS / 16][4];
        wait(shared.key_full, tiles_done);
        device::pin(s);
        device::multiply_fence();
        ask_scores<C>(s, query, shared.key[slot(tiles_done)]);
        device::multiply_wait<0>();
        device::pin(s);
        release(shared.key_empty, tiles_done);
        attend(s, factor, rows, candidates, block, tiles, tiles.last, params);
        round_weights<C>(weights, s);
        const bool beyond = params.schedule.table != nullptr && (tiles.last + 1) * C::KEYS > block.keys;
        if (beyond) clear_values(block, tiles.last);
        for (int tile = tiles.last - 1; tile >= tiles.first; --tile, ++tiles_done) {
            wait(shared.key_full, tiles_done + 1);
            turns.wait();
            pin_all(acc, s, weights);
            device::multiply_fence();
            ask_scores<C>(s, query, shared.key[slot(tiles_done + 1)]);
            wait(shared.value_full, tiles_done);
            device::multiply_fence();
            ask_values<C>(acc, weights, shared.value[slot(tiles_done)]);
            turns.pass();
            device::multiply_wait<1>();
            device::pin(s);
            release(shared.key_empty, tiles_done + 1);
            attend(s, factor, rows, candidates, block, tiles, tile, params);
            device::multiply_wait<0>();
            pin_all(acc, s, weights);
            release(shared.value_empty, tiles_done);
            rescale<C>(acc, factor);
            round_weights<C>(weights, s);
        }
        release_slot(&shared.query_empty);
        wait(shared.value_full, tiles_done);
        pin_all(acc, s, weights);
        device::multiply_fence();
        ask_values<C>(acc, weights, shared.value[slot(tiles_done)]);
        device::multiply_wait<0>();
        device::pin(acc);
        release(shared.value_empty, tiles_done++);
    }

    // Registers that the tensor cores read or write stay where they are across an asking and its wait.
    ATTNCAP_DEVICE void pin_all(float (&acc)[C::DIM / 2], float (&s)[C::KEYS / 2],
                                uint32_t (&weights)[C::KEYS / 16][4]) {
        device::pin(acc);
        device::pin(s);
        for (auto& fragment : weights) device::pin(fragment);
    }

    static ATTNCAP_DEVICE int slot(int number) { return Ring<C::STAGES>::slot(number); }

    // The block that the producer has taken.
    ATTNCAP_DEVICE int next_block(int number) {
        const int slot = Ring<2>::slot(number);
        device::barrier_wait(&shared.block_full[slot], Ring<2>::parity(number));
        // A reduction gives one number for the whole warp, which costs no register of its threads.
        const int index = int(device::reduce_max(uint32_t(shared.block[slot])));
        release_slot(&shared.block_empty[slot]);
        return index;
    }

    // Values past the keys of a packed sequence are a neighbour's, which may hold anything: 0 times a NaN is none.
    ATTNCAP_DEVICE void clear_values(const Block& block, int tile) {
        const int first = block.keys - tile * C::KEYS;
        wait(shared.value_full, tiles_done);
        char* value = shared.value[slot(tiles_done)];
        ATTNCAP_KEEP_ROLLED
        for (int line = device::again(device::thread()) - 128; line < C::PANELS * C::KEYS; line += 128 * C::CONSUMERS) {
            if (line % C::KEYS < first) continue;
            uint32_t* words = reinterpret_cast<uint32_t*>(value + line * 128);
            ATTNCAP_KEEP_ROLLED
            for (int i = 0; i < 32; ++i) words[i] = 0;
        }
        device::fence_async();
        device::named_sync(CLEARED, 128 * C::CONSUMERS);
    }

    // Until tile `number` has arrived.
    static ATTNCAP_DEVICE void wait(uint64_t (&full)[C::STAGES], int number) {
        device::barrier_wait(&full[slot(number)], Ring<C::STAGES>::parity(number));
    }

    static ATTNCAP_DEVICE void release(uint64_t (&empty)[C::STAGES], int number) { release_slot(&empty[slot(number)]); }
};

template <typename C>
ATTNCAP_DEVICE void run_cta(const ForwardParams& params) {
    auto& shared = *device::shared_memory<SharedTiles<C>>();
    if (device::thread() == 0) init_barriers(shared);
    device::sync_block();
    const int warpgroup = device::shuffle(device::thread() / 128, 0);  // known to be one for the whole warp
    if (warpgroup == 0) {
        device::release_registers<LOADING_REGISTERS>();
        if (device::thread() == 0) produce(params, shared);
    } else {
        device::claim_registers<CONSUMING_REGISTERS>();
        Consumer<C>(params, shared, warpgroup - 1).consume();
    }
}

template <typename C>
ATTNCAP_KERNEL(C::THREADS, 1)
attention_forward(ATTNCAP_PARAM ForwardParams params) {
    if constexpr (device::kHopper) run_cta<C>(params);
}

}  // namespace attncap
