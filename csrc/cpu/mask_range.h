// Which keys a mask leaves to a block of rows.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/convert.h"
#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Keys outside of begin .. end - 1 are hidden from all rows; all rows see open_begin .. open_end - 1, without a bias.
struct MaskRange {
    int64_t begin, end, open_begin, open_end;

    // What is known of a call without looking at its mask.
    static MaskRange of_any(const Problem& problem, int64_t keys) {
        return {0, keys, problem.attn_mask.given() ? keys : 0, keys};
    }
};

// Looks at a mask that all heads share.
class MaskLook {
  public:
    explicit MaskLook(int64_t keys) : closed_(size_t(keys)), hidden_(size_t(keys)) {}

    MaskRange operator()(const Problem& problem, const Sequence& sequence, int64_t row0, int64_t rows) {
        std::fill(closed_.begin(), closed_.end(), 0), std::fill(hidden_.begin(), hidden_.end(), 1);
        const Array& mask = problem.attn_mask;
        const int64_t looked_at = mask.stride[2] == 0 ? std::min<int64_t>(rows, 1) : rows;
        for (int64_t i = 0; i < looked_at; ++i) {
            look_at(mask, mask.at(sequence.batch, 0, sequence.row0 + row0 + i, sequence.key0));
        }
        MaskRange found{0, int64_t(hidden_.size()), 0, 0};
        while (found.begin < found.end && hidden_[size_t(found.begin)]) ++found.begin;
        while (found.begin < found.end && hidden_[size_t(found.end) - 1]) --found.end;
        for (int64_t key = found.begin; key < found.end; ++key) {  // the longest range
            const int64_t first = key;
            while (key < found.end && !closed_[size_t(key)]) ++key;
            if (key - first > found.open_end - found.open_begin) found.open_begin = first, found.open_end = key;
        }
        return found;
    }

  private:
    std::vector<uint8_t> closed_, hidden_;  // whether a row has a bias or does not see a key; whether none sees it

    void look_at(const Array& mask, const char* row) {
        const int64_t step = mask.stride[3];
        switch (mask.dtype) {
            case DType::boolean:
                return look<uint8_t>(row, step, [](uint8_t x) { return x == 0; }, [](uint8_t x) { return x == 0; });
            case DType::bfloat16:
                return look<uint16_t>(
                    row, step, [](uint16_t x) { return (x & 0x7fff) != 0; }, [](uint16_t x) { return x == 0xff80; });
            case DType::float16:
                return look<uint16_t>(
                    row, step, [](uint16_t x) { return (x & 0x7fff) != 0; }, [](uint16_t x) { return x == 0xfc00; });
            case DType::float32:
                return look<float>(row, step, [](float x) { return x != 0; }, [](float x) { return x == -INFINITY; });
            case DType::float64:
                return look<double>(
                    row, step, [](double x) { return x != 0; }, [](double x) { return x == -double(INFINITY); });
            case DType::int32:  // no mask is
                return;
        }
    }

    template <class Stored, class IsClosed, class IsHidden>
    void look(const char* row, int64_t step, IsClosed is_closed, IsHidden is_hidden) {
        auto at_step = [&](int64_t bytes) {
            for (size_t key = 0; key < closed_.size(); ++key) {
                const auto bias = read<Stored>(row + int64_t(key) * bytes);
                closed_[key] |= uint8_t(is_closed(bias)), hidden_[key] &= uint8_t(is_hidden(bias));
            }
        };
        constexpr int64_t size = sizeof(Stored);
        step == 1 ? at_step(size) : at_step(step * size);
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
