// Cuts a call into tasks and runs them on threads. What is added to what, and in which order, depends on the sizes
// alone, so the number of threads changes no bit.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/row_block.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kKeptBytes = 24 << 20;     // exponentials kept for received_mass, all threads together
constexpr int64_t kPartialBytes = 16 << 20;  // partial column sums in flight

struct Head {
    const Sequence* sequence;
    int64_t head, blocks, groups;
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
            const int64_t blocks = (sequence.rows + kRows - 1) / kRows;
            if (blocks == 0) continue;
            most_keys_ = std::max(most_keys_, sequence.keys);
            for (int64_t head = 0; head < p_.heads; ++head) {
                const int64_t groups = p_.received ? group_count(blocks, sequence.keys, sizeof(T)) : blocks;
                heads_.push_back({&sequence, head, blocks, groups});
            }
        }
    }

    void operator()() {
        const int64_t kept = most_keys_ * kRows * int64_t(sizeof(T));
        keep_ = p_.received && kept * p_.threads <= kKeptBytes;
        for (int i = 0; i < p_.threads; ++i) workspaces_.emplace_back(p_, most_keys_, keep_ ? most_keys_ : 0);
        for (size_t first = 0, last; first < heads_.size(); first = last) {
            last = p_.received ? chunk_end(first) : heads_.size();
            run_heads(first, last);
        }
    }

  private:
    const Problem& p_;
    std::vector<Head> heads_;
    std::vector<Workspace<T>> workspaces_;
    std::vector<T> partials_;
    int64_t most_keys_ = 0;
    bool keep_ = false;

    static int thread_number() {
#ifdef _OPENMP
        return omp_get_thread_num();
#else
        return 0;
#endif
    }

    // As many heads at once as their partial sums have room for.
    size_t chunk_end(size_t first) const {
        int64_t bytes = 0;
        size_t last = first;
        while (last < heads_.size()) {
            bytes += heads_[last].groups * heads_[last].sequence->keys * int64_t(sizeof(T));
            if (last > first && bytes > kPartialBytes) break;
            ++last;
        }
        return last;
    }

    void run_heads(size_t first, size_t last) {
        std::vector<int64_t> task0(1, 0), partial0(1, 0);  // where each head's tasks and partial sums begin
        for (size_t h = first; h < last; ++h) {
            task0.push_back(task0.back() + heads_[h].groups);
            partial0.push_back(partial0.back() + heads_[h].groups * heads_[h].sequence->keys);
        }
        if (p_.received) partials_.assign(size_t(partial0.back()), T(0));
        const int64_t tasks = task0.back();
#pragma omp parallel num_threads(p_.threads) if (p_.threads > 1 && tasks > 1)
        {
            Workspace<T>& workspace = workspaces_[size_t(thread_number())];
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < tasks; ++task) {
                const size_t h = size_t(std::upper_bound(task0.begin(), task0.end(), task) - task0.begin()) - 1;
                const Head& head = heads_[first + h];
                const int64_t group = task - task0[h];
                T* sums = p_.received ? partials_.data() + partial0[h] + group * head.sequence->keys : nullptr;
                for (int64_t block = group; block < head.blocks; block += head.groups) {
                    const Task block_task(p_, *head.sequence, head.head, block * kRows);
                    RowBlock<T>(block_task, &workspace).run(keep_, sums);
                }
            }
            if (p_.received) {
#pragma omp for schedule(static)
                for (int64_t h = 0; h < int64_t(last - first); ++h) store_received(heads_[first + h], partial0[h]);
            }
        }
    }

    void store_received(const Head& head, int64_t partial0) {
        const int64_t keys = head.sequence->keys;
        T* total = partials_.data() + partial0;
        for (int64_t group = 1; group < head.groups; ++group) {
            for (int64_t key = 0; key < keys; ++key) total[key] += total[group * keys + key];
        }
        const Array& to = p_.received_mass;
        store_strided(to.at(head.sequence->batch, head.head, head.sequence->key0), to.dtype, to.stride[2], total, 1,
                      keys);
    }
};

}  // namespace ATTNCAP_ISA

// The entry of one instruction set.
#define ATTNCAP_DEFINE_ENTRY(name)                   \
    void name(const Problem& problem) {              \
        if (problem.query.dtype == DType::float64) { \
            ATTNCAP_ISA::Run<double>{problem}();     \
        } else {                                     \
            ATTNCAP_ISA::Run<float>{problem}();      \
        }                                            \
    }

}  // namespace attncap
