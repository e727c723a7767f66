// Count, mean, M2, min, max and histogram of per-row statistics, each sequence of each head by itself: what
// attncap/accumulate.py does with torch operations on other devices, here in one go and with the same bits.
#pragma once

#include "cpu/problem.h"

namespace attncap {

struct RowSummary {
    int64_t sequences = 0, heads = 0, rows = 0;
    Array values;   // (B,H,N) float32 or float64
    Array counted;  // (B,H,N) bool
    // (B,H), contiguous.
    int64_t *count = nullptr, *nonfinite = nullptr;
    double *mean = nullptr, *m2 = nullptr, *low = nullptr, *high = nullptr;
    // (H, bins), contiguous, added to; null for no histogram.
    int64_t* bins = nullptr;
    int64_t bin_count = 0;
    // Bins of attncap/histogram.py: the upper bits of a float32, clamped to [lowest - 1, highest].
    int bin_shift = 0;
    int64_t bin_lowest = 0, bin_highest = 0;
    bool bin_signed = false;
    int threads = 1;
};

void summarise_rows(const RowSummary& summary);

}  // namespace attncap
