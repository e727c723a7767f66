#include "cpu/row_sums.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace attncap {
namespace {

// The grid of attncap/histogram.py: the upper bits of a float32 are the bin of its magnitude.
constexpr int BINS_PER_OCTAVE_LOG2 = 6, SHIFT = 23 - BINS_PER_OCTAVE_LOG2, OCTAVES = 16;
constexpr int32_t LOWEST = (127 - OCTAVES) << BINS_PER_OCTAVE_LOG2;
constexpr int32_t HIGHEST = ((127 + OCTAVES) << BINS_PER_OCTAVE_LOG2) - 1;
constexpr int32_t SIDE_BINS = HIGHEST - LOWEST + 1;
constexpr int32_t MAGNITUDE = (0xFF << BINS_PER_OCTAVE_LOG2) | ((1 << BINS_PER_OCTAVE_LOG2) - 1);

int32_t bin_of(float value, bool is_signed) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const int32_t shifted = bits >> SHIFT;
    // Without bins for them the few negative values that rounding makes of a probability fall into the zero bin.
    const int32_t magnitude = is_signed ? shifted & MAGNITUDE : shifted;
    const int32_t side = std::min(std::max(magnitude, LOWEST - 1), HIGHEST) - (LOWEST - 1);
    return is_signed ? (shifted < 0 ? -side : side) + SIDE_BINS : side;
}

// Sum in an order that depends on the index alone: i joins i + P/2, then i + P/4, ..., P the next power of two.
double fold(double* terms, int64_t length) {
    if (length == 0) return 0.0;
    int64_t half = 1;
    while (half < length) half *= 2;
    for (half /= 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < length - half; ++i) terms[i] += terms[i + half];
        length = half;
    }
    return terms[0] + 0.0;  // -0.0 becomes 0.0, as it would have beside a padding row
}

// One head of one sequence; kept from one to the next, so that memory is asked for once.
struct Rows {
    std::vector<double> values, terms;  // values that do not count are 0
    std::vector<uint8_t> counts;
    int64_t asked, count;
    double low, high;

    explicit Rows(int64_t length) : values(length), terms(length), counts(length) {}

    template <class T>
    void read(const RowValues& from, int64_t b, int64_t h) {
        const T* given = reinterpret_cast<const T*>(from.values.at(b, h));
        const char* wanted = from.counted.at(b, h);
        const int64_t step = from.values.stride[2], step_wanted = from.counted.stride[2];
        asked = count = 0;
        low = std::numeric_limits<double>::infinity(), high = -low;
        for (size_t i = 0; i < values.size(); ++i) {
            const double value = given[i * step];
            const bool is_asked = wanted[i * step_wanted], is_counted = is_asked && value - value == 0.0;
            values[i] = is_counted ? value : 0.0;
            counts[i] = is_counted;
            asked += is_asked, count += is_counted;
            low = is_counted && value < low ? value : low;
            high = is_counted && value > high ? value : high;
        }
        low += 0.0, high += 0.0;  // of the two zeros the positive one
    }

    double mean() {
        std::copy(values.begin(), values.end(), terms.begin());
        return fold(terms.data(), static_cast<int64_t>(terms.size())) /
               static_cast<double>(std::max<int64_t>(count, 1));
    }

    double squares_around(double mean) {
        for (size_t i = 0; i < values.size(); ++i) {
            const double difference = values[i] - mean;
            terms[i] = counts[i] ? difference * difference : 0.0;
        }
        return fold(terms.data(), static_cast<int64_t>(terms.size()));
    }

    void count_bins(int64_t* bins, bool is_signed) const {
        for (size_t i = 0; i < values.size(); ++i) bins[bin_of(static_cast<float>(values[i]), is_signed)] += counts[i];
    }
};

}  // namespace

void summarise(const std::vector<RowValues>& statistics, int64_t batch, int64_t rows, const std::vector<int64_t>& heads,
               int64_t* integers, double* floats) {
    const int64_t width = static_cast<int64_t>(heads.size());
    const int64_t size = static_cast<int64_t>(statistics.size()) * batch * width;
    Rows head(rows);
    int64_t place = 0;
    for (const RowValues& statistic : statistics) {
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t h = 0; h < width; ++h, ++place) {
                if (statistic.values.dtype == DType::float64) {
                    head.read<double>(statistic, b, h);
                } else {
                    head.read<float>(statistic, b, h);
                }
                integers[place] = head.count;
                integers[size + place] = head.asked - head.count;
                floats[place] = head.mean();
                floats[size + place] = head.squares_around(floats[place]);
                floats[2 * size + place] = head.low;
                floats[3 * size + place] = head.high;
                if (statistic.bins > 0) {
                    int64_t* bins = reinterpret_cast<int64_t*>(statistic.histograms[b]) + heads[h] * statistic.bins;
                    head.count_bins(bins, statistic.is_signed);
                }
            }
        }
    }
}

}  // namespace attncap
