// One task of a backward: its rows against a range of keys, a map of some of these after another. The probabilities are
// computed once more from the lse; of the five products three give the rows' part of the gradients:
//
//   score = Q K^T   G = dout V^T   dV += p^T dout   dQ += dscore K   dK += dscore^T Q
//
// The last three are taken in float, or of bfloat16 tensors in pairs, see gradient_pairs.h.
#pragma once

#include "cpu/gradient_pairs.h"
#include "cpu/mask_gradient.h"
#include "cpu/score_map.h"
#include "cpu/softmax_gradient.h"

namespace attncap {
namespace ATTNCAP_ISA {

// Sums over rows for the keys from `begin` on, [key][whole vectors]. Those of keys are before their scale.
template <class T>
struct KeySums {
    T *key, *value, *features;
};

// Whether a loss depends on more than the output. What statistics give a score is as exact as they are: then nothing is
// rounded for a product.
inline bool has_statistics(const Upstream& upstream) {
    for (const Array* array :
         {&upstream.lse, &upstream.max_logit, &upstream.entropy, &upstream.collision, &upstream.sink_mass,
          &upstream.diagonal_mass, &upstream.distance, &upstream.null_mass, &upstream.offset_mass, &upstream.tag_mass,
          &upstream.feature_mass, &upstream.topk_prob, &upstream.received_mass}) {
        if (array->given()) return true;
    }
    return false;
}

template <class T>
class GradientBlock {
    using L = Lanes<T>;

  public:
    GradientBlock(const Task& task, const Upstream& upstream, const Gradients& gradients,
                  GradientWorkspace<T>* workspace)
        : t_(task),
          p_(task.problem),
          u_(upstream),
          g_(gradients),
          w_(*workspace),
          map_(t_, workspace),
          arrival_(t_, upstream, workspace),
          paired_(t_, arrival_, workspace),
          slopes_(t_, u_.out, p_.value, p_.value_dim, 1, workspace->of_slopes()),
          keys_(t_, p_.key, p_.key_dim),
          key_width_(whole_vectors<T>(p_.key_dim)),
          value_width_(whole_vectors<T>(p_.value_dim)),
          feature_width_(whole_vectors<T>(p_.features)),
          pairs_(map_.pairs() && slopes_.pairs() && !has_statistics(u_)) {}

    // Adds to the rows of dQ and of the mask's gradient, and to `sums`, what keys begin .. end - 1 give. The level and
    // first key of each row are in the workspace.
    void operator()(int64_t begin, int64_t end, const KeySums<T>& sums) {
        load_rows();
        const SeenRange<T>& seen = map_.seen();
        const int64_t last = std::min(end, seen.end);
        for (int64_t key0 = std::max(begin, seen.begin); key0 < last; key0 += kMapKeys) {
            const int64_t key1 = std::min(last, key0 + kMapKeys), skipped = key0 - begin;
            find_slopes(key0, key1);
            add_products(key0, key1,
                         {sums.key + skipped * key_width_, sums.value + skipped * value_width_,
                          sums.features + skipped * feature_width_});
        }
        if (g_.query.given()) store_queries();
    }

  private:
    const Task t_;
    const Problem& p_;
    const Upstream& u_;
    const Gradients& g_;
    GradientWorkspace<T>& w_;
    ScoreMap<T> map_;
    Arrival<T> arrival_;
    const GradientPairs<T> paired_;
    RowProduct<T> slopes_;
    const KeyRows<T> keys_;
    const int64_t key_width_, value_width_, feature_width_;
    const bool pairs_;
    Matrix<const T> query_rows_{}, out_rows_{};

    bool adds_values() const { return u_.out.given() && g_.value.given(); }

    void load_rows() {
        arrival_.load_rows();
        map_.load_rows();
        if (u_.out.given()) slopes_.load_rows();
        if (pairs_) {
            if (g_.key.given()) paired_.load_rows(p_.query, p_.key_dim, key_width_, w_.query_rows);
            if (adds_values()) paired_.load_rows(u_.out, p_.value_dim, value_width_, w_.out_rows);
        } else {
            if (g_.key.given()) query_rows_ = matrix_of(p_.query, p_.key_dim, key_width_, w_.query_rows);
            if (adds_values()) out_rows_ = matrix_of(u_.out, p_.value_dim, value_width_, w_.out_rows);
        }
        for (int64_t f = 0; f < p_.features; ++f) {
            for (int64_t i = 0; i < kRows; ++i) {
                w_.feature_rows[i * feature_width_ + f] = w_.arrived.features[f * kRows + i];
            }
        }
        std::fill(w_.query_sum, w_.query_sum + key_width_ * kRows, T(0));
    }

    // The rows up to a whole vector, where they lie or copied; 0 where a row sees nothing, for it may hold no number.
    Matrix<const T> matrix_of(const Array& from, int64_t dim, int64_t width, T* copy) const {
        const bool in_place = from.dtype == kOwn<T> && from.stride[3] == 1 && dim == width && t_.heads == 1;
        if (in_place && arrival_.all_see()) return {reinterpret_cast<const T*>(t_.at(from, 0)), from.stride[2]};
        for (int64_t i = 0; i < t_.lanes(); ++i) {
            T* row = copy + i * width;
            std::fill(row, row + width, T(0));
            if (arrival_.sees(i)) load_strided(row, t_.at(from, i), from.dtype, from.stride[3], dim);
        }
        return {copy, width};
    }

    // The map of keys key0 .. key1 - 1: probabilities, and derivatives by the scaled products.
    void find_slopes(int64_t key0, int64_t key1) {
        const int64_t count = key1 - key0;
        const SoftmaxMap<T> softmax{w_, key0, count};
        map_(key0, key1);
        if (u_.out.given()) {
            slopes_(map_.seen(), key0, key1, w_.slope, w_.largest);
        } else {
            std::fill(w_.slope, w_.slope + count * kRows, T(0));
        }
        arrival_.add_masses(key0, key1, map_.vectors(), w_.slope);
        arrival_.load_received(key0, key1);
        differentiate_softmax(softmax, map_.vectors(), arrival_.any_dense());
        for (int64_t i = 0; u_.max_logit.given() && i < t_.lanes(); ++i) {
            arrival_.add_at(key0, key1, w_.first_key[i], i, w_.arrived.max[i], w_.slope);
        }
        if (g_.attn_mask.given()) {
            add_mask_gradient(g_.attn_mask, t_, key0, count, map_.vectors(), w_.slope, w_.mask_sum);
        }
        if (p_.softcap != 0) differentiate_cap(softmax, T(p_.softcap), map_.vectors());
    }

    void add_products(int64_t key0, int64_t key1, const KeySums<T>& to) {
        const int64_t count = key1 - key0;
        // Rows beyond the last vector that sees one of the keys have nothing but zeros, which could meet infinities.
        const auto rows_of = [&](int64_t k0, int64_t k1) {
            int first, last;
            map_.seen().active(key0 + k0, key0 + k1, map_.vectors(), &first, &last);
            return std::pair<int64_t, int64_t>(first * L::kWidth, std::min<int64_t>(last * L::kWidth, t_.lanes()));
        };
        const auto add = [&](const T* map, Matrix<const T> rows, int64_t width, T* sums) {
            add_product<Plain<T>>({map, kRows}, count, rows, int(width / L::kWidth), rows_of, {sums, width});
        };
        if (g_.key_features.given()) add(w_.prob, {w_.feature_rows, feature_width_}, feature_width_, to.features);
        if (pairs_) {
            const auto add_pairs = [&](const T* map, uint32_t* rounded, const T* rows, int64_t width, T* sums) {
                paired_.add_rows(map, rounded, count, rows, width, rows_of, sums);
            };
            if (adds_values()) add_pairs(w_.prob, w_.paired.prob, w_.out_rows, value_width_, to.value);
            if (g_.key.given()) add_pairs(w_.slope, w_.paired.slope, w_.query_rows, key_width_, to.key);
            if (g_.query.given()) paired_.add_keys(w_.slope, keys_, key0, count, p_.key_dim);
            return;
        }
        if (adds_values()) add(w_.prob, out_rows_, value_width_, to.value);
        if (g_.key.given()) add(w_.slope, query_rows_, key_width_, to.key);
        if (g_.query.given()) {
            int64_t stride;
            const T* keys = keys_.read(key0, count, w_.keys, &stride);
            accumulate_values<Plain<T>>(w_.slope, keys, stride, count, p_.key_dim, map_.vectors(), w_.ones,
                                        w_.query_sum);
        }
    }

    void store_queries() {
        for (int v = 0; v < map_.vectors(); ++v) {
            const int64_t first = v * L::kWidth, count = std::min<int64_t>(L::kWidth, t_.lanes() - first);
            const auto hidden = L::equal(L::load(w_.lse + first), L::all(T(INFINITY)));
            transpose_out(w_.query_sum + first, p_.key_dim, L::all(T(p_.scale)), hidden, w_.staging, key_width_);
            for (int64_t i = 0; i < count; ++i) {
                T* row = reinterpret_cast<T*>(t_.at(g_.query, first + i));
                for (int64_t d = 0; d < p_.key_dim; ++d) row[d] += w_.staging[i * key_width_ + d];
            }
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
