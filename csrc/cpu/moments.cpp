#include "cpu/moments.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace attncap {
namespace {

// The sum in an order that depends on the index alone: entry i joins entry i + P/2, then P/4, ..., P the next power
// of two, so that zeros at the end change no bit.
double fold(double* values, int64_t length) {
    if (length == 0) return 0.0;
    int64_t half = 1;
    while (half < length) half *= 2;
    for (half /= 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < length - half; ++i) values[i] += values[half + i];
        length = std::min(length, half);
    }
    return values[0] + 0.0;
}

double read_value(const char* p, DType dtype) {
    if (dtype == DType::float64) {
        double value;
        std::memcpy(&value, p, sizeof value);
        return value;
    }
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

int64_t bin_of(const RowSummary& s, double value) {
    const float single = float(value);
    int32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    const int64_t below = s.bin_lowest - 1;
    const int64_t shifted = bits >> s.bin_shift;
    if (!s.bin_signed) return std::clamp(shifted, below, s.bin_highest) - below;
    const int64_t magnitude = (bits & 0x7fffffff) >> s.bin_shift;
    const int64_t index = std::clamp(magnitude, below, s.bin_highest) - below;
    return s.bin_highest - below + (shifted < 0 ? -index : index);
}

// One sequence of one head; `rows`, `kept` and `terms` have room for its rows.
void summarise(const RowSummary& s, int64_t sequence, int64_t head, double* rows, double* terms) {
    const int64_t value_step = s.values.stride[2] * item_size(s.values.dtype);
    const char* value = s.values.at(sequence, head);
    const char* counted = s.counted.at(sequence, head);
    const double infinite = std::numeric_limits<double>::infinity();
    int64_t count = 0, nonfinite = 0;
    double low = infinite, high = -infinite;
    for (int64_t i = 0; i < s.rows; ++i) {
        const double x = read_value(value + i * value_step, s.values.dtype);
        const bool wanted = counted[i * s.counted.stride[2]] != 0, finite = std::isfinite(x);
        nonfinite += wanted && !finite;
        // Rows that do not count stay in place as NaN, so that every sum keeps its order.
        rows[i] = wanted && finite ? x : std::numeric_limits<double>::quiet_NaN();
        terms[i] = 0.0;
        if (!wanted || !finite) continue;
        ++count;
        terms[i] = x;
        low = std::min(low, x), high = std::max(high, x);
        if (s.bins) ++s.bins[head * s.bin_count + bin_of(s, x)];
    }
    const double mean = fold(terms, s.rows) / double(std::max<int64_t>(count, 1));
    for (int64_t i = 0; i < s.rows; ++i) {
        const double away = rows[i] - mean;
        terms[i] = rows[i] == rows[i] ? away * away : 0.0;
    }
    const int64_t at = sequence * s.heads + head;
    s.count[at] = count, s.nonfinite[at] = nonfinite;
    s.mean[at] = mean, s.m2[at] = fold(terms, s.rows);
    s.low[at] = low, s.high[at] = high;
}

}  // namespace

void summarise_rows(const RowSummary& s) {
    std::vector<std::vector<double>> scratch(size_t(s.threads), std::vector<double>(size_t(2 * s.rows)));
#pragma omp parallel for num_threads(s.threads) schedule(static, 1) if (s.threads > 1 && s.heads > 1)
    for (int64_t lane = 0; lane < s.threads; ++lane) {
        double* rows = scratch[size_t(lane)].data();
        for (int64_t head = lane; head < s.heads; head += s.threads) {  // a head's histogram belongs to one thread
            for (int64_t sequence = 0; sequence < s.sequences; ++sequence) {
                summarise(s, sequence, head, rows, rows + s.rows);
            }
        }
    }
}

}  // namespace attncap
