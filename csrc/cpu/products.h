// The two matrix products of a task: scores by row_product.h, and what the exponentials weigh, in the same three ways;
// pairs round the exponentials to bfloat16, for the output alone.
#pragma once

#include "cpu/row_product.h"
#include "cpu/workspace.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
class Products {
    using L = Lanes<T>;
    static constexpr bool kPairing = kHasPairs && sizeof(T) == 4;

  public:
    Products(const Task& task, Workspace<T>* workspace)
        : t_(task),
          p_(task.problem),
          w_(*workspace),
          vectors_(int((task.lanes() + L::kWidth - 1) / L::kWidth)),
          narrow_(task.lanes() <= kNarrowRows),
          scores_(task, p_.query, p_.key, p_.key_dim, p_.scale, workspace->of_scores()),
          values_(task, p_.value, p_.value_dim) {}

    void load_queries() { scores_.load_rows(); }

    // scale * <query, key>, see RowProduct.
    void scores(const SeenRange<T>& seen, int64_t key0, int64_t key1, T* scores, T* largest) {
        scores_(seen, key0, key1, scores, largest);
    }

    // Where the exponentials are wanted as pairs too; null where they are not.
    uint32_t* pairs() const { return scores_.pairs() ? reinterpret_cast<uint32_t*>(w_.paired_prob) : nullptr; }

    // out = out * decay + exponentials^T values, and the same for the features.
    void add_values(const T* exponentials, int64_t key0, int64_t key1, const T* decay) {
        for (int64_t key = key0; key < key1; key += kConvertValues) {
            const int64_t count = std::min(kConvertValues, key1 - key);
            const T* here = exponentials + (key - key0) * kRows;
            if (scores_.pairs()) {
                add_paired_values(pairs() + (key - key0) / 2 * kRows, key, count, decay);
            } else {
                add_plain_values(here, key, count, decay);
            }
            if (p_.features > 0) add_features(here, key, count, decay);
            decay = w_.ones;
        }
    }

  private:
    const Task& t_;
    const Problem& p_;
    Workspace<T>& w_;
    const int vectors_;
    const bool narrow_;
    RowProduct<T> scores_;
    const KeyRows<T> values_;

    void add_plain_values(const T* exponentials, int64_t key0, int64_t count, const T* decay) {
        if (narrow_ && as_stored<T>(p_.value.dtype, p_.value.stride[3], [&](auto stored) {
                narrow_values<T, decltype(stored)>(exponentials, values_.at(key0), values_.bytes(), count, p_.value_dim,
                                                   t_.lanes(), decay, w_.out);
            })) {
            return;
        }
        int64_t stride;
        const T* values = values_.read(key0, count, w_.values, &stride);
        add_converted(exponentials, values, stride, count, p_.value_dim, decay, w_.out);
    }

    void add_converted(const T* exponentials, const T* values, int64_t stride, int64_t keys, int64_t dims,
                       const T* decay, T* out) {
        if (narrow_) {
            narrow_values<T, StoredOwn<T>>(exponentials, reinterpret_cast<const char*>(values),
                                           stride * int64_t(sizeof(T)), keys, dims, t_.lanes(), decay, out);
        } else {
            accumulate_values<Plain<T>>(exponentials, values, stride, keys, dims, vectors_, decay, out);
        }
    }

    void add_features(const T* exponentials, int64_t key0, int64_t count, const T* decay) {
        for (int64_t k = 0; k < count; ++k) {
            const char* from = p_.key_features.at(t_.sequence.batch, t_.sequence.key0 + key0 + k);
            load_strided(w_.features + k * p_.features, from, p_.key_features.dtype, p_.key_features.stride[2],
                         p_.features);
        }
        add_converted(exponentials, w_.features, p_.features, count, p_.features, decay, w_.feature_out);
    }

    // Values of two neighbouring keys in one word, as their exponentials are.
    void add_paired_values(const uint32_t* exponentials, int64_t key0, int64_t count, const T* decay) {
        if constexpr (kPairing) {
            const int64_t words = (count + 1) / 2, dims = p_.value_dim, step = p_.value.stride[3] * 2;
            auto* values = reinterpret_cast<uint32_t*>(w_.values);
            for (int64_t pair = 0; pair < words; ++pair) {
                const bool both = 2 * pair + 1 < count;
                const char* above = values_.at(key0 + 2 * pair);
                const char* below = both ? values_.at(key0 + 2 * pair + 1) : above;
                pair_rows(above, below, step, dims, both, values + pair * dims);
            }
            accumulate_values<Pairs<T>>(exponentials, values, dims, words, dims, vectors_, decay, w_.out);
        }
    }

    static void pair_rows(const char* first, const char* second, int64_t step, int64_t dims, bool both, uint32_t* out) {
        const uint32_t keep = both ? 0xffff0000 : 0;
        int64_t d = 0;
        if constexpr (kPairing) {
            for (; step == 2 && d + 2 * L::kWidth <= dims; d += 2 * L::kWidth) {
                Pairs<T>::interleave(first + 2 * d, second + 2 * d, keep, out + d);
            }
        }
        for (; d < dims; ++d) {
            out[d] = read<uint16_t>(first + d * step) | ((uint32_t(read<uint16_t>(second + d * step)) << 16) & keep);
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
