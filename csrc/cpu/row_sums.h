// Summaries of rows: how many counted, their mean, spread, smallest, largest and histogram, per head.
// Invariant: the bits are those of attncap/row_sums.py: each sequence is reduced by itself, its rows folded in the
// order of their index alone, then merged into its group's summary in the order of the sequences; nothing is
// contracted.
#pragma once

#include <cstdint>
#include <vector>

#include "problem.h"

namespace attncap {

// Running summary of one statistic in one group: addresses of arrays with an entry per head (attncap.moments.Moments).
struct Moments {
    int64_t *count, *nonfinite;
    double *mean, *m2, *low, *high;
    int64_t* histogram;  // (heads, bins), null for none
    int64_t bins;
};

// One statistic of a call.
struct RowValues {
    Array values;                  // (B, H, N), float32 or float64
    Array counted;                 // (B, H, N), bool
    std::vector<Moments> moments;  // where each of the B sequences is counted
    bool is_signed;                // whether there are bins of negative values
};

// What the rows of one head of one sequence come to: how many were asked for, how many of them are finite and count,
// and of these the mean, the sum of squares around it, the smallest (+inf for none) and the largest (-inf for none).
struct RowSummary {
    int64_t asked, count;
    double mean, m2, low, high;
};

// Memory of one head's rows, kept from one to the next.
struct RowScratch {
    std::vector<double> values, terms;
    std::vector<int64_t> counts;
    std::vector<int32_t> bins;
};

// Sums up head h of sequence b, and counts its rows in a histogram where there is one.
using SummariseRows = RowSummary (*)(const RowValues&, int64_t b, int64_t h, int64_t rows, int64_t* histogram,
                                     RowScratch& scratch);

// The one of an instruction set, or of the widest one here.
SummariseRows summarise_rows_of(const char* isa);

// Counts N rows of B sequences and H heads in their summaries, where head h of the values has the number heads[h].
void add_rows(const std::vector<RowValues>& statistics, int64_t batch, int64_t rows, const std::vector<int64_t>& heads,
              const char* isa);

}  // namespace attncap
