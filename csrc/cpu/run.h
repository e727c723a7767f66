// Cuts a call into tasks and runs them on threads. What is added to what, and in which order, depends on the sizes
// alone, so the number of threads changes no bit; memory that is short with many threads only decides whether
// exponentials are kept or computed once more.
#pragma once

#include "cpu/gradient_run.h"
#include "cpu/head_rows.h"
#include "cpu/peak.h"
#include "cpu/row_block.h"
#include "cpu/shared_facts.h"
#include "cpu/threads.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kKeptBytes = 24 << 20;     // exponentials kept for received_mass, all threads together
constexpr int64_t kPartialBytes = 16 << 20;  // partial column sums in flight

// Work on one head, or on a few that share keys and values where there are so few rows that one task has them all.
struct Unit {
    const Sequence* sequence;
    int64_t head, heads, blocks, groups;

    int64_t sums() const { return groups * heads * sequence->keys; }  // partial column sums
};

// Each group of a head's row blocks sums its received_mass by itself; groups take blocks in turn, which evens out
// causal work.
inline int64_t group_count(int64_t blocks, int64_t keys, int64_t item) {
    const int64_t fitting = std::max<int64_t>(1, kPartialBytes / std::max<int64_t>(1, keys * item));
    return std::max<int64_t>(1, std::min<int64_t>({blocks / 8, 16, fitting}));
}

template <class T>
class Run {
  public:
    explicit Run(const Problem& problem) : p_(problem) {
        for (const Sequence& sequence : p_.sequences) {
            most_keys_ = std::max(most_keys_, sequence.keys);
            if (sequence.rows > kNarrowRows) most_wide_keys_ = std::max(most_wide_keys_, sequence.keys);
        }
        const int64_t kept = most_wide_keys_ * kRows * int64_t(sizeof(T));
        keep_ = p_.received && kept * p_.threads <= kKeptBytes;
        for (const Sequence& sequence : p_.sequences) add_units(sequence);
    }

    void operator()() {
        for (int i = 0; i < p_.threads; ++i) {
            workspaces_.emplace_back(p_, most_keys_, keep_ ? most_wide_keys_ : 0);
        }
        const SharedFacts facts(p_);
        for (size_t first = 0, last; first < units_.size(); first = last) {
            last = p_.received ? chunk_end(first) : units_.size();
            run_units(first, last, facts);
        }
    }

  private:
    const Problem& p_;
    std::vector<Unit> units_;
    std::vector<Workspace<T>> workspaces_;
    std::vector<T> partials_;
    int64_t most_keys_ = 0, most_wide_keys_ = 0;
    bool keep_ = false;

    void add_units(const Sequence& sequence) {
        const int64_t blocks = (sequence.rows + kRows - 1) / kRows, sharing = p_.heads / p_.key_heads;
        if (blocks == 0) return;
        const int64_t groups = p_.received ? group_count(blocks, sequence.keys, sizeof(T)) : blocks;
        const int64_t most = std::max<int64_t>(1, kNarrowRows / sequence.rows);
        for (int64_t head = 0, heads; head < p_.heads; head += heads) {
            heads = std::min(most, sharing - head % sharing);
            units_.push_back({&sequence, head, heads, blocks, groups});
        }
    }

    // As many units at once as their partial sums have room for.
    size_t chunk_end(size_t first) const {
        int64_t bytes = 0;
        size_t last = first;
        while (last < units_.size()) {
            bytes += units_[last].sums() * int64_t(sizeof(T));
            if (last > first && bytes > kPartialBytes) break;
            ++last;
        }
        return last;
    }

    void run_units(size_t first, size_t last, const SharedFacts& facts) {
        std::vector<int64_t> task0(1, 0), sums0(1, 0);  // where each unit's tasks and partial sums begin
        for (size_t u = first; u < last; ++u) {
            task0.push_back(task0.back() + units_[u].groups);
            sums0.push_back(sums0.back() + units_[u].sums());
        }
        if (p_.received) partials_.assign(size_t(sums0.back()), T(0));
        const int64_t tasks = task0.back();
#pragma omp parallel num_threads(p_.threads) if (p_.threads > 1 && tasks > 1)
        {
            Workspace<T>* workspace = &workspaces_[size_t(thread_number())];
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; ++task) {
                const size_t u = size_t(std::upper_bound(task0.begin(), task0.end(), task) - task0.begin()) - 1;
                const Unit& unit = units_[first + u];
                const int64_t group = task - task0[u];
                T* sums =
                    p_.received ? partials_.data() + sums0[u] + group * unit.heads * unit.sequence->keys : nullptr;
                for (int64_t block = group; block < unit.blocks; block += unit.groups) {
                    const Task rows(p_, *unit.sequence, unit.head, unit.heads, block * kRows);
                    RowBlock<T>(rows, facts.of(*unit.sequence, block), workspace)(keep_, sums);
                }
            }
            if (p_.received) {
#pragma omp for schedule(static)
                for (int64_t u = 0; u < int64_t(last - first); ++u) store_received(units_[first + u], sums0[u]);
            }
        }
    }

    void store_received(const Unit& unit, int64_t sums0) {
        const int64_t keys = unit.sequence->keys, count = unit.heads * keys;
        T* total = partials_.data() + sums0;
        for (int64_t group = 1; group < unit.groups; ++group) {
            for (int64_t i = 0; i < count; ++i) total[i] += total[group * count + i];
        }
        const Array& to = p_.received_mass;
        for (int64_t i = 0; i < unit.heads; ++i) {
            store_strided(to.at(unit.sequence->batch, unit.head + i, unit.sequence->key0), to.dtype, to.stride[2],
                          total + i * keys, keys);
        }
    }
};

}  // namespace ATTNCAP_ISA

// The entries of one instruction set.
#define ATTNCAP_DEFINE_ENTRIES(isa)                                                                                \
    void attention_##isa(const Problem& problem) {                                                                 \
        if (problem.query.dtype == DType::float64) {                                                               \
            isa::Run<double>{problem}();                                                                           \
        } else {                                                                                                   \
            isa::Run<float>{problem}();                                                                            \
        }                                                                                                          \
    }                                                                                                              \
    void backward_##isa(const Problem& problem, const Upstream& upstream, const Gradients& gradients) {            \
        if (problem.query.dtype == DType::float64) {                                                               \
            isa::GradientRun<double>{problem, upstream, gradients}();                                              \
        } else {                                                                                                   \
            isa::GradientRun<float>{problem, upstream, gradients}();                                               \
        }                                                                                                          \
    }                                                                                                              \
    double fma_rate_##isa(double seconds) { return isa::fma_rate<float>(seconds); }                                \
    RowSummary summarise_rows_##isa(const RowValues& from, int64_t b, int64_t h, int64_t rows, int64_t* histogram, \
                                    RowScratch& scratch) {                                                         \
        return isa::summarise_rows(from, b, h, rows, histogram, scratch);                                          \
    }

}  // namespace attncap
