// The products of a backward that follow its maps, of bfloat16 tensors whose loss depends on the output alone, on
// processors that multiply pairs of these: twice the work an instruction, or far more on matrix registers.
// Probabilities and derivatives by scores are rounded for them, as exponentials are for the output; sums stay in float.
#pragma once

#include "cpu/arrived.h"
#include "cpu/gradient_tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
class GradientPairs {
    using L = Lanes<T>;
    using Tiles = MatrixTiles<T>;
    static constexpr bool kPairing = kHasPairs && sizeof(T) == 4;

  public:
    GradientPairs(const Task& task, const Arrival<T>& arrival, GradientWorkspace<T>* workspace)
        : t_(task), arrival_(arrival), w_(*workspace), vectors_(int(whole_vectors<T>(task.lanes()) / L::kWidth)) {}

    // A tensor's rows as [kRows / 2][width] words of neighbours, in `room`; 0 where a row sees nothing, for it may hold
    // no number.
    void load_rows(const Array& from, int64_t dim, int64_t width, T* room) const {
        auto* words = reinterpret_cast<uint32_t*>(room);
        std::fill(words, words + kRows / 2 * width, 0);
        const int64_t last = t_.lanes() - 1;
        for (int64_t i = 0; i <= last; i += 2, words += width) {
            const uint32_t keep = (arrival_.sees(i) ? 0xffff : 0) | (arrival_.sees(i + 1) ? 0xffff0000 : 0);
            pair(t_.at(from, i), t_.at(from, std::min(i + 1, last)), dim, words);
            for (int64_t d = 0; keep != 0xffffffff && d < dim; ++d) words[d] &= keep;
        }
    }

    // sums[key][width] += map^T rows for `count` keys, rows being those of load_rows. terms(k0, k1) gives the range of
    // lanes that can be other than zero for keys k0 .. k1 - 1.
    template <class Terms>
    void add_rows(const T* map, uint32_t* rounded, int64_t count, const T* rows, int64_t width, Terms terms,
                  T* sums) const {
        round_rows(map, count, rounded);
        const auto words = [&](int64_t k0, int64_t k1) {
            const auto [first, last] = terms(k0, k1);
            return std::pair<int64_t, int64_t>(first / 2, (last + 1) / 2);
        };
        const Matrix<const uint32_t> right{reinterpret_cast<const uint32_t*>(rows), width};
        int64_t done = 0;
        if constexpr (Tiles::kHere) done = add_on_registers(rounded, count, right, words, sums);
        if constexpr (kPairing) {
            const auto rest = [&](int64_t k0, int64_t k1) { return words(done + k0, done + k1); };
            add_product<Pairs<T>>({rounded + done * kRows / 2, kRows / 2}, count - done, right, int(width / L::kWidth),
                                  rest, {sums + done * width, width});
        }
    }

    // query_sum[d][row] += map^T keys for `count` keys from key0 on.
    void add_keys(const T* map, const KeyRows<T>& keys, int64_t key0, int64_t count, int64_t dim) const {
        round_keys(map, count, w_.paired.slope_of_keys);
        auto* words = reinterpret_cast<uint32_t*>(w_.keys);
        const int64_t pairs = (count + 1) / 2;
        for (int64_t i = 0; i < pairs; ++i) {
            // Where there is no second key its derivatives are 0, and the first one stands for it.
            pair(keys.at(key0 + 2 * i), keys.at(key0 + std::min(2 * i + 1, count - 1)), dim, words + i * dim);
        }
        if constexpr (Tiles::kHere) {
            if (dim % Tiles::kSide == 0) return add_turned(words, pairs, dim);
        }
        if constexpr (kPairing) {
            accumulate_values<Pairs<T>>(w_.paired.slope_of_keys, words, dim, pairs, dim, vectors_, w_.ones,
                                        w_.query_sum);
        }
    }

  private:
    const Task& t_;
    const Arrival<T>& arrival_;
    GradientWorkspace<T>& w_;
    const int vectors_;

    // [dim] words of two rows of bfloat16, the first below.
    static void pair(const char* first, const char* second, int64_t dim, uint32_t* words) {
        int64_t d = 0;
        if constexpr (kPairing) {
            for (; d + 2 * L::kWidth <= dim; d += 2 * L::kWidth) {
                Pairs<T>::interleave(first + 2 * d, second + 2 * d, 0xffff0000, words + d);
            }
        }
        for (; d < dim; ++d) {
            words[d] = read<uint16_t>(first + 2 * d) | (uint32_t(read<uint16_t>(second + 2 * d)) << 16);
        }
    }

    // As many keys as fill registers; gives their number.
    template <class Terms>
    int64_t add_on_registers(const uint32_t* rounded, int64_t count, Matrix<const uint32_t> right, Terms words,
                             T* sums) const {
        constexpr int64_t kSide = Tiles::kSide, kRowBytes = kRows * 2;
        const int64_t whole = count / kSide * kSide, width = right.stride;
        for (int64_t k = 0; k < whole; k += kSide) {
            const auto [begin, end] = words(k, k + kSide);
            const int64_t from = begin / kSide * kSide, steps = (end - from + kSide - 1) / kSide;
            if (begin >= end) continue;
            const auto* left = reinterpret_cast<const char*>(rounded + k * kRows / 2 + from);
            for (int64_t column = 0; column < width; column += kRows) {
                Tiles::multiply(
                    {left, kRowBytes, 4 * kSide, kSide * kRowBytes, right.data + from * width + column, steps, width},
                    1, 0, int(std::min(kRows, width - column) / kSide), false, sums + k * width + column);
            }
        }
        return whole;
    }

    // What add_keys adds, from words of neighbouring keys.
    void add_turned(uint32_t* words, int64_t pairs, int64_t dim) const {
        constexpr int64_t kSide = Tiles::kSide, kRowBytes = 4 * kSide;
        const int64_t steps = (pairs + kSide - 1) / kSide, whole = steps * kSide;
        uint32_t* turned = words + whole * dim;
        std::fill(words + pairs * dim, words + whole * dim, 0);
        std::fill(w_.paired.slope_of_keys + pairs * kRows, w_.paired.slope_of_keys + whole * kRows, 0);
        for (int64_t step = 0; step < steps; ++step) {
            Tiles::turn(words + step * kSide * dim, dim, turned + step * kSide * dim);
        }
        Tiles::multiply({reinterpret_cast<const char*>(turned), kRowBytes, kRowBytes * dim, kRowBytes * kSide,
                         w_.paired.slope_of_keys, steps},
                        dim / kSide, 0, vectors_, false, w_.query_sum);
    }

    // A map in words of neighbouring rows, 0 in lanes past the last vector.
    void round_rows(const T* map, int64_t count, uint32_t* rounded) const {
        if constexpr (kPairing) {
            for (int64_t k = 0; k < count; ++k) {
                for (int v = 0; v < int(kRows / L::kWidth); v += 2) {
                    const T* from = map + k * kRows + v * L::kWidth;
                    const auto first = v < vectors_ ? L::load(from) : L::all(0);
                    const auto second = v + 1 < vectors_ ? L::load(from + L::kWidth) : L::all(0);
                    Pairs<T>::store_row(rounded + (k * kRows + v * L::kWidth) / 2, first, second);
                }
            }
        }
    }

    // The same in words of neighbouring keys.
    void round_keys(const T* map, int64_t count, uint32_t* rounded) const {
        if constexpr (kPairing) {
            for (int64_t k = 0; k < count; k += 2) {
                for (int v = 0; v < vectors_; ++v) {
                    const T* from = map + k * kRows + v * L::kWidth;
                    const auto second = k + 1 < count ? L::load(from + kRows) : L::all(0);
                    Pairs<T>::store_rounded(rounded + k / 2 * kRows + v * L::kWidth, L::load(from), second);
                }
            }
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
