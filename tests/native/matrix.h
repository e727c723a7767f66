// Products on matrix registers, on processors that have them, on small integers: exact in any order.
#pragma once

#include "cpu/matrix_permission.h"
#include "cpu/matrix_tiles.h"
#include "products.h"

namespace attncap {
namespace ATTNCAP_ISA {

#if defined(ATTNCAP_AMX)
inline std::vector<uint32_t> paired(const std::vector<float>& numbers) {
    std::vector<uint32_t> words(numbers.size() / 2);
    for (size_t i = 0; i < words.size(); ++i) {
        words[i] = float_to_bfloat(numbers[2 * i]) | uint32_t(float_to_bfloat(numbers[2 * i + 1])) << 16;
    }
    return words;
}

// sums[i][lane] against the sums that `left`, [blocks * kSide][words], and `right`, [words][width], make.
inline void check_matrix_products_of(int64_t width) {
    using Tiles = MatrixTiles<float>;
    constexpr int64_t kSide = Tiles::kSide;
    for (int64_t steps : {1, 2, 5}) {
        const int64_t words = steps * kSide, stride = words + 7;
        for (int64_t blocks : {1, 3}) {
            for (int first = 0; first < 4; ++first) {
                for (int last = first; last <= 4; ++last) {
                    const bool anew = check::integer(0, 1) == 1;
                    const auto left = check::integers<float>(2 * blocks * kSide * stride);
                    const auto right = check::integers<float>(2 * words * width);
                    const auto before = check::integers<float>(blocks * kSide * width);
                    const auto left_words = paired(left), right_words = paired(right);
                    auto sums = before;
                    Tiles::multiply({reinterpret_cast<const char*>(left_words.data()), 4 * stride, 4 * kSide,
                                     4 * kSide * stride, right_words.data(), steps, width},
                                    blocks, first, last, anew, sums.data());
                    for (int64_t i = 0; i < blocks * kSide; ++i) {
                        for (int64_t lane = 0; lane < width; ++lane) {
                            const bool active = first * kSide <= lane && lane < last * kSide;
                            float want = active && anew ? 0 : before[i * width + lane];
                            for (int64_t n = 0; active && n < 2 * words; ++n) {
                                want += left[2 * i * stride + n] * right[2 * (n / 2 * width + lane) + n % 2];
                            }
                            check::that(sums[i * width + lane] == want, "multiply: steps, first, last, i, lane",
                                        {double(steps), double(first), double(last), double(i), double(lane)});
                        }
                    }
                }
            }
        }
    }
}

inline void check_matrix_products() {
    using Tiles = MatrixTiles<float>;
    constexpr int64_t kSide = Tiles::kSide;
    check::that(may_use_matrix_registers(), "the kernel lets this process use its matrix registers");
    const Tiles::Use use(true);
    for (int64_t width : {kRows, kRows + 16}) check_matrix_products_of(width);
    for (int64_t width : {16, 48}) {
        std::vector<uint32_t> words(kSide * width), turned(kSide * width);
        for (size_t i = 0; i < words.size(); ++i) words[i] = uint32_t(i);
        Tiles::turn(words.data(), width, turned.data());
        for (int64_t i = 0; i < kSide; ++i) {
            for (int64_t column = 0; column < width; ++column) {
                check::that(turned[column * kSide + i] == words[i * width + column], "turn",
                            {double(i), double(column)});
            }
        }
    }
}

// As pairs do, registers take numbers below all normal ones for 0.
inline void check_matrix_denormals() {
    using Tiles = MatrixTiles<float>;
    const Tiles::Use use(true);
    std::vector<uint32_t> left(Tiles::kSide * Tiles::kSide, 0x00010001), right(Tiles::kSide * kRows, 0x7f007f00);
    std::vector<float> sums(Tiles::kSide * kRows, 1);
    Tiles::multiply({reinterpret_cast<const char*>(left.data()), 64, 64, 0, right.data(), 1}, 1, 0, 1, true,
                    sums.data());
    check::that(sums[0] == 0, "a factor below all normal numbers", {sums[0]});
}
#endif

}  // namespace ATTNCAP_ISA
}  // namespace attncap
