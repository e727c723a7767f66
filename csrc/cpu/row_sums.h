// Summaries of rows: how many counted, their mean, spread, smallest, largest and histogram, per sequence and head.
// Invariant: the bits are those of attncap/moments.py and attncap/histogram.py: sums are folded in the order of the
// row's index alone, and every square is stored before it is added, so that no compiler contracts the two.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/problem.h"

namespace attncap {

// One statistic.
struct RowValues {
    Array values;                       // (B, H, N), float32 or float64
    Array counted;                      // (B, H, N), bool
    std::vector<uintptr_t> histograms;  // of each sequence's group: address of int64 (heads, bins); none without bins
    int64_t bins = 0;
    bool is_signed = false;  // whether there are bins of negative values
};

// S statistics of B sequences, H heads and N rows, into arrays that hold, one (S, B, H) after another,
// integers: how many rows counted, how many more were asked for but not finite;
// floats: mean, sum of squares around it, smallest (+inf for none), largest (-inf for none).
// heads[h] is where head h of the values stands in the histograms.
void summarise(const std::vector<RowValues>& statistics, int64_t batch, int64_t rows, const std::vector<int64_t>& heads,
               int64_t* integers, double* floats);

}  // namespace attncap
