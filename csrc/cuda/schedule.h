// Which block of rows a CTA takes next, and which tiles of keys that block sees.
#pragma once

#include <cstdint>

#include "statistics/inline.h"

namespace attncap {

// Rows, keys and query offsets stay within this, so that 32 bits hold a position less a key, or plus an offset.
constexpr int MOST_POSITION = 1 << 28;
constexpr int UNLIMITED = 1 << 30;  // a side of a window, or an offset, that reaches past every key
static_assert(UNLIMITED > 2 * MOST_POSITION && UNLIMITED <= INT32_MAX - 2 * MOST_POSITION, "past every key");

// Rows of one head: `first_row` and `rows` are of the block's own sequence, whose rows and keys begin at `row0`,
// `key0`.
struct Block {
    int batch, head, first_row;
    int row0, rows, key0, keys, offset;

    ATTNCAP_INLINE int first_position() const { return first_row + offset; }
};

// Blocks of rows of every head, in the order they are taken: under a causal mask later rows, which see more keys,
// first. Heads come in sections whose keys and values fit the cache together, and of which all blocks are taken before
// the next section's.
struct Schedule {
    int heads, batch, section, blocks;  // of a section: heads of some batch entry; of a head: blocks
    int rows, keys, offset;             // of every batch entry
    // Of packed sequences, else null: (sequence, block) of each block of a head, the longest first, and
    // (row0, rows, key0, keys, offset) of each sequence. `blocks` counts those of all sequences then.
    const int32_t* table;
    const int32_t* sequences;

    ATTNCAP_INLINE int size() const { return blocks * heads * batch; }

    ATTNCAP_INLINE Block at(int index, int block_rows) const {
        const int first = index / (section * blocks) * section, inside = index % (section * blocks);
        const int rest = heads * batch - first, here = rest < section ? rest : section;
        const int head = first + inside % here, turn = inside / here;
        if (table == nullptr)
            return {head / heads, head % heads, (blocks - 1 - turn) * block_rows, 0, rows, 0, keys, offset};
        const int32_t* entry = table + 2 * turn;
        const int32_t* sequence = sequences + 5 * entry[0];
        return {0, head, entry[1] * block_rows, sequence[0], sequence[1], sequence[2], sequence[3], sequence[4]};
    }
};

// The tiles of SIZE keys that some row of a block sees, walked from the last to the first: the keys nearest to a row,
// where attention often gathers, come first. Tiles `whole_first` .. `whole_last` are seen whole by every row.
struct Walk {
    int first, last, whole_first, whole_last;

    ATTNCAP_INLINE bool empty() const { return last < first; }
    ATTNCAP_INLINE bool whole(int tile) const { return tile >= whole_first && tile <= whole_last; }
};

// `left` and `right` are the keys seen before and after a row's own position.
ATTNCAP_INLINE Walk walk(const Block& block, int block_rows, int size, int left, int right) {
    const int first_position = block.first_position();
    const int last_row = block.first_row + block_rows < block.rows ? block.first_row + block_rows - 1 : block.rows - 1;
    const int last_position = last_row + block.offset;
    const auto clamped = [&](int key) { return key < 0 ? 0 : key > block.keys ? block.keys : key; };
    const int begin = clamped(first_position - left), end = clamped(last_position + right + 1);
    const int whole_begin = clamped(last_position - left), whole_end = clamped(first_position + right + 1);
    if (begin >= end) return {0, -1, 0, -1};
    return {begin / size, (end - 1) / size, (whole_begin + size - 1) / size, whole_end / size - 1};
}

}  // namespace attncap
