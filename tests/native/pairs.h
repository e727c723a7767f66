// Pairs of bfloat16 in a word, on processors that multiply them.
#pragma once

#include "cpu/gradient_tiles.h"
#include "products.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Keys from `keys / 2` on have nothing in the first words. `per_word` numbers stand in a word of Step's.
template <class Step>
void check_sums(int per_word) {
    using T = typename Step::T;
    using L = typename Step::L;
    constexpr int64_t kWords = 9, kSkipped = 4;
    for (int64_t keys : {1, 5, 6, 7, 20}) {
        for (int vectors : {1, 3, 4, 9}) {
            const int64_t width = vectors * L::kWidth, later = keys / 2;
            auto left = check::integers<float>(keys * kWords * per_word);
            const auto right = check::integers<float>(kWords * width * per_word);
            for (int64_t i = later * kWords * per_word; i < keys * kWords * per_word; ++i) {
                if (i / per_word % kWords < kSkipped) left[i] = 0;
            }
            const auto before = check::integers<T>((keys + 1) * width);
            auto sums = before;
            const auto left_words = words_of<Step>(left, per_word), right_words = words_of<Step>(right, per_word);
            const auto terms = [&](int64_t k0, int64_t) {
                return std::pair(k0 < later ? int64_t(0) : kSkipped, kWords);
            };
            add_product<Step>({left_words.data(), kWords}, keys, {right_words.data(), width}, vectors, terms,
                              {sums.data(), width});
            for (int64_t k = 0; k <= keys; ++k) {
                for (int64_t d = 0; d < width; ++d) {
                    T want = before[k * width + d];
                    for (int64_t r = 0; k < keys && r < kWords * per_word; ++r) {
                        const int64_t word = r / per_word, half = r % per_word;
                        want += T(left[k * kWords * per_word + r] * right[(word * width + d) * per_word + half]);
                    }
                    check::that(sums[k * width + d] == want, "add_product of rows: keys, key, number",
                                {double(keys), double(k), double(d)});
                }
            }
        }
    }
}

#if defined(ATTNCAP_BF16)
inline void check_pairs() {
    using L = Lanes<float>;
    for_vectors_of_pairs<float>([](const float* a, const float* b) {
        uint32_t words[L::kWidth];
        Pairs<float>::store_rounded(words, L::load(a), L::load(b));
        for (int i = 0; i < L::kWidth; ++i) {
            for (const auto& [number, bits] : {std::pair(a[i], words[i] & 0xffff), std::pair(b[i], words[i] >> 16)}) {
                // The instruction takes numbers below all normal ones for 0.
                const float want = std::fpclassify(number) == FP_SUBNORMAL ? std::copysign(0.0f, number) : number;
                const float got = bfloat_to_float(uint16_t(bits));
                check::that(same(got, bfloat_to_float(float_to_bfloat(want))), "store_rounded of", {number, got});
            }
        }
    });
    uint16_t first[2 * L::kWidth], second[2 * L::kWidth];
    for (int i = 0; i < 2 * L::kWidth; ++i) first[i] = uint16_t(1000 + i), second[i] = uint16_t(60000 + i);
    for (uint32_t keep : {0u, 0xffff0000u}) {
        uint32_t words[2 * L::kWidth];
        Pairs<float>::interleave(reinterpret_cast<char*>(first), reinterpret_cast<char*>(second), keep, words);
        for (int i = 0; i < 2 * L::kWidth; ++i) {
            const uint32_t want = first[i] | ((uint32_t(second[i]) << 16) & keep);
            check::that(words[i] == want, "interleave: word", {double(i), double(words[i]), double(want)});
        }
    }
    for (int turn = 0; turn < 200; ++turn) {
        const auto a = check::integers<float>(2 * L::kWidth, 100), b = check::integers<float>(2 * L::kWidth, 100);
        const auto sum = check::integers<float>(L::kWidth, 1000);
        uint32_t left[L::kWidth], right[L::kWidth];
        float got[L::kWidth];
        Pairs<float>::store_rounded(left, L::load(&a[0]), L::load(&a[L::kWidth]));
        Pairs<float>::store_rounded(right, L::load(&b[0]), L::load(&b[L::kWidth]));
        L::store(got, Pairs<float>::add_product(Pairs<float>::load(left), Pairs<float>::load(right), L::load(&sum[0])));
        for (int i = 0; i < L::kWidth; ++i) {
            const float want = sum[i] + a[i] * b[i] + a[i + L::kWidth] * b[i + L::kWidth];
            check::that(got[i] == want, "add_product: lane", {double(i), got[i], want});
        }
        L::store(got, Pairs<float>::add_product(Pairs<float>::all(left[0]), Pairs<float>::load(right), L::all(0)));
        const float want = a[0] * b[0] + a[L::kWidth] * b[L::kWidth];
        check::that(got[0] == want, "all, add_product", {got[0], want});
        uint16_t row[2 * L::kWidth];
        Pairs<float>::store_row(reinterpret_cast<uint32_t*>(row), L::load(&a[0]), L::load(&a[L::kWidth]));
        for (int i = 0; i < 2 * L::kWidth; ++i) {
            check::that(bfloat_to_float(row[i]) == a[i], "store_row: lane", {double(i), double(a[i])});
        }
    }
}
#endif

}  // namespace ATTNCAP_ISA
}  // namespace attncap
