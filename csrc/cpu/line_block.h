// A block of keys of a task of very few rows (decoding): what row_block.h does in lanes of rows is done line by line.
// The rows' state is the same, their output lies row by row until `finish`.
#pragma once

#include "cpu/line_softmax.h"
#include "cpu/row_product.h"
#include "cpu/workspace.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
class LineBlock {
  public:
    LineBlock(const Task& task, Workspace<T>* workspace)
        : t_(task),
          p_(task.problem),
          w_(*workspace),
          s_(workspace->state),
          scores_(task, p_.query, p_.key, p_.key_dim, p_.scale, workspace->of_scores()),
          values_(task, p_.value, p_.value_dim) {}

    void start() {
        scores_.load_rows();
        std::fill(w_.line_out, w_.line_out + kNarrowRows * width(p_.value_dim), T(0));
        std::fill(w_.line_features, w_.line_features + kNarrowRows * width(p_.features), T(0));
    }

    // The largest scores go to the workspace's block_max, the top-k lists take the block in.
    void find_scores(const SeenRange<T>& seen, int64_t key0, int64_t key1) {
        const int64_t count = key1 - key0;
        first_ = p_.received ? 0 : key0;
        scores_.lines(key0, count, line(0, key0), w_.line);
        std::fill(w_.block_max, w_.block_max + kRows, T(-INFINITY));
        for (int64_t lane = 0; lane < t_.lanes(); ++lane) {
            T* scores = line(lane, key0);
            if (p_.softcap != 0) cap_line(scores, count, T(p_.softcap));
            if (p_.attn_mask.given()) bias_line(scores, count, p_.attn_mask, t_.at(p_.attn_mask, lane, key0));
            const int64_t low = std::clamp<int64_t>(seen.low[lane] - key0, 0, count);
            const int64_t high = std::clamp<int64_t>(seen.high[lane] + 1 - key0, low, count);
            std::fill(scores, scores + low, T(-INFINITY));
            std::fill(scores + high, scores + whole_vectors<T>(count), T(-INFINITY));
            w_.block_max[lane] = largest_of_line(scores, count);
            s_.top.take_line(scores, key0, count, lane);
            for (size_t o = 0; o < p_.offsets.size(); ++o) {
                const int64_t key = s_.position[lane] + p_.offsets[o];
                if (key >= key0 && key < key1) s_.offset_score[int64_t(o) * kRows + lane] = scores[key - key0];
            }
        }
    }

    // After the state has moved to the new maximum.
    void add_keys(int64_t key0, int64_t key1) {
        for (int64_t lane = 0; lane < t_.lanes(); ++lane) {
            const T apart = T(key0 - int64_t(s_.position[lane]));
            exponentiate_line(p_, line(lane, key0), key1 - key0, apart, lane, &s_);
        }
        const T* decay = s_.decay;
        for (int64_t key = key0; key < key1; key += kConvertValues) {
            add_values(key, std::min(kConvertValues, key1 - key), decay);
            decay = w_.ones;
        }
        add_masses(key0, key1);
        add_tags(key0, key1 - key0);
    }

    // The output to where the lanes of rows have it.
    void finish() {
        for (int64_t lane = 0; lane < t_.lanes(); ++lane) {
            turn(w_.line_out, p_.value_dim, lane, w_.out);
            turn(w_.line_features, p_.features, lane, w_.feature_out);
        }
    }

    // Adds what keys receive, the exponentials times the workspace's `row`.
    void add_received(int64_t key0, int64_t key1, T* received) {
        for (int64_t lane = 0; lane < t_.lanes(); ++lane) {
            add_line(line(lane, key0), w_.row[lane], key1 - key0, received + lane / t_.rows * t_.sequence.keys + key0);
        }
    }

  private:
    const Task& t_;
    const Problem& p_;
    Workspace<T>& w_;
    RowState<T>& s_;
    RowProduct<T> scores_;
    const KeyRows<T> values_;

    int64_t first_ = 0;  // the key with which lines begin: they are kept where their exponentials are needed once more

    T* line(int64_t lane, int64_t key) const { return w_.lines + lane * w_.line + key - first_; }

    static int64_t width(int64_t dims) { return whole_vectors<T>(dims); }

    // For at most kConvertValues keys.
    void add_values(int64_t key0, int64_t count, const T* decay) {
        auto add = [&](auto stored, const char* rows, int64_t stride, int64_t dims, T* out) {
            narrow_values<T, decltype(stored)>(line(0, key0), w_.line, rows, stride, count, dims, t_.lanes(), decay,
                                               out, width(dims));
        };
        auto add_own = [&](const T* rows, int64_t stride, int64_t dims, T* out) {
            add(StoredOwn<T>{}, reinterpret_cast<const char*>(rows), stride * int64_t(sizeof(T)), dims, out);
        };
        const bool in_place = as_stored<T>(p_.value.dtype, p_.value.stride[3], [&](auto stored) {
            add(stored, values_.at(key0), values_.bytes(), p_.value_dim, w_.line_out);
        });
        if (!in_place) {
            int64_t stride;
            const T* values = values_.read(key0, count, w_.values, &stride);
            add_own(values, stride, p_.value_dim, w_.line_out);
        }
        if (p_.features == 0) return;
        load_features(t_, key0, count, w_.features);
        add_own(w_.features, p_.features, p_.features, w_.line_features);
    }

    void add_masses(int64_t key0, int64_t key1) {
        const int64_t count = key1 - key0;
        for (int64_t lane = 0; lane < t_.lanes(); ++lane) {
            const T* exponentials = line(lane, key0);
            s_.sink[lane] += sum_of_line(exponentials, std::clamp<int64_t>(p_.sink - key0, 0, count));
            if (p_.diagonal < 0) continue;
            const int64_t position = s_.position[lane];
            const int64_t first = std::clamp<int64_t>(position - p_.diagonal - key0, 0, count);
            const int64_t last = std::clamp<int64_t>(position + p_.diagonal + 1 - key0, first, count);
            s_.diagonal[lane] += sum_of_line(exponentials + first, last - first);
        }
    }

    void add_tags(int64_t key0, int64_t count) {
        for (int64_t t = 0; t < p_.tags; ++t) {
            load_key_tags(t_, t, key0, count, w_.key_tags);
            for (int64_t i = t * kRows, lane = 0; lane < t_.lanes(); ++i, ++lane) {
                s_.tags[i] += tag_sum_of_line(line(lane, key0), w_.key_tags, count, s_.query_tags[i]);
            }
        }
    }

    static void turn(const T* lines, int64_t dims, int64_t lane, T* out) {
        for (int64_t d = 0; d < dims; ++d) out[d * kRows + lane] = lines[lane * width(dims) + d];
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
