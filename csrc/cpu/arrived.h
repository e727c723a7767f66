// What arrives at the rows of a task, and the part of it that touches only some keys of a row.
// Invariant: lanes past the rows and rows that see no key have a lse of +infinity, hence probabilities of 0, and they
// and rows that `query_mask` leaves out have derivatives of 0 by their statistics, whatever was given.
#pragma once

#include "cpu/elementary.h"
#include "cpu/gradient_tiles.h"
#include "cpu/gradient_workspace.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
class Arrival {
    using L = Lanes<T>;
    using Int = typename L::Int;

  public:
    Arrival(const Task& task, const Upstream& upstream, GradientWorkspace<T>* workspace)
        : t_(task), p_(task.problem), u_(upstream), w_(*workspace), a_(workspace->arrived) {}

    void load_rows() {
        for (int64_t i = 0; i < kRows; ++i) {
            const int64_t lane = std::min(i, t_.lanes() - 1);
            const T lse = load_one<T>(t_.at(p_.lse, lane), p_.lse.dtype);
            w_.position[i] = Int(t_.position_of(lane));
            w_.lse[i] = i < t_.lanes() && lse != T(-INFINITY) ? lse : T(INFINITY);
            const bool counts =
                sees(i) && (!p_.query_mask.given() || *p_.query_mask.at(t_.sequence.batch, t_.row_of(lane)) != 0);
            a_.counted[i] = T(counts);
        }
        load(u_.entropy, 0, a_.entropy), load(u_.collision, 0, a_.collision), load(u_.distance, 0, a_.distance);
        load(u_.sink_mass, 0, a_.sink), load(u_.diagonal_mass, 0, a_.diagonal), load(u_.max_logit, 0, a_.max);
        for (size_t o = 0; o < p_.offsets.size(); ++o) load(u_.offset_mass, int64_t(o), a_.offsets + o * kRows);
        for (int64_t f = 0; f < p_.features; ++f) load(u_.feature_mass, f, a_.features + f * kRows);
        for (int64_t t = 0; t < p_.tags && u_.tag_mass.given(); ++t) load_tag(t);
        for (int64_t n = 0; n < p_.topk && u_.topk_prob.given(); ++n) load_topk(n);
    }

    bool sees(int64_t lane) const { return w_.lse[lane] != T(INFINITY); }

    bool all_see() const {
        return std::none_of(w_.lse, w_.lse + t_.lanes(), [](T lse) { return lse == T(INFINITY); });
    }

    // A number per row, 0 where it does not count.
    void load(const Array& array, int64_t n, T* lanes) const {
        if (!array.given()) return std::fill(lanes, lanes + kRows, T(0));
        for (int64_t i = 0; i < kRows; ++i) {
            lanes[i] = a_.counted[i] != 0 ? load_one<T>(t_.at(array, i, n), array.dtype) : T(0);
        }
    }

    // The derivatives by what keys key0 .. key1 - 1 receive from the task's one head, to the workspace.
    void load_received(int64_t key0, int64_t key1) const {
        const Array& from = u_.received_mass;
        if (!from.given()) return std::fill(w_.received, w_.received + (key1 - key0), T(0));
        load_strided(w_.received, from.at(t_.sequence.batch, t_.head, t_.sequence.key0 + key0), from.dtype,
                     from.stride[2], key1 - key0);
    }

    // Whether there is anything that a map of derivatives gets from all keys, beside dout.
    bool any_dense() const {
        return u_.entropy.given() || u_.collision.given() || u_.distance.given() || u_.received_mass.given();
    }

    // slope[key][lane] += what arrives by the masses of keys key0 .. key1 - 1.
    void add_masses(int64_t key0, int64_t key1, int vectors, T* slope) const {
        if (u_.sink_mass.given() && key0 < p_.sink) add_sink(std::min(key1, p_.sink) - key0, vectors, slope);
        if (u_.diagonal_mass.given()) add_diagonal(key0, key1, slope);
        for (size_t o = 0; u_.offset_mass.given() && o < p_.offsets.size(); ++o) {
            for (int64_t i = 0; i < t_.lanes(); ++i) {
                add_at(key0, key1, w_.position[i] + p_.offsets[o], i, a_.offsets[o * kRows + i], slope);
            }
        }
        for (int64_t n = 0; u_.topk_prob.given() && n < p_.topk; ++n) {
            for (int64_t i = 0; i < t_.lanes(); ++i) {
                add_at(key0, key1, a_.topk_key[n * kRows + i], i, a_.topk[n * kRows + i], slope);
            }
        }
        for (int64_t t = 0; u_.tag_mass.given() && t < p_.tags; ++t) add_tag(t, key0, key1, vectors, slope);
        if (u_.feature_mass.given()) add_features(key0, key1 - key0, vectors, slope);
    }

    // slope[key][lane] += by, where the key is among key0 .. key1 - 1.
    static void add_at(int64_t key0, int64_t key1, int64_t key, int64_t lane, T by, T* slope) {
        if (key >= key0 && key < key1) slope[(key - key0) * kRows + lane] += by;
    }

  private:
    const Task& t_;
    const Problem& p_;
    const Upstream& u_;
    GradientWorkspace<T>& w_;
    ArrivedRows<T>& a_;

    void load_tag(int64_t t) {
        load(u_.tag_mass, t, a_.tags + t * kRows);
        for (int64_t i = 0; i < kRows; ++i) {
            const int64_t row = t_.row_of(std::min(i, t_.lanes() - 1));
            a_.query_tags[t * kRows + i] = read<int32_t>(p_.query_tags.at(t, t_.sequence.batch, row));
        }
    }

    void load_topk(int64_t n) {
        load(u_.topk_prob, n, a_.topk + n * kRows);
        for (int64_t i = 0; i < t_.lanes(); ++i) a_.topk_key[n * kRows + i] = read<int32_t>(t_.at(p_.topk_index, i, n));
    }

    void add_sink(int64_t count, int vectors, T* slope) const {
        for (int64_t k = 0; k < count; ++k) {
            for (int v = 0; v < vectors; ++v) {
                T* here = slope + k * kRows + v * L::kWidth;
                L::store(here, L::load(here) + L::load(a_.sink + v * L::kWidth));
            }
        }
    }

    void add_diagonal(int64_t key0, int64_t key1, T* slope) const {
        for (int64_t i = 0; i < t_.lanes(); ++i) {
            const int64_t position = w_.position[i];
            const int64_t last = std::min(key1 - 1, position + p_.diagonal);
            for (int64_t key = std::max(key0, position - p_.diagonal); key <= last; ++key) {
                slope[(key - key0) * kRows + i] += a_.diagonal[i];
            }
        }
    }

    void add_tag(int64_t t, int64_t key0, int64_t key1, int vectors, T* slope) const {
        for (int64_t key = key0; key < key1; ++key) {
            w_.key_tags[key - key0] = read<int32_t>(p_.key_tags.at(t, t_.sequence.batch, t_.sequence.key0 + key));
        }
        for (int v = 0; v < vectors; ++v) {
            const int64_t r = v * L::kWidth;
            Int row_tags[L::kWidth];
            for (int i = 0; i < L::kWidth; ++i) row_tags[i] = a_.query_tags[t * kRows + r + i];
            const auto wanted = L::load_int(row_tags);
            const auto by = L::load(a_.tags + t * kRows + r);
            for (int64_t k = 0; k < key1 - key0; ++k) {
                if (w_.key_tags[k] < 0) continue;
                T* here = slope + k * kRows + r;
                const auto match = L::equal_int(wanted, L::all_int(w_.key_tags[k]));
                L::store(here, L::load(here) + L::select(match, by, L::all(0)));
            }
        }
    }

    void add_features(int64_t key0, int64_t count, int vectors, T* slope) const {
        const Array& features = p_.key_features;
        for (int64_t k = 0; k < count; ++k) {
            const char* from = features.at(t_.sequence.batch, t_.sequence.key0 + key0 + k);
            load_strided(w_.features + k * p_.features, from, features.dtype, features.stride[2], p_.features);
        }
        const auto all = [&](int64_t, int64_t) { return std::pair<int64_t, int64_t>(0, p_.features); };
        add_product<Plain<T>>({w_.features, p_.features}, count, {a_.features, kRows}, vectors, all, {slope, kRows});
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
