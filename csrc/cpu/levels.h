// What the derivatives by a row's probabilities are relative to when they become those by its scores:
//
//   level = dout . out + sum of every other derivative times its statistic (twice for collision)
//         + sum_j p_j dreceived_mass_j - dlse
//
// An `out` that was rounded is not taken: dout . out is then sum_j p_j (dout . v_j).
// Invariant: a sum over keys is taken in rising order of the keys, so that nothing depends on who takes it.
#pragma once

#include "cpu/arrived.h"
#include "cpu/score_map.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
class RowLevels {
    using L = Lanes<T>;

  public:
    RowLevels(const Task& task, const Upstream& upstream, GradientWorkspace<T>* workspace)
        : t_(task),
          p_(task.problem),
          u_(upstream),
          w_(*workspace),
          out_is_rounded_(p_.out.dtype != kOwn<T>),
          map_(t_, workspace),
          arrival_(t_, upstream, workspace),
          slopes_(t_, u_.out, p_.value, p_.value_dim, 1, workspace->of_slopes()) {}

    // Fills level, null_term (p_0 (G_0 - level), what the sink logit of the row's head gets) and first_key, that of the
    // largest score, of the workspace.
    void operator()() {
        arrival_.load_rows();
        const bool takes_out = u_.out.given() && !out_is_rounded_;
        for (int64_t i = 0; i < kRows; ++i) w_.level[i] = takes_out && arrival_.sees(i) ? out_term(i) : T(0);
        add_statistics();
        if (u_.received_mass.given() || u_.max_logit.given() || (u_.out.given() && out_is_rounded_)) look_at_keys();
        if (p_.sink_logits.given()) find_null_terms();
    }

  private:
    const Task t_;
    const Problem& p_;
    const Upstream& u_;
    GradientWorkspace<T>& w_;
    const bool out_is_rounded_;
    ScoreMap<T> map_;
    Arrival<T> arrival_;
    RowProduct<T> slopes_;

    // dout . out of a lane.
    T out_term(int64_t lane) {
        const int64_t whole = whole_vectors<T>(p_.value_dim);
        const T *by = row_of(u_.out, lane, w_.staging), *out = row_of(p_.out, lane, w_.staging + whole);
        auto sum = L::all(0);
        for (int64_t d = 0; d < whole; d += L::kWidth) sum = L::fma(L::load(by + d), L::load(out + d), sum);
        return L::sum(sum);
    }

    // A row of a tensor (B, H, Q, E) up to a whole vector: where it lies, or copied.
    const T* row_of(const Array& array, int64_t lane, T* copy) const {
        const int64_t dim = p_.value_dim, whole = whole_vectors<T>(dim);
        const char* from = t_.at(array, lane);
        if (array.dtype == kOwn<T> && array.stride[3] == 1 && dim == whole) return reinterpret_cast<const T*>(from);
        load_strided(copy, from, array.dtype, array.stride[3], dim);
        std::fill(copy + dim, copy + whole, T(0));
        return copy;
    }

    void add_statistics() {
        T by[kRows], statistic[kRows];
        auto add = [&](const Array& derivative, const Array& value, int64_t count, T times) {
            for (int64_t n = 0; derivative.given() && n < count; ++n) {
                arrival_.load(derivative, n, by), arrival_.load(value, n, statistic);
                for (int64_t i = 0; i < kRows; ++i) w_.level[i] += times * by[i] * statistic[i];
            }
        };
        add(u_.entropy, p_.entropy_out, 1, 1);
        add(u_.collision, p_.collision_out, 1, 2);
        add(u_.distance, p_.distance_out, 1, 1);
        add(u_.sink_mass, p_.sink_mass, 1, 1);
        add(u_.diagonal_mass, p_.diagonal_mass, 1, 1);
        add(u_.null_mass, p_.null_mass, 1, 1);
        add(u_.offset_mass, p_.offset_mass, int64_t(p_.offsets.size()), 1);
        add(u_.tag_mass, p_.tag_mass, p_.tags, 1);
        add(u_.feature_mass, p_.feature_mass, p_.features, 1);
        add(u_.topk_prob, p_.topk_prob, p_.topk, 1);
        arrival_.load(u_.lse, 0, by);
        for (int64_t i = 0; i < kRows; ++i) w_.level[i] -= by[i];
    }

    // One pass over the scores: sums of the probabilities times what arrives from each key, and where the largest
    // score is.
    void look_at_keys() {
        map_.load_rows();
        if (u_.out.given() && out_is_rounded_) slopes_.load_rows();
        T largest[kRows], sums[kRows] = {};
        std::fill(largest, largest + kRows, T(-INFINITY));
        std::fill(w_.first_key, w_.first_key + kRows, typename L::Int(-1));
        const SeenRange<T>& seen = map_.seen();
        for (int64_t key0 = seen.begin; key0 < seen.end; key0 += kMapKeys) {
            const int64_t key1 = std::min(seen.end, key0 + kMapKeys);
            map_(key0, key1);
            if (u_.max_logit.given()) find_largest(key0, key1, largest);
            add_expected(key0, key1, sums);
        }
        for (int64_t i = 0; i < kRows; ++i) w_.level[i] += sums[i];
    }

    void find_largest(int64_t key0, int64_t key1, T* largest) {
        for (int v = 0; v < map_.vectors(); ++v) {
            const int64_t r = v * L::kWidth;
            auto best = L::load(largest + r);
            auto where = L::load_int(w_.first_key + r);
            for (int64_t k = 0; k < key1 - key0; ++k) {
                const auto score = L::load(w_.prob + k * kRows + r);
                const auto larger = L::less(best, score);
                best = L::select(larger, score, best);
                where = L::select_int(larger, L::all_int(typename L::Int(key0 + k)), where);
            }
            L::store(largest + r, best);
            L::store_int(w_.first_key + r, where);
        }
    }

    void add_expected(int64_t key0, int64_t key1, T* sums) {
        const int64_t count = key1 - key0;
        if (u_.out.given() && out_is_rounded_) {
            slopes_(map_.seen(), key0, key1, w_.slope, w_.largest);
        } else {
            std::fill(w_.slope, w_.slope + count * kRows, T(0));
        }
        arrival_.load_received(key0, key1);
        for (int v = 0; v < map_.vectors(); ++v) {
            const int64_t r = v * L::kWidth;
            const auto lse = L::load(w_.lse + r), counted = L::load(w_.arrived.counted + r), zero = L::all(0);
            auto sum = zero;
            for (int64_t k = 0; k < count; ++k) {
                const auto p = exp_nonpositive<T>(bounded_difference<T>(L::load(w_.prob + k * kRows + r), lse));
                const auto by = L::fma(counted, L::all(w_.received[k]), L::load(w_.slope + k * kRows + r));
                sum = sum + L::select(L::equal(p, zero), zero, p * by);
            }
            L::store(sums + r, L::load(sums + r) + sum);
        }
    }

    void find_null_terms() {
        T by_null[kRows];
        arrival_.load(u_.null_mass, 0, by_null);
        for (int64_t i = 0; i < t_.lanes(); ++i) {
            const T logit = load_one<T>(p_.sink_logits.at(t_.head_of(i)), p_.sink_logits.dtype);
            const T log_mass = logit - w_.lse[i], mass = std::exp(log_mass);
            const T by = by_null[i] - w_.arrived.entropy[i] * log_mass;
            w_.null_term[i] = mass == 0 ? T(0) : mass * (by - w_.level[i]);
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
