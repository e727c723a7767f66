// The two matrix products of a task in lanes of rows: scores by row_product.h, and what the exponentials weigh, in the
// same ways but for narrow rows (line_block.h); pairs round the exponentials to bfloat16, for the output alone.
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
          scores_(task, p_.query, p_.key, p_.key_dim, p_.scale, workspace->of_scores()),
          values_(task, p_.value, p_.value_dim) {}

    void load_queries() { scores_.load_rows(); }

    // scale * <query, key>, see RowProduct.
    void scores(const SeenRange<T>& seen, int64_t key0, int64_t key1, T* scores, T* largest) {
        scores_(seen, key0, key1, scores, largest);
    }

    // Where the exponentials are wanted as pairs too; null where they are not.
    uint32_t* pairs() const { return scores_.pairs() ? reinterpret_cast<uint32_t*>(w_.paired_prob) : nullptr; }

    // out = out * decay + exponentials^T values, and the same for the features, for at most kConvertValues keys.
    void add_values(const T* exponentials, int64_t key0, int64_t count, const T* decay) {
        if (!scores_.pairs()) {
            add_plain_values(exponentials, key0, count, decay);
        } else if constexpr (MatrixTiles<T>::kHere) {
            add_turned_values(pairs(), key0, count, decay);
        } else {
            add_paired_values(pairs(), key0, count, decay);
        }
        if (p_.features > 0) add_features(exponentials, key0, count, decay);
    }

  private:
    const Task& t_;
    const Problem& p_;
    Workspace<T>& w_;
    const int vectors_;
    RowProduct<T> scores_;
    const KeyRows<T> values_;

    void add_plain_values(const T* exponentials, int64_t key0, int64_t count, const T* decay) {
        int64_t stride;
        const T* values = values_.read(key0, count, w_.values, &stride);
        accumulate_values<Plain<T>>(exponentials, values, stride, count, p_.value_dim, vectors_, decay, w_.out);
    }

    void add_features(const T* exponentials, int64_t key0, int64_t count, const T* decay) {
        load_features(t_, key0, count, w_.features);
        accumulate_values<Plain<T>>(exponentials, w_.features, p_.features, count, p_.features, vectors_, decay,
                                    w_.feature_out);
    }

    // Values of two neighbouring keys in one word, as their exponentials are.
    void add_paired_values(const uint32_t* exponentials, int64_t key0, int64_t count, const T* decay) {
        if constexpr (kPairing) {
            const int64_t words = (count + 1) / 2, dims = p_.value_dim;
            auto* values = reinterpret_cast<uint32_t*>(w_.values);
            pair_keys(values_, key0, count, dims, dims, values);
            accumulate_values<Pairs<T>>(exponentials, values, dims, words, dims, vectors_, decay, w_.out);
        }
    }

    // The same on matrix registers; words up to a whole step become zero.
    void add_turned_values(uint32_t* exponentials, int64_t key0, int64_t count, const T* decay) {
        using Tiles = MatrixTiles<T>;
        const int64_t steps = whole_steps<T>(count) / Tiles::kStep, width = whole_vectors<T>(p_.value_dim);
        std::fill(exponentials + (count + 1) / 2 * kRows, exponentials + steps * Tiles::kSide * kRows, 0);
        const uint32_t* values = w_.turned.read(t_, values_, key0, count, reinterpret_cast<uint32_t*>(w_.values));
        if (decay != w_.ones) decay_out(decay);
        constexpr int64_t kRowBytes = 4 * Tiles::kSide;
        constexpr int64_t kTogether = 6;  // steps whose exponentials stay in the first-level cache
        for (int64_t step = 0; step < steps; step += kTogether) {
            const auto* turned = reinterpret_cast<const char*>(values + step * Tiles::kSide * width);
            Tiles::multiply({turned, kRowBytes, kRowBytes * width, kRowBytes * Tiles::kSide,
                             exponentials + step * Tiles::kSide * kRows, std::min(kTogether, steps - step)},
                            width / Tiles::kSide, 0, vectors_, false, w_.out);
        }
    }

    void decay_out(const T* decay) {
        for (int64_t d = 0; d < p_.value_dim; ++d) {
            for (int v = 0; v < vectors_; ++v) {
                T* here = w_.out + d * kRows + v * L::kWidth;
                L::store(here, L::load(here) * L::load(decay + v * L::kWidth));
            }
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
