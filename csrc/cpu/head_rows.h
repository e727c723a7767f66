// One head of one sequence of one statistic, a vector of rows at a time.
// Invariant: values that do not count are 0 and rows beyond the last never count; rows are folded in the order of their
// index alone, so that every instruction set gives the same bits.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/row_sums.h"
#include "cpu/simd.h"

namespace attncap {
namespace ATTNCAP_ISA {

using DoubleLanes = Lanes<double>;

// The grid of attncap/histogram.py: the upper bits of a float32 are the bin of its magnitude.
constexpr int kBinsPerOctaveLog2 = 6, kBinShift = 23 - kBinsPerOctaveLog2, kOctaves = 16;
constexpr int32_t kLowestBin = (127 - kOctaves) << kBinsPerOctaveLog2;
constexpr int32_t kHighestBin = ((127 + kOctaves) << kBinsPerOctaveLog2) - 1;
constexpr int32_t kSideBins = kHighestBin - kLowestBin + 1;
constexpr int32_t kMagnitude = (0xFF << kBinsPerOctaveLog2) | ((1 << kBinsPerOctaveLog2) - 1);

template <bool Signed>
inline int32_t bin_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const int32_t shifted = bits >> kBinShift;
    // Without bins for them the few negative values that rounding makes of a probability fall into the zero bin.
    const int32_t magnitude = Signed ? shifted & kMagnitude : shifted;
    const int32_t side = std::min(std::max(magnitude, kLowestBin - 1), kHighestBin) - (kLowestBin - 1);
    return Signed ? (shifted < 0 ? -side : side) + kSideBins : side;
}

class HeadRows {
  public:
    HeadRows(const RowValues& from, int64_t rows, RowScratch& scratch)
        : from_(from), rows_(rows), padded_(round_up(rows)), scratch_(scratch) {
        for (auto* memory : {&scratch.values, &scratch.terms}) memory->resize(padded_);
        scratch.counts.resize(padded_);
        scratch.bins.resize(padded_);
    }

    RowSummary operator()(int64_t b, int64_t h) {
        if (from_.values.dtype == DType::float64) {
            read<double>(b, h);
        } else {
            read<float>(b, h);
        }
        RowSummary found = counted();
        std::copy(scratch_.values.begin(), scratch_.values.end(), scratch_.terms.begin());
        found.mean = folded() / static_cast<double>(std::max<int64_t>(found.count, 1));
        square_around(found.mean);
        found.m2 = folded();
        return found;
    }

    void count_bins(int64_t* histogram) const { from_.is_signed ? count<true>(histogram) : count<false>(histogram); }

  private:
    const RowValues& from_;
    const int64_t rows_, padded_;
    RowScratch& scratch_;

    static int64_t round_up(int64_t rows) {
        return (rows + DoubleLanes::kWidth - 1) / DoubleLanes::kWidth * DoubleLanes::kWidth;
    }

    // Values as they are, and counts = -1 for the rows that are asked for.
    template <class T>
    void read(int64_t b, int64_t h) {
        const T* given = reinterpret_cast<const T*>(from_.values.at(b, h));
        const char* wanted = from_.counted.at(b, h);
        const int64_t step = from_.values.stride[2], step_wanted = from_.counted.stride[2];
        double* values = scratch_.values.data();
        int64_t* counts = scratch_.counts.data();
        for (int64_t i = 0; i < rows_; ++i) values[i] = given[i * step];
        for (int64_t i = 0; i < rows_; ++i) counts[i] = -int64_t{wanted[i * step_wanted] != 0};
        std::fill(values + rows_, values + padded_, 0.0);
        std::fill(counts + rows_, counts + padded_, 0);
    }

    // A histogram is seldom in the cache: all bins are found first, so that many are waited for at once.
    template <bool Signed>
    void count(int64_t* histogram) const {
        const double* values = scratch_.values.data();
        const int64_t* counts = scratch_.counts.data();
        int32_t* bins = scratch_.bins.data();
        for (int64_t i = 0; i < rows_; ++i) bins[i] = bin_of<Signed>(static_cast<float>(values[i]));
        for (int64_t i = 0; i < rows_; ++i) histogram[bins[i]] -= counts[i];
    }

    // Leaves out what is not finite; all but the mean and the squares is known then.
    RowSummary counted() {
        using L = DoubleLanes;
        constexpr double infinity = std::numeric_limits<double>::infinity();
        const L::V zero = L::all(0.0);
        L::V low = L::all(infinity), high = L::all(-infinity);
        L::I asked_each = L::all_int(0), count_each = L::all_int(0);
        for (int64_t i = 0; i < padded_; i += L::kWidth) {
            const L::V value = L::load(&scratch_.values[i]);
            const L::I asked = L::load_int(&scratch_.counts[i]);
            const L::M finite = L::equal(value - value, zero);
            const L::I count = L::select_int(finite, asked, L::all_int(0));
            const L::M is_counted = L::less_int(count, L::all_int(0));
            asked_each = asked_each - asked, count_each = count_each - count;
            low = L::min(L::select(is_counted, value, low), low);
            high = L::max(L::select(is_counted, value, high), high);
            L::store(&scratch_.values[i], L::select(is_counted, value, zero));
            L::store_int(&scratch_.counts[i], count);
        }
        RowSummary found{0, 0, 0.0, 0.0, infinity, -infinity};
        for (int lane = 0; lane < L::kWidth; ++lane) {
            found.asked += asked_each[lane], found.count += count_each[lane];
            found.low = std::min<double>(found.low, low[lane]), found.high = std::max<double>(found.high, high[lane]);
        }
        found.low += 0.0, found.high += 0.0;  // of the two zeros the positive one
        return found;
    }

    // Terms become squared distances. Each square is stored before it is added, so that no compiler contracts the two.
    void square_around(double mean) {
        using L = DoubleLanes;
        const L::V middle = L::all(mean), zero = L::all(0.0);
        for (int64_t i = 0; i < padded_; i += L::kWidth) {
            const L::V distance = L::load(&scratch_.values[i]) - middle;
            const L::M is_counted = L::less_int(L::load_int(&scratch_.counts[i]), L::all_int(0));
            L::store(&scratch_.terms[i], L::select(is_counted, distance * distance, zero));
        }
    }

    // Sum of the terms in an order that depends on the index alone: i joins i + P/2, then i + P/4, ..., P the next
    // power of two.
    double folded() {
        if (rows_ == 0) return 0.0;
        double* terms = scratch_.terms.data();
        int64_t length = rows_, half = 1;
        while (half < length) half *= 2;
        for (half /= 2; half > 0; half /= 2) {
            for (int64_t i = 0; i < length - half; ++i) terms[i] += terms[i + half];
            length = half;
        }
        return terms[0] + 0.0;  // -0.0 becomes 0.0, as it would have beside a padding row
    }
};

inline RowSummary summarise_rows(const RowValues& from, int64_t b, int64_t h, int64_t rows, int64_t* histogram,
                                 RowScratch& scratch) {
    HeadRows head(from, rows, scratch);
    const RowSummary found = head(b, h);
    if (histogram) head.count_bins(histogram);
    return found;
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
