// Which keys have a row's tag, written out once for all heads of a call where they are few, as those of equal tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/tiles.h"

namespace attncap {
namespace ATTNCAP_ISA {

// A key whose tag equals that of a row, which is counted from the first of its block of kRows.
struct TagMatch {
    int32_t key, row;
};

// The matches of one tag in one sequence.
class TagMatches {
  public:
    TagMatches() = default;

    // Where too many match nothing is written out: comparing every key with every row is faster then, and sums in a
    // row would grow long.
    TagMatches(const Problem& problem, int64_t tag, const Sequence& sequence) {
        const auto row_tags = tags_of(problem.query_tags, tag, sequence.batch, sequence.row0, sequence.rows);
        const auto key_tags = tags_of(problem.key_tags, tag, sequence.batch, sequence.key0, sequence.keys);
        const Chains chains(row_tags);
        const int64_t most = sequence.rows * std::min(sequence.keys / kFewOf, kMostInMean);
        std::vector<int64_t> begins((sequence.rows + kRows - 1) / kRows + 1, 0);
        std::vector<int32_t> of_row(sequence.rows, 0);
        int64_t count = 0;
        bool few = true;
        chains.visit(key_tags, [&](int64_t, int64_t row) {
            ++begins[row / kRows + 1], ++count;
            few = ++of_row[row] <= kMostOfRow && count <= most;
            return few;
        });
        if (!few) return;
        for (size_t block = 1; block < begins.size(); ++block) begins[block] += begins[block - 1];
        std::vector<int64_t> next(begins);
        matches_.resize(count);
        chains.visit(key_tags, [&](int64_t key, int64_t row) {
            matches_[next[row / kRows]++] = {int32_t(key), int32_t(row % kRows)};
            return true;
        });
        begins_ = std::move(begins);
    }

    bool listed() const { return !begins_.empty(); }

    // sums[row] += exponentials[key - key0][row] of all matches of a block of rows with keys key0 .. key1 - 1.
    template <class T>
    void add(const T* exponentials, int64_t block, int64_t key0, int64_t key1, T* sums) const {
        const auto before = [](const TagMatch& match, int64_t key) { return match.key < key; };
        const TagMatch *first = matches_.data() + begins_[block], *last = matches_.data() + begins_[block + 1];
        T some[kRows] = {};
        for (const TagMatch* match = std::lower_bound(first, last, key0, before); match < last && match->key < key1;
             ++match) {
            some[match->row] += exponentials[(match->key - key0) * kRows + match->row];
        }
        for (int64_t row = 0; row < kRows; ++row) sums[row] += some[row];
    }

  private:
    static constexpr int64_t kFewOf = 16;                         // of so many pairs one matches at most
    static constexpr int64_t kMostInMean = 64, kMostOfRow = 256;  // keys that match a row

    // The rows of every tag, in order.
    class Chains {
      public:
        explicit Chains(const std::vector<int32_t>& tags) : tags_(tags), next_(tags.size()) {
            size_t size = 16;
            while (size < 2 * tags.size()) size *= 2;
            first_.assign(size, -1);
            for (size_t row = tags.size(); row-- > 0;) {
                int32_t& first = first_[place(tags[row])];
                next_[row] = first;
                first = int32_t(row);
            }
        }

        // Calls body(key, row) for all that match, in order of keys, then of rows, as long as it gives true.
        template <class Body>
        void visit(const std::vector<int32_t>& key_tags, Body&& body) const {
            for (size_t key = 0; key < key_tags.size(); ++key) {
                if (key_tags[key] < 0) continue;
                for (int32_t row = first_[place(key_tags[key])]; row >= 0; row = next_[row]) {
                    if (!body(int64_t(key), int64_t(row))) return;
                }
            }
        }

      private:
        const std::vector<int32_t>& tags_;
        std::vector<int32_t> next_, first_;  // the next row of a row's tag; the first one of the tag at a place

        // Where a tag stands in the table, or would.
        size_t place(int32_t tag) const {
            const size_t mask = first_.size() - 1;
            size_t at = (uint32_t(tag) * uint64_t(0x9E3779B97F4A7C15) >> 32) & mask;
            while (first_[at] >= 0 && tags_[size_t(first_[at])] != tag) at = (at + 1) & mask;
            return at;
        }
    };

    std::vector<TagMatch> matches_;  // of all blocks of rows, by key in each
    std::vector<int64_t> begins_;    // where each block's begin, and the end; none where they are not written out

    static std::vector<int32_t> tags_of(const Array& array, int64_t tag, int64_t batch, int64_t first, int64_t count) {
        std::vector<int32_t> tags(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(&tags[size_t(i)], array.at(tag, batch, first + i), sizeof(int32_t));
        }
        return tags;
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
