#include "cpu/row_sums.h"

#include <algorithm>

namespace attncap {
namespace {

// Merges one sequence into a head's summary (Chan, Golub and LeVeque 1983).
void merge(const RowSummary& rows, const Moments& into, int64_t head) {
    const int64_t after = into.count[head] + rows.count;
    const double share = static_cast<double>(rows.count) / static_cast<double>(std::max<int64_t>(after, 1));
    const double weight = static_cast<double>(after - rows.count) * share;
    const double delta = rows.mean - into.mean[head];
    into.mean[head] += delta * share;
    into.m2[head] += rows.m2 + delta * delta * weight;
    into.count[head] = after;
    into.nonfinite[head] += rows.asked - rows.count;
    into.low[head] = std::min(into.low[head], rows.low);
    into.high[head] = std::max(into.high[head], rows.high);
}

}  // namespace

void add_rows(const std::vector<RowValues>& statistics, int64_t batch, int64_t rows, const std::vector<int64_t>& heads,
              const char* isa) {
    const SummariseRows summarise = summarise_rows_of(isa);
    RowScratch scratch;
    for (const RowValues& statistic : statistics) {
        for (int64_t b = 0; b < batch; ++b) {
            const Moments& moments = statistic.moments[b];
            for (size_t h = 0; h < heads.size(); ++h) {
                int64_t* histogram = moments.histogram ? moments.histogram + heads[h] * moments.bins : nullptr;
                merge(summarise(statistic, b, static_cast<int64_t>(h), rows, histogram, scratch), moments, heads[h]);
            }
        }
    }
}

}  // namespace attncap
