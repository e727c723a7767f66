// One task, run against all keys that its rows see, a block of them after another. Between two blocks the sums and the
// output of a row are those over the keys so far, relative to the largest score so far; chosen scores are kept raw.
#pragma once

#include "cpu/line_block.h"
#include "cpu/products.h"
#include "cpu/received.h"
#include "cpu/seen_scores.h"
#include "cpu/shared_facts.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
class RowBlock {
    using L = Lanes<T>;
    using Int = typename L::Int;

  public:
    RowBlock(const Task& task, const SharedFacts::OfBlock& facts, Workspace<T>* workspace)
        : t_(task),
          p_(task.problem),
          facts_(facts),
          vectors_(int((task.lanes() + L::kWidth - 1) / L::kWidth)),
          w_(*workspace),
          s_(workspace->state),
          products_(t_, workspace),
          lines_(t_, workspace) {}

    // Stores output and statistics. `received`, [heads][keys] or null, gets each key's probabilities added; `keep`
    // keeps the exponentials for that instead of computing them again.
    void operator()(bool keep, T* received) {
        w_.clear_state(p_);
        narrow() ? lines_.start() : products_.load_queries();
        load_lane_facts();
        seen_.set(p_, facts_.mask, t_.sequence.keys, t_.lanes(), s_.position);
        for (int64_t block = first_block(); block < last_block(); ++block) step(block, keep);
        if (narrow()) lines_.finish();
        finish_rows();
        if (received) add_received(keep, received);
    }

  private:
    const Task t_;
    const Problem& p_;
    const SharedFacts::OfBlock facts_;
    const int vectors_;
    Workspace<T>& w_;
    RowState<T>& s_;
    Products<T> products_;
    LineBlock<T> lines_;
    SeenRange<T> seen_;

    // Very few rows leave most lanes of rows empty.
    bool narrow() const { return t_.lanes() <= kNarrowRows; }

    int64_t first_block() const { return seen_.begin / kBlockKeys<T>; }
    int64_t last_block() const { return block_count<T>(seen_.end); }
    int64_t block_begin(int64_t block) const { return std::max(seen_.begin, block * kBlockKeys<T>); }
    int64_t block_end(int64_t block) const { return std::min(seen_.end, (block + 1) * kBlockKeys<T>); }

    void load_lane_facts() {
        w_.all_counted = true;
        for (int64_t i = 0; i < vectors_ * L::kWidth; ++i) {  // lanes past the last repeat it, and do not count
            const int64_t lane = std::min(i, t_.lanes() - 1), row = t_.row_of(lane), batch = t_.sequence.batch;
            s_.position[i] = Int(t_.position_of(lane));
            const bool is_asked = !p_.query_mask.given() || *p_.query_mask.at(batch, row) != 0;
            w_.counted[i] = i < t_.lanes() && is_asked;
            w_.all_counted = w_.all_counted && is_asked;
        }
        for (int64_t t = 0; t < p_.tags; ++t) {
            for (int64_t i = 0; !is_listed(t) && i < vectors_ * L::kWidth; ++i) {
                const int64_t row = t_.row_of(std::min(i, t_.lanes() - 1));
                s_.query_tags[t * kRows + i] = read<int32_t>(p_.query_tags.at(t, t_.sequence.batch, row));
            }
        }
    }

    bool is_listed(int64_t tag) const { return !narrow() && facts_.matches[tag].listed(); }

    void step(int64_t block, bool keep) {
        const int64_t key0 = block_begin(block), key1 = block_end(block);
        T* scores = keep && !narrow() ? w_.kept + (key0 - seen_.begin) * kRows : w_.scores;
        narrow() ? lines_.find_scores(seen_, key0, key1) : find_scores(key0, key1, scores);
        rescale(w_.block_max, vectors_, p_.tags, &s_);
        if (p_.received) std::copy(s_.shift, s_.shift + kRows, w_.block_shift + block * kRows);
        narrow() ? lines_.add_keys(key0, key1) : add_keys(key0, key1, scores);
    }

    void find_scores(int64_t key0, int64_t key1, T* scores) {
        score_block(key0, key1, scores);
        scan_scores(scores, w_.largest, key0, key1 - key0, vectors_, &s_, w_.block_max);
        pick_offsets(scores, key0, key1, p_.offsets, t_.lanes(), &s_);
    }

    void add_keys(int64_t key0, int64_t key1, T* scores) {
        for (int64_t key = key0; key < key1; key += kConvertValues) {
            const int64_t count = std::min(kConvertValues, key1 - key);
            T* here = scores + (key - key0) * kRows;
            exponentiate(p_, here, key, count, vectors_, &s_, products_.pairs());
            products_.add_values(here, key, count, key == key0 ? s_.decay : w_.ones);
        }
        add_masses(scores, key0, key1);
    }

    // Scores of keys key0 .. key1 - 1 as the softmax sees them: capped, biased, -inf where unseen; and the largest of
    // each tile of keys.
    void score_block(int64_t key0, int64_t key1, T* scores) {
        products_.scores(seen_, key0, key1, scores, w_.largest);
        if (p_.softcap != 0) cap_scores(T(p_.softcap), key1 - key0, vectors_, scores);
        const int64_t count = key1 - key0;
        const auto [low, high] = mask_scores(t_, seen_, key0, count, vectors_, scores);
        if (p_.softcap != 0) {
            tile_maxima(scores, 0, count, count, vectors_, w_.largest);
        } else {
            tile_maxima(scores, 0, low, count, vectors_, w_.largest);
            tile_maxima(scores, high, count, count, vectors_, w_.largest);
        }
    }

    void add_masses(const T* exponentials, int64_t key0, int64_t key1) {
        if (key0 < p_.sink) add_sink(exponentials, key0, std::min(key1, p_.sink), vectors_, &s_);
        if (p_.diagonal >= 0) add_diagonal(exponentials, key0, key1, p_.diagonal, t_.lanes(), &s_);
        for (int64_t t = 0; t < p_.tags; ++t) {
            if (is_listed(t)) {
                facts_.matches[t].add(exponentials, t_.row0 / kRows, key0, key1, s_.tags + t * kRows);
                continue;
            }
            load_key_tags(t_, t, key0, key1 - key0, w_.key_tags);
            add_tag(exponentials, w_.key_tags, key1 - key0, t, vectors_, &s_);
        }
    }

    // [lanes] of the workspace to column n of a per-row statistic; rows that do not count get `otherwise`.
    void store_rows(const Array& array, int64_t n, T* values, T otherwise = 0) const {
        if (!array.given()) return;
        for (int64_t i = 0; !w_.all_counted && i < t_.lanes(); ++i) values[i] = w_.counted[i] ? values[i] : otherwise;
        store_all_rows(array, n, values);
    }

    void store_all_rows(const Array& array, int64_t n, const T* values) const {
        for (int64_t i = 0; i < t_.lanes(); i += t_.rows) {
            store_strided(t_.at(array, i, n), array.dtype, array.stride[2], values + i, t_.rows);
        }
    }

    // Rows that see no key: the largest score alone gives a mass of 1, and NaN scores one of NaN.
    typename L::M empty_rows(int v) const { return L::equal(L::load(s_.mass + v * L::kWidth), L::all(0)); }

    // The null outcome joins the sums, then everything is normalised, turned into statistics and stored.
    void finish_rows() {
        const bool has_null = p_.sink_logits.given();
        T lse[kRows], entropy[kRows], null_mass[kRows], null_logits[kRows];
        for (int64_t i = 0; i < kRows; ++i) {
            const int64_t head = t_.head_of(std::min(i, t_.lanes() - 1));
            null_logits[i] = has_null ? load_one<T>(p_.sink_logits.at(head), p_.sink_logits.dtype) : T(-INFINITY);
        }
        const auto zero = L::all(0), minus_infinity = L::all(T(-INFINITY));
        for (int v = 0; v < vectors_; ++v) {
            const int64_t r = v * L::kWidth;
            const auto keys_max = L::load(s_.max + r), null_logit = L::load(null_logits + r);
            const auto empty = empty_rows(v);
            const auto peak = L::select(empty, zero, L::max(keys_max, null_logit));
            const auto change = bounded_difference<T>(keys_max, peak);
            const auto decay = exp_nonpositive<T>(change);
            const auto null_change = bounded_difference<T>(null_logit, peak);
            const auto null_weight = exp_nonpositive<T>(null_change);
            const auto keys_mass = L::load(s_.mass + r);
            const auto mass = L::fma(keys_mass, decay, null_weight);
            auto weighted = decay * L::fma(keys_mass, change, L::load(s_.weighted + r));
            weighted = L::fma(null_weight, null_change, weighted);
            const auto log_mass = log_positive<T>(mass) + (mass - mass);  // NaN where the mass is not finite
            L::store(w_.factor + r, L::select(empty, zero, decay / mass));
            L::store(lse + r, L::select(empty, minus_infinity, peak + log_mass));
            L::store(entropy + r, L::select(empty, zero, L::max(zero, log_mass - weighted / mass)));
            L::store(null_mass + r, L::select(empty, zero, null_weight / mass));
        }
        store_outputs();
        // A backward needs the lse of rows that do not count too.
        store_all_rows(p_.lse, 0, lse);
        std::copy(s_.max, s_.max + kRows, w_.row);  // the maxima are needed on
        if (p_.max) store_rows(p_.max_logit, 0, w_.row, T(-INFINITY));
        store_rows(p_.entropy_out, 0, entropy);
        if (has_null) store_rows(p_.null_mass, 0, null_mass);
        store_masses();
        store_chosen();
    }

    void store_outputs() {
        const int64_t stride = (p_.value_dim + L::kWidth - 1) / L::kWidth * L::kWidth;
        for (int v = 0; v < vectors_; ++v) {
            const int64_t first = v * L::kWidth, count = std::min<int64_t>(L::kWidth, t_.lanes() - first);
            // An empty row is 0 even beside non-finite values, which its factor of 0 would turn into NaN.
            const auto empty = empty_rows(v);
            const auto factor = L::load(w_.factor + first);
            const bool in_place = p_.out.dtype == kOwn<T> && p_.out.stride[3] == 1 && stride == p_.value_dim &&
                                  count == L::kWidth && t_.heads == 1;
            if (in_place) {
                T* rows = reinterpret_cast<T*>(t_.at(p_.out, first));
                transpose_out(w_.out + first, p_.value_dim, factor, empty, rows, p_.out.stride[2]);
                continue;
            }
            transpose_out(w_.out + first, p_.value_dim, factor, empty, w_.staging, stride);
            for (int64_t i = 0; i < count; ++i) {
                store_strided(t_.at(p_.out, first + i), p_.out.dtype, p_.out.stride[3], w_.staging + i * stride,
                              p_.value_dim);
            }
        }
    }

    void store_masses() {
        auto normalised = [&](const T* sums, bool squared) {
            for (int v = 0; v < vectors_; ++v) {
                const int64_t r = v * L::kWidth;
                const auto factor = L::load(w_.factor + r);
                const auto mean = L::load(sums + r) * factor;
                L::store(w_.row + r, L::select(empty_rows(v), L::all(0), squared ? mean * factor : mean));
            }
            return w_.row;
        };
        if (p_.collision) store_rows(p_.collision_out, 0, normalised(s_.squares, true));
        if (p_.distance) store_rows(p_.distance_out, 0, normalised(s_.moved, false));
        if (p_.sink) store_rows(p_.sink_mass, 0, normalised(s_.sink, false));
        if (p_.diagonal >= 0) store_rows(p_.diagonal_mass, 0, normalised(s_.diagonal, false));
        for (int64_t t = 0; t < p_.tags; ++t) store_rows(p_.tag_mass, t, normalised(s_.tags + t * kRows, false));
        for (int64_t f = 0; f < p_.features; ++f) {
            store_rows(p_.feature_mass, f, normalised(w_.feature_out + f * kRows, false));
        }
    }

    // Statistics kept as raw scores: offsets and the top-k lists.
    void store_chosen() {
        for (size_t o = 0; o < p_.offsets.size(); ++o) {
            for (int v = 0; v < vectors_; ++v) {
                const int64_t r = v * L::kWidth;
                const auto shift = shift_of<T>(L::load(s_.max + r));
                const auto scores = L::load(s_.offset_score + int64_t(o) * kRows + r);
                L::store(w_.row + r, exp_nonpositive<T>(bounded_difference<T>(scores, shift)) * L::load(w_.factor + r));
            }
            store_rows(p_.offset_mass, int64_t(o), w_.row);
        }
        if (p_.topk > 0) store_topk();
    }

    void store_topk() {
        T* list = s_.top.score;
        for (int v = 0; v < vectors_; ++v) {
            const int64_t r = v * L::kWidth;
            const auto shift = shift_of<T>(L::load(s_.max + r)), factor = L::load(w_.factor + r);
            for (int64_t t = 0; t < p_.topk; ++t) {
                T* scores = list + t * kRows + r;
                L::store(scores, exp_nonpositive<T>(bounded_difference<T>(L::load(scores), shift)) * factor);
            }
        }
        for (int64_t t = 0; t < p_.topk; ++t) {
            store_rows(p_.topk_prob, t, list + t * kRows);
            store_keys(p_.topk_index, t, s_.top.key + t * kRows);
        }
    }

    // [lanes] of keys to column n of a per-row statistic of int32; rows that do not count get -1.
    void store_keys(const Array& array, int64_t n, Int* keys) const {
        for (int64_t i = 0; !w_.all_counted && i < t_.lanes(); ++i) keys[i] = w_.counted[i] ? keys[i] : Int(-1);
        const int64_t step = array.stride[2] * item_size(array.dtype);
        for (int64_t i = 0; i < t_.lanes(); i += t_.rows) {
            char* to = t_.at(array, i, n);
            for (int64_t row = 0; row < t_.rows; ++row) write<int32_t>(to + row * step, int32_t(keys[i + row]));
        }
    }

    // Column sums of the probabilities: from the exponentials kept, or from scores computed once more; both ways
    // see the same shifts and so give the same bits.
    void add_received(bool keep, T* received) {
        for (int64_t block = first_block(); block < last_block(); ++block) {
            const int64_t key0 = block_begin(block), key1 = block_end(block);
            const T* shift = w_.block_shift + block * kRows;
            const T* exponentials = w_.kept + (key0 - seen_.begin) * kRows;
            if (!keep && !narrow()) {
                score_block(key0, key1, w_.scores);
                std::copy(shift, shift + kRows, s_.shift);
                exponentiate_as<T, false, false, false>(w_.scores, key0, key1 - key0, vectors_, &s_, nullptr);
                exponentials = w_.scores;
            }
            for (int v = 0; v < vectors_; ++v) {
                const int64_t r = v * L::kWidth;
                const auto keys_max = L::load(s_.max + r);
                const auto change = bounded_difference<T>(L::load(shift + r), shift_of<T>(keys_max));
                const auto decay = exp_nonpositive<T>(change);
                L::store(w_.row + r, decay * L::load(w_.factor + r));
            }
            bool finite = true;
            for (int64_t i = 0; i < vectors_ * L::kWidth; ++i) {
                finite = finite && std::isfinite(s_.mass[i]) && std::isfinite(w_.row[i]);
                if (!w_.counted[i]) w_.row[i] = 0;
            }
            if (narrow()) {
                lines_.add_received(key0, key1, received);
            } else {
                add_columns(exponentials, w_.row, key1 - key0, vectors_, !finite, received + key0);
            }
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
