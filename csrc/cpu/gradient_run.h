// Cuts a backward into tasks and runs them on threads. Keys are taken in slabs, one after another: within a slab every
// task has sums over its rows of its own, which are then joined in a fixed order, and adds to its rows of dQ. What is
// added to what, and in which order, depends on the sizes alone, so the number of threads changes no bit.
#pragma once

#include "cpu/gradient_block.h"
#include "cpu/levels.h"
#include "cpu/threads.h"

namespace attncap {
namespace ATTNCAP_ISA {

constexpr int64_t kSlabBytes = 512 << 10;  // of the sums over rows that one task fills
constexpr int64_t kSumsBytes = 32 << 20;   // of those of all tasks at once
constexpr int64_t kFewTasks = 16;          // fewer heads than these are cut into groups of rows
constexpr int64_t kBlocksOfGroup = 4;      // at least

// The query heads of one sequence that share keys and values.
struct KeyHead {
    const Sequence* sequence;
    int64_t head, blocks, groups;  // head is that of the keys
    int64_t level0, sums0;         // where its levels and its sums begin
};

// What one task has of it.
struct Share {
    const KeyHead& unit;
    int64_t group;
};

template <class T>
class GradientRun {
    using Int = typename Lanes<T>::Int;

  public:
    GradientRun(const Problem& problem, const Upstream& upstream, const Gradients& gradients)
        : p_(problem),
          u_(upstream),
          g_(gradients),
          sharing_(p_.heads / p_.key_heads),
          key_width_(whole_vectors<T>(p_.key_dim)),
          value_width_(whole_vectors<T>(p_.value_dim)),
          width_(key_width_ + value_width_ + whole_vectors<T>(p_.features)),
          slab_(std::max<int64_t>(kMapKeys, kSlabBytes / (width_ * int64_t(sizeof(T))) / kMapKeys * kMapKeys)),
          null_sums_(size_t(p_.heads)) {
        int64_t most_keys = 0;
        for (const Sequence& sequence : p_.sequences) most_keys = std::max(most_keys, sequence.keys);
        for (int i = 0; i < p_.threads; ++i) workspaces_.emplace_back(p_, std::min(slab_, most_keys) * width_);
        for (const Sequence& sequence : p_.sequences) {
            for (int64_t head = 0; head < p_.key_heads && sequence.rows > 0; ++head) {
                units_.push_back({&sequence, head, (sequence.rows + kRows - 1) / kRows, 1, 0, 0});
            }
        }
        for (KeyHead& unit : units_) unit.groups = group_count(unit);
    }

    void operator()() {
        for (size_t first = 0, last; first < units_.size(); first = last) {
            last = place(first);
            run_units(first, last);
        }
        if (!g_.sink_logits.given()) return;
        for (int64_t head = 0; head < p_.heads; ++head) {
            *reinterpret_cast<T*>(g_.sink_logits.at(head)) = T(null_sums_[size_t(head)]);
        }
    }

  private:
    const Problem& p_;
    const Upstream& u_;
    const Gradients& g_;
    const int64_t sharing_, key_width_, value_width_, width_, slab_;
    std::vector<KeyHead> units_;
    std::vector<GradientWorkspace<T>> workspaces_;
    std::vector<T> level_, null_term_;
    std::vector<Int> first_key_;
    Arena memory_;
    T* sums_ = nullptr;
    int64_t sums_room_ = 0;
    std::vector<double> null_sums_;

    // Whether key heads add to the same entries of the mask's gradient, or groups of one do.
    bool mask_joins_units() const {
        const Array& mask = g_.attn_mask;
        return mask.given() &&
               ((p_.sequences.size() > 1 && mask.stride[0] == 0) || (p_.key_heads > 1 && mask.stride[1] == 0));
    }
    bool mask_joins_rows() const { return g_.attn_mask.given() && g_.attn_mask.stride[2] == 0; }

    int64_t slab_of(const KeyHead& unit) const { return std::min(slab_, unit.sequence->keys); }
    int64_t slabs_of(const KeyHead& unit) const { return (unit.sequence->keys + slab_ - 1) / slab_; }

    int64_t group_count(const KeyHead& unit) const {
        if (mask_joins_rows()) return 1;
        const int64_t units = mask_joins_units() ? 1 : int64_t(units_.size());
        return std::clamp<int64_t>(unit.blocks / kBlocksOfGroup, 1, std::max<int64_t>(1, kFewTasks / units));
    }

    // Whether one task has the sums of a unit, so that they lie with its thread.
    bool is_alone(const KeyHead& unit) const { return unit.groups == 1 && !g_.key_features.given(); }

    // Takes as many units at once as their sums have room for; gives the one after the last.
    size_t place(size_t first) {
        int64_t levels = 0, sums = 0;
        size_t last = first;
        for (; last < units_.size(); ++last) {
            KeyHead& unit = units_[last];
            const int64_t more = is_alone(unit) ? 0 : unit.groups * slab_of(unit) * width_;
            if (last > first && (mask_joins_units() || (sums + more) * int64_t(sizeof(T)) > kSumsBytes)) break;
            unit.level0 = levels, unit.sums0 = sums;
            levels += unit.sequence->rows * sharing_, sums += more;
        }
        level_.resize(size_t(levels)), null_term_.resize(size_t(levels)), first_key_.resize(size_t(levels));
        if (sums > sums_room_) {
            sums_room_ = sums;
            memory_.lay_out([&] { memory_.take(&sums_, sums); });
        }
        return last;
    }

    void run_units(size_t first, size_t last) {
        std::vector<Share> shares;
        int64_t slabs = 0;
        for (size_t u = first; u < last; ++u) {
            for (int64_t group = 0; group < units_[u].groups; ++group) shares.push_back({units_[u], group});
            slabs = std::max(slabs, slabs_of(units_[u]));
        }
#pragma omp parallel num_threads(p_.threads) if (p_.threads > 1 && shares.size() > 1)
        {
            GradientWorkspace<T>* workspace = &workspaces_[size_t(thread_number())];
#pragma omp for schedule(dynamic, 1)
            for (size_t i = 0; i < shares.size(); ++i) find_levels(shares[i], workspace);
            for (int64_t slab = 0; slab < slabs; ++slab) {
#pragma omp for schedule(dynamic, 1)
                for (size_t i = 0; i < shares.size(); ++i) add_slab(slab, shares[i], workspace);
#pragma omp for schedule(static)
                for (size_t u = first; u < last; ++u) join(units_[u], slab);
#pragma omp single
                for (size_t u = first; u < last; ++u) add_features(units_[u], slab);
            }
        }
        for (size_t u = first; u < last && g_.sink_logits.given(); ++u) add_null_terms(units_[u]);
    }

    // body(task, where the levels of its rows begin) for a group's rows. Blocks are taken in turn, which evens out
    // causal work; all heads of a block come together.
    template <class Body>
    void each_task(const Share& share, Body&& body) {
        const KeyHead& unit = share.unit;
        const Sequence& sequence = *unit.sequence;
        // Few rows of some heads fill the lanes together, unless something arrives at keys from each head apart.
        const int64_t most = u_.received_mass.given() ? 1 : std::max<int64_t>(1, kRows / sequence.rows);
        for (int64_t block = share.group; block < unit.blocks; block += unit.groups) {
            for (int64_t head = 0, heads; head < sharing_; head += heads) {
                heads = std::min(most, sharing_ - head);
                const Task task(p_, sequence, unit.head * sharing_ + head, heads, block * kRows);
                body(task, size_t(unit.level0 + head * sequence.rows + task.row0));
            }
        }
    }

    void find_levels(const Share& share, GradientWorkspace<T>* workspace) {
        each_task(share, [&](const Task& task, size_t at) {
            RowLevels<T>(task, u_, workspace)();
            // Heads that come together have one block of rows: the lanes lie as the levels do.
            const size_t lanes = size_t(task.lanes());
            std::copy_n(workspace->level, lanes, &level_[at]);
            std::copy_n(workspace->null_term, lanes, &null_term_[at]);
            std::copy_n(workspace->first_key, lanes, &first_key_[at]);
            for (int64_t i = 0; g_.level.given() && i < task.lanes(); ++i) {
                *reinterpret_cast<T*>(task.at(g_.level, i)) = workspace->level[i];
            }
        });
    }

    // Of the sums that begin at `first`.
    KeySums<T> parts_of(T* first, const KeyHead& unit) const {
        const int64_t keys = slab_of(unit);
        return {first, first + keys * key_width_, first + keys * (key_width_ + value_width_)};
    }

    void add_slab(int64_t slab, const Share& share, GradientWorkspace<T>* workspace) {
        const KeyHead& unit = share.unit;
        const int64_t begin = slab * slab_, end = std::min(unit.sequence->keys, begin + slab_);
        if (begin >= end) return;
        const int64_t size = slab_of(unit) * width_;
        T* sums = is_alone(unit) ? workspace->sums : sums_ + unit.sums0 + share.group * size;
        std::fill_n(sums, size, T(0));
        each_task(share, [&](const Task& task, size_t at) {
            if (!may_see(task, begin, end)) return;
            const size_t lanes = size_t(task.lanes());
            std::fill_n(workspace->level, kRows, T(0));
            std::copy_n(&level_[at], lanes, workspace->level);
            std::copy_n(&first_key_[at], lanes, workspace->first_key);
            GradientBlock<T>(task, u_, g_, workspace)(begin, end, parts_of(sums, unit));
        });
        if (is_alone(unit)) store_keys(unit, slab, sums);
    }

    // A cheap test before anything is loaded.
    bool may_see(const Task& task, int64_t begin, int64_t end) const {
        const int64_t low = task.position_of(0), high = low + task.rows - 1;
        return !(p_.causal && begin > high) && !(p_.window_right >= 0 && begin > high + p_.window_right) &&
               !(p_.window_left >= 0 && end <= low - p_.window_left);
    }

    // Joins the groups of a unit.
    void join(const KeyHead& unit, int64_t slab) {
        if (is_alone(unit) || slab >= slabs_of(unit)) return;
        T* total = sums_ + unit.sums0;
        const int64_t size = slab_of(unit) * width_;
        for (int64_t group = 1; group < unit.groups; ++group) {
            for (int64_t i = 0; i < size; ++i) total[i] += total[group * size + i];
        }
        store_keys(unit, slab, total);
    }

    // What the keys of a slab get.
    void store_keys(const KeyHead& unit, int64_t slab, T* sums) const {
        const int64_t key0 = slab * slab_, count = std::min(unit.sequence->keys - key0, slab_);
        const auto store = [&](const Array& to, const T* from, int64_t dim, int64_t width, T scale) {
            for (int64_t k = 0; to.given() && k < count; ++k) {
                char* row = to.at(unit.sequence->batch, unit.head, unit.sequence->key0 + key0 + k);
                for (int64_t d = 0; d < dim; ++d) reinterpret_cast<T*>(row)[d] = scale * from[k * width + d];
            }
        };
        const KeySums<T> parts = parts_of(sums, unit);
        store(g_.key, parts.key, p_.key_dim, key_width_, T(p_.scale));
        store(g_.value, parts.value, p_.value_dim, value_width_, T(1));
    }

    // The features of a key are shared by all heads, so one thread adds up what these give.
    void add_features(const KeyHead& unit, int64_t slab) {
        if (!g_.key_features.given() || slab >= slabs_of(unit)) return;
        const int64_t key0 = slab * slab_, count = std::min(unit.sequence->keys - key0, slab_);
        const int64_t width = width_ - key_width_ - value_width_;
        const T* from = parts_of(sums_ + unit.sums0, unit).features;
        for (int64_t k = 0; k < count; ++k) {
            char* row = g_.key_features.at(unit.sequence->batch, unit.sequence->key0 + key0 + k);
            for (int64_t f = 0; f < p_.features; ++f) reinterpret_cast<T*>(row)[f] += from[k * width + f];
        }
    }

    void add_null_terms(const KeyHead& unit) {
        const int64_t rows = unit.sequence->rows;
        for (int64_t i = 0; i < sharing_ * rows; ++i) {
            null_sums_[size_t(unit.head * sharing_ + i / rows)] += null_term_[size_t(unit.level0 + i)];
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
