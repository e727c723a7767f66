// Products of bfloat16 pairs, by tile registers too where there are any, on small integers: exact in any order.
#pragma once

#include "cpu/gradient_tiles.h"
#include "cpu/paired.h"
#include "products.h"

namespace attncap {
namespace ATTNCAP_ISA {

#if defined(ATTNCAP_BF16)
// Words of pairs of small integers, and the integers: number 2 * i + half is half `half` of word i.
struct Paired {
    std::vector<float> numbers;
    std::vector<uint32_t> words;

    explicit Paired(int64_t count) : numbers(check::integers<float>(2 * count)), words(count) {
        for (int64_t i = 0; i < count; ++i) {
            words[i] = float_to_bfloat(numbers[2 * i]) | uint32_t(float_to_bfloat(numbers[2 * i + 1])) << 16;
        }
    }
    // The product of two words.
    float times(int64_t i, const Paired& other, int64_t j) const {
        return numbers[2 * i] * other.numbers[2 * j] + numbers[2 * i + 1] * other.numbers[2 * j + 1];
    }
};

inline void check_paired_values() {
    for (int64_t dims : {1, 5, 16, 32, 48, 70}) {
        for (int64_t words : {1, 15, 16, 17, 33, 64}) {
            const int vectors = check::integer(1, int(kRows / Lanes<float>::kWidth));
            const Paired prob(words * kRows), values(words * dims);
            const auto decay = check::integers<float>(kRows, 2), before = check::integers<float>((dims + 1) * kRows);
            std::vector<uint32_t> turned(words * dims);
            auto out = before;
            accumulate_pairs<float>(prob.words.data(), values.words.data(), words, dims, vectors, decay.data(),
                                    turned.data(), out.data());
            for (int64_t d = 0; d <= dims; ++d) {
                for (int64_t row = 0; row < kRows; ++row) {
                    const bool active = d < dims && row < vectors * Lanes<float>::kWidth;
                    float want = before[d * kRows + row] * (active ? decay[row] : 1);
                    for (int64_t k = 0; active && k < words; ++k)
                        want += prob.times(k * kRows + row, values, k * dims + d);
                    check::that(out[d * kRows + row] == want, "accumulate_pairs: dims, words, dim, row",
                                {double(dims), double(words), double(d), double(row)});
                }
            }
        }
    }
}

// Keys from `keys / 2` on have nothing in the first 20 words.
inline void check_paired_sums() {
    constexpr int64_t kWords = kRows / 2, kSkipped = 20;
    using L = Lanes<float>;
    for (int64_t keys : {1, 7, 16, 31, 48, 70}) {
        for (int vectors : {1, 2, 3, 5}) {
            const int64_t width = vectors * L::kWidth, later = keys / 2;
            Paired left(keys * kWords), right(kWords * width);
            for (int64_t i = 0; i < keys * kWords; ++i) {
                if (i / kWords < later || i % kWords >= kSkipped) continue;
                left.words[i] = 0, left.numbers[2 * i] = left.numbers[2 * i + 1] = 0;
            }
            const auto before = check::integers<float>((keys + 1) * width);
            auto sums = before;
            const auto terms = [&](int64_t k0, int64_t) {
                return std::pair(k0 < later ? int64_t(0) : kSkipped, kWords);
            };
            add_paired_product<float>({left.words.data(), kWords}, keys, {right.words.data(), width}, vectors, terms,
                                      {sums.data(), width});
            for (int64_t k = 0; k <= keys; ++k) {
                for (int64_t d = 0; d < width; ++d) {
                    float want = before[k * width + d];
                    for (int64_t r = 0; k < keys && r < kWords; ++r)
                        want += left.times(k * kWords + r, right, r * width + d);
                    check::that(sums[k * width + d] == want, "add_paired_product: keys, key, number",
                                {double(keys), double(k), double(d)});
                }
            }
        }
    }
}

inline void check_row_words() {
    constexpr int64_t kMost = 70;
    const auto first = check::integers<float>(kMost), second = check::integers<float>(kMost);
    std::vector<char> rows[2];
    for (int64_t step : {1, 3}) {
        for (int i : {0, 1}) {
            rows[i].assign(2 * kMost * step, 0);
            store_strided(rows[i].data(), DType::bfloat16, step, (i == 0 ? first : second).data(), kMost);
        }
        for (int64_t dims : {1, 31, 32, 33, 64, 70}) {
            for (uint32_t keep : {0u, 0xffffu, 0xffff0000u, 0xffffffffu}) {
                std::vector<uint32_t> words(dims + 1, 7);
                pair_rows<float>(rows[0].data(), rows[1].data(), 2 * step, dims, keep, words.data());
                for (int64_t d = 0; d < dims; ++d) {
                    const uint32_t both = float_to_bfloat(first[d]) | uint32_t(float_to_bfloat(second[d])) << 16;
                    check::that(words[d] == (both & keep), "pair_rows: dims, number", {double(dims), double(d)});
                }
                check::that(words[dims] == 7, "pair_rows writes too far", {double(dims)});
            }
        }
    }
}
#endif

#if defined(ATTNCAP_AMX)
inline void check_tiles() {
    for (int64_t down : {1, 2, 3}) {
        for (int64_t across : {1, 2, 4}) {
            for (int64_t steps : {0, 1, 3}) {
                const int64_t words = steps * kTile + 2, rows = down * kTile, columns = across * kTile,
                              stride = columns + 3;
                const Paired left(rows * words), right((steps * kTile + 1) * stride);
                const auto before = check::integers<float>((rows + 1) * stride);
                for (bool adds : {false, true}) {
                    auto to = before;
                    multiply_tiles({reinterpret_cast<const char*>(left.words.data()), words * 4}, down,
                                   {reinterpret_cast<const char*>(right.words.data()), stride * 4}, across, steps,
                                   {reinterpret_cast<char*>(to.data()), stride * 4}, adds);
                    for (int64_t m = 0; m <= rows; ++m) {
                        for (int64_t n = 0; n < stride; ++n) {
                            const bool inside = m < rows && n < columns;
                            float want = inside && !adds ? 0 : before[m * stride + n];
                            for (int64_t w = 0; inside && w < steps * kTile; ++w) {
                                want += left.times(m * words + w, right, w * stride + n);
                            }
                            check::that(to[m * stride + n] == want, "multiply_tiles: down, across, steps",
                                        {double(down), double(across), double(steps)});
                        }
                    }
                }
            }
        }
    }
}
#endif

}  // namespace ATTNCAP_ISA
}  // namespace attncap
