// Shared memory of the Hopper forward, and the thread that fills it.
//
// Keys and values pass through rings of STAGES tiles. A slot is full when its bytes have arrived, and empty when every
// consumer warp has said that it reads it no more. Producer and consumers walk the same blocks and tiles in the same
// order, so that a running number names a slot and its turn.
#pragma once

#include "cuda/forward_params.h"

namespace attncap {

template <typename C>
struct SharedTiles {
    static constexpr int QUERY_PANEL = C::ROWS * 128, KEY_PANEL = C::KEYS * 128;  // bytes

    alignas(1024) char query[C::PANELS * QUERY_PANEL];
    alignas(1024) char key[C::STAGES][C::PANELS * KEY_PANEL];
    alignas(1024) char value[C::STAGES][C::PANELS * KEY_PANEL];
    int block[2];  // taken blocks, of which the producer is one ahead
    uint64_t block_full[2], block_empty[2];
    uint64_t query_full, query_empty;
    uint64_t key_full[C::STAGES], key_empty[C::STAGES], value_full[C::STAGES], value_empty[C::STAGES];
};

constexpr int MOST_SHARED_BYTES = 227 * 1024;

// Where tile `number` of all that pass through a ring of a power of two of slots goes, and the parity of its turn.
template <int STAGES>
struct Ring {
    static_assert((STAGES & (STAGES - 1)) == 0, "a power of two");

    static ATTNCAP_DEVICE int slot(int number) { return number & (STAGES - 1); }
    static ATTNCAP_DEVICE int parity(int number) { return number / STAGES & 1; }
};

template <typename C>
ATTNCAP_DEVICE void init_barriers(SharedTiles<C>& shared) {
    constexpr int READERS = 4 * C::CONSUMERS;  // warps
    for (int slot = 0; slot < 2; ++slot) {
        device::barrier_init(&shared.block_full[slot], 1);
        device::barrier_init(&shared.block_empty[slot], READERS);
    }
    device::barrier_init(&shared.query_full, 1);
    device::barrier_init(&shared.query_empty, READERS);
    for (int slot = 0; slot < C::STAGES; ++slot) {
        device::barrier_init(&shared.key_full[slot], 1);
        device::barrier_init(&shared.key_empty[slot], READERS);
        device::barrier_init(&shared.value_full[slot], 1);
        device::barrier_init(&shared.value_empty[slot], READERS);
    }
    device::barrier_fence();
}

// Waits until a slot is empty and asks for a tile of it.
template <int PANELS, int PANEL_BYTES>
ATTNCAP_DEVICE void fill(const device::TensorMap& map, uint64_t* empty, uint64_t* full, char* slot, int parity, int row,
                         int head, int batch) {
    device::barrier_wait(empty, parity ^ 1);
    device::barrier_expect(full, PANELS * PANEL_BYTES);
    ATTNCAP_KEEP_ROLLED
    for (int panel = 0; panel < PANELS; ++panel)
        device::load_tile(&map, full, slot + panel * PANEL_BYTES, 64 * panel, row, head, batch);
}

// Tells the consumers which block is next; one past the last ends their work.
template <typename C>
ATTNCAP_DEVICE void announce(SharedTiles<C>& shared, int number, int index) {
    const int slot = Ring<2>::slot(number);
    device::barrier_wait(&shared.block_empty[slot], Ring<2>::parity(number) ^ 1);
    shared.block[slot] = index;
    device::barrier_arrive(&shared.block_full[slot]);
}

// Queries, and tile by tile keys and values of one block.
template <typename C>
ATTNCAP_DEVICE void load_block(const ForwardParams& params, SharedTiles<C>& shared, const Block& block, int number,
                               int& tiles_done) {
    using Shared = SharedTiles<C>;
    fill<C::PANELS, Shared::QUERY_PANEL>(params.query, &shared.query_empty, &shared.query_full, shared.query,
                                         Ring<1>::parity(number), block.row0 + block.first_row, block.head,
                                         block.batch);
    const int head = block.head / params.group;
    const Walk tiles = walk(block, C::ROWS, C::KEYS, params.left, params.right);
    ATTNCAP_KEEP_ROLLED
    for (int tile = tiles.last; tile >= tiles.first; --tile, ++tiles_done) {
        const int slot = Ring<C::STAGES>::slot(tiles_done), parity = Ring<C::STAGES>::parity(tiles_done);
        const int row = block.key0 + tile * C::KEYS;
        fill<C::PANELS, Shared::KEY_PANEL>(params.key, &shared.key_empty[slot], &shared.key_full[slot],
                                           shared.key[slot], parity, row, head, block.batch);
        fill<C::PANELS, Shared::KEY_PANEL>(params.value, &shared.value_empty[slot], &shared.value_full[slot],
                                           shared.value[slot], parity, row, head, block.batch);
    }
}

// One thread: takes blocks until there are none, and loads what they need. A CTA that is done early takes more of them.
template <typename C>
ATTNCAP_DEVICE void produce(const ForwardParams& params, SharedTiles<C>& shared) {
    device::prefetch(&params.query);
    device::prefetch(&params.key);
    device::prefetch(&params.value);
    int tiles_done = 0, index = device::block();
    for (int number = 0;; ++number) {
        announce(shared, number, index);
        if (index >= params.schedule.size()) return;
        const int next = device::blocks() + device::fetch_add(params.taken, 1);
        load_block(params, shared, params.schedule.at(index, C::ROWS), number, tiles_done);
        index = next;
    }
}

}  // namespace attncap
