// Values of two neighbouring keys in a word, as their exponentials are multiplied.
#pragma once

#include "cpu/arena.h"
#include "cpu/row_product.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kConvertValues = 576;    // values converted, or turned, at a time
constexpr int64_t kTurnedBytes = 4 << 20;  // of values that a thread keeps

template <class T>
constexpr int64_t whole_steps(int64_t keys) {
    constexpr int64_t kStep = std::max<int64_t>(2, MatrixTiles<T>::kStep);
    return (keys + kStep - 1) / kStep * kStep;
}

// out[d] holds first[d] below and second[d] above, or 0 where there is no second.
template <class T>
void pair_rows(const char* first, const char* second, int64_t step, int64_t dims, bool both, uint32_t* out) {
    constexpr int64_t kTwoVectors = 2 * Lanes<T>::kWidth;
    const uint32_t keep = both ? 0xffff0000 : 0;
    int64_t d = 0;
    if constexpr (kHasPairs && sizeof(T) == 4) {
        for (; step == 2 && d + kTwoVectors <= dims; d += kTwoVectors) {
            Pairs<T>::interleave(first + 2 * d, second + 2 * d, keep, out + d);
        }
    }
    for (; d < dims; ++d) {
        out[d] = read<uint16_t>(first + d * step) | ((uint32_t(read<uint16_t>(second + d * step)) << 16) & keep);
    }
}

// [pairs of `count` keys][width] words, 0 from `dims` on.
template <class T>
void pair_keys(const KeyRows<T>& values, int64_t key0, int64_t count, int64_t dims, int64_t width, uint32_t* out) {
    for (int64_t k = 0; k < count; k += 2, out += width) {
        const bool both = k + 1 < count;
        const char* first = values.at(key0 + k);
        pair_rows<T>(first, both ? values.at(key0 + k + 1) : first, values.step(), dims, both, out);
        std::fill(out + dims, out + width, 0);
    }
}

// The values of a key head as matrix registers read them, kept for the tasks that follow, as many as there is room for.
template <class T>
class TurnedValues {
    using Tiles = MatrixTiles<T>;

  public:
    // For rows of `width` values, whole vectors.
    void take(Arena* arena, int64_t keys, int64_t width) {
        width_ = width;
        room_ = std::min(whole_steps<T>(keys),
                         std::max(kConvertValues, kTurnedBytes / (2 * width) / Tiles::kStep * Tiles::kStep));
        arena->take(&words_, room_ / 2 * width_);
    }

    // Registers [step of keys][16 dims] for keys from key0 on, a multiple of a step; `count` is at most kConvertValues.
    const uint32_t* read(const Task& task, const KeyRows<T>& values, int64_t key0, int64_t count, uint32_t* staging) {
        const int64_t end = key0 + whole_steps<T>(count);
        const bool same = sequence_ == &task.sequence && key_head_ == task.key_head();
        if (!same || key0 < begin_ || key0 > end_ || end > begin_ + room_) {
            sequence_ = &task.sequence, key_head_ = task.key_head();
            begin_ = end_ = key0;
        }
        for (; end_ < end; end_ += Tiles::kStep) {
            turn(values, end_, std::min(Tiles::kStep, task.sequence.keys - end_), staging);
        }
        return words_ + (key0 - begin_) / 2 * width_;
    }

  private:
    uint32_t* words_ = nullptr;
    int64_t width_ = 0, room_ = 0;  // room is in keys
    const Sequence* sequence_ = nullptr;
    int64_t key_head_ = 0, begin_ = 0, end_ = 0;

    // One step of keys, of which `count` are there.
    void turn(const KeyRows<T>& values, int64_t key0, int64_t count, uint32_t* staging) {
        pair_keys(values, key0, count, values.dim(), width_, staging);
        std::fill(staging + (count + 1) / 2 * width_, staging + Tiles::kSide * width_, 0);
        Tiles::turn(staging, width_, words_ + (key0 - begin_) / 2 * width_);
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
