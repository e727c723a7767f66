// Products of bfloat16 pairs on a processor's own matrix registers (AMX), each of 16 rows of 64 bytes:
//
//   sums[i][lane] += sum_w left[i][w] . right[w][lane]      16 i, 16 words w a step, 16 lanes a register
//
// Words are those of Pairs: two neighbours of a sum, the first below. For scores i is a key, w a pair of dims and
// left the keys as they lie; for values i is a dim, w a pair of keys and left what `turn` makes of them. Rows of
// right and sums are kRows apart, or `width`: in a backward, where i is a key and w a pair of rows. Factors and sums
// below the smallest normal number count as 0.
#pragma once

#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
struct MatrixTiles {
    static constexpr bool kHere = false;
    static constexpr int64_t kStep = 1;
    struct Use {
        explicit Use(bool) {}
    };
};

#if defined(ATTNCAP_AMX)

// What the registers hold, as the processor reads it.
struct alignas(64) TileShape {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShape kTileShape;

template <>
struct MatrixTiles<float> {
    using L = Lanes<float>;
    static constexpr bool kHere = true;
    static constexpr int64_t kSide = 16;         // rows of a register, and its words
    static constexpr int64_t kStep = 2 * kSide;  // numbers that a step sums

    // `left` has registers' rows `stride` bytes apart, its steps `step` and its blocks of kSide i `block` bytes.
    struct Factors {
        const char* left;
        int64_t stride, step, block;
        const uint32_t* right;
        int64_t steps;
        int64_t width = kRows;  // words between rows of right, and of sums
    };

    // The registers of this thread are usable as long as it lives, if `wanted`.
    class Use {
      public:
        explicit Use(bool wanted) : wanted_(wanted) {
            if (wanted_) _tile_loadconfig(&kTileShape);
        }
        // Registers in use would slow down what the system saves of a thread.
        ~Use() {
            if (wanted_) _tile_release();
        }
        Use(const Use&) = delete;
        Use& operator=(const Use&) = delete;

      private:
        const bool wanted_;
    };

    // Sums of vectors first .. last - 1 of lanes for `blocks` times kSide i; they begin at 0 where `anew`.
    static void multiply(const Factors& factors, int64_t blocks, int first, int last, bool anew, float* sums) {
        const int64_t shift = first * kSide;
        with_constant<kRows / kSide>(last - first, [&](auto vectors) {
            for (int64_t block = 0; block < blocks; ++block) {
                multiply_block<decltype(vectors)::value>(factors, factors.left + block * factors.block, shift, anew,
                                                         sums + block * kSide * factors.width + shift);
            }
        });
    }

    // [kSide][width] words, width a multiple of kSide, to a register's [16][16] turned, for every 16 columns.
    static void turn(const uint32_t* words, int64_t width, uint32_t* turned) {
        for (int64_t column = 0; column < width; column += kSide) {
            L::V square[kSide];
            for (int i = 0; i < kSide; ++i) {
                square[i] = L::load(reinterpret_cast<const float*>(words + i * width + column));
            }
            L::transpose(square);
            for (int i = 0; i < kSide; ++i) {
                L::store(reinterpret_cast<float*>(turned + column * kSide + i * kSide), square[i]);
            }
        }
    }

  private:
    template <int Vectors>
    [[gnu::noinline]] static void multiply_block(const Factors& factors, const char* left, int64_t shift, bool anew,
                                                 float* sums) {
        static_assert(1 <= Vectors && Vectors <= 4, "four registers of sums, the others of factors");
        const int64_t bytes = factors.width * 4;
        asm volatile("" ::: "memory");  // the compiler does not see what registers load
        if (anew) {
            _tile_zero(0);
            if constexpr (Vectors > 1) _tile_zero(1);
            if constexpr (Vectors > 2) _tile_zero(2);
            if constexpr (Vectors > 3) _tile_zero(3);
        } else {
            _tile_loadd(0, sums, bytes);
            if constexpr (Vectors > 1) _tile_loadd(1, sums + kSide, bytes);
            if constexpr (Vectors > 2) _tile_loadd(2, sums + 2 * kSide, bytes);
            if constexpr (Vectors > 3) _tile_loadd(3, sums + 3 * kSide, bytes);
        }
        const uint32_t* right = factors.right + shift;
        for (int64_t step = 0; step < factors.steps; ++step, left += factors.step, right += kSide * factors.width) {
            _tile_loadd(4, left, factors.stride);
            _tile_loadd(5, right, bytes);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (Vectors > 1) {
                _tile_loadd(6, right + kSide, bytes);
                _tile_dpbf16ps(1, 4, 6);
            }
            if constexpr (Vectors > 2) {
                _tile_loadd(7, right + 2 * kSide, bytes);
                _tile_dpbf16ps(2, 4, 7);
            }
            if constexpr (Vectors > 3) {
                _tile_loadd(5, right + 3 * kSide, bytes);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        _tile_stored(0, sums, bytes);
        if constexpr (Vectors > 1) _tile_stored(1, sums + kSide, bytes);
        if constexpr (Vectors > 2) _tile_stored(2, sums + 2 * kSide, bytes);
        if constexpr (Vectors > 3) _tile_stored(3, sums + 3 * kSide, bytes);
    }
};

#endif

}  // namespace ATTNCAP_ISA
}  // namespace attncap
