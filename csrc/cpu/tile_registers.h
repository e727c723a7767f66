// Products of bfloat16 pairs by tile registers: 16 rows of 16 words, 256 sums of 32 products an instruction. The
// products are as exact as in float, and sums are taken in rising order of the words.
#pragma once

#include "cpu/simd.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kTile = 16;  // rows of a tile, and words of a row

// Rows `stride` bytes apart.
template <class Byte>
struct ByteRows {
    Byte* data;
    int64_t stride;

    ByteRows at(int64_t row, int64_t word) const { return {data + row * stride + word * 4, stride}; }
};

#if defined(ATTNCAP_AMX)
constexpr bool kHasTiles = true;

// A thread needs them set before it multiplies, and gives them back so that less is to be saved of it.
class TileRegisters {
  public:
    explicit TileRegisters(bool wanted) : held_(wanted) {
        if (!held_) return;
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        asm volatile("" : "+m"(shapes));  // GCC takes the first word alone for what is read
        _tile_loadconfig(&shapes);
    }
    ~TileRegisters() {
        if (held_) _tile_release();
    }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;

  private:
    const bool held_;
};

// to += left right, or to = left right, for one or two tiles down and across and `steps` tiles of words between them.
[[gnu::noinline]] inline void multiply_block(ByteRows<const char> left, ByteRows<const char> right, int64_t steps,
                                             ByteRows<char> to, bool two_down, bool two_across, bool adds) {
    asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
    const ByteRows<char> low = to.at(kTile, 0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (adds) {
        _tile_loadd(0, to.data, to.stride);
        if (two_across) _tile_loadd(1, to.data + 64, to.stride);
        if (two_down) _tile_loadd(2, low.data, to.stride);
        if (two_down && two_across) _tile_loadd(3, low.data + 64, to.stride);
    }
    for (int64_t step = 0; step < steps; ++step) {
        const char *above = left.data + step * 64, *first = right.data + step * kTile * right.stride;
        _tile_loadd(4, above, left.stride);
        _tile_loadd(6, first, right.stride);
        _tile_dpbf16ps(0, 4, 6);
        if (two_across) {
            _tile_loadd(7, first + 64, right.stride);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (two_down) {
            _tile_loadd(5, above + kTile * left.stride, left.stride);
            _tile_dpbf16ps(2, 5, 6);
            if (two_across) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, to.data, to.stride);
    if (two_across) _tile_stored(1, to.data + 64, to.stride);
    if (two_down) _tile_stored(2, low.data, to.stride);
    if (two_down && two_across) _tile_stored(3, low.data + 64, to.stride);
}

// The same for `down` by `across` tiles: left [down * 16][steps * 16 words], right [steps * 16][across * 16 words], to
// [down * 16][across * 16 floats].
inline void multiply_tiles(ByteRows<const char> left, int64_t down, ByteRows<const char> right, int64_t across,
                           int64_t steps, ByteRows<char> to, bool adds) {
    for (int64_t m = 0; m < down; m += 2) {
        for (int64_t n = 0; n < across; n += 2) {
            multiply_block(left.at(m * kTile, 0), right.at(0, n * kTile), steps, to.at(m * kTile, n * kTile),
                           m + 1 < down, n + 1 < across, adds);
        }
    }
}

// [words][dims] to [dims][words]; both are multiples of kTile.
inline void turn_words(const uint32_t* from, int64_t words, int64_t dims, uint32_t* to) {
    using L = Lanes<float>;
    static_assert(L::kWidth == kTile, "a square is a tile");
    for (int64_t w = 0; w < words; w += kTile) {
        for (int64_t d = 0; d < dims; d += kTile) {
            L::V square[kTile];
            for (int i = 0; i < kTile; ++i)
                square[i] = L::load(reinterpret_cast<const float*>(from + (w + i) * dims + d));
            L::transpose(square);
            for (int i = 0; i < kTile; ++i) L::store(reinterpret_cast<float*>(to + (d + i) * words + w), square[i]);
        }
    }
}
#else
constexpr bool kHasTiles = false;

struct TileRegisters {
    explicit TileRegisters(bool) {}
};

void multiply_tiles(ByteRows<const char>, int64_t, ByteRows<const char>, int64_t, int64_t, ByteRows<char>, bool);
void turn_words(const uint32_t*, int64_t, int64_t, uint32_t*);
#endif

}  // namespace ATTNCAP_ISA
}  // namespace attncap
