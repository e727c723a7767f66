// What the heads of a call have in common, found once: the keys that its mask leaves to each block of rows, and those
// that have a row's tag.
#pragma once

#include <new>
#include <vector>

#include "cpu/mask_range.h"
#include "cpu/tag_matches.h"

namespace attncap {
namespace ATTNCAP_ISA {

class SharedFacts {
  public:
    struct OfBlock {
        const TagMatches* matches;  // [tags]
        MaskRange mask;
    };

    // Where memory is short for them, facts stay unknown; everything works without.
    explicit SharedFacts(const Problem& problem) : p_(problem), matches_(p_.sequences.size() * size_t(p_.tags)) {
        for (const Sequence& sequence : p_.sequences) {
            first_range_.push_back(int64_t(ranges_.size()));
            ranges_.resize(ranges_.size() + size_t((sequence.rows + kRows - 1) / kRows),
                           MaskRange::of_any(p_, sequence.keys));
        }
        const bool shares_mask = p_.attn_mask.given() && (p_.attn_mask.stride[1] == 0 || p_.heads == 1);
        if (!shares_mask && p_.tags == 0) return;
        const int64_t count = int64_t(p_.sequences.size());
#pragma omp parallel for num_threads(p_.threads) schedule(dynamic, 1) if (p_.threads > 1 && count > 1)
        for (int64_t i = 0; i < count; ++i) {
            try {
                if (shares_mask) look_at_mask(i);
                match_tags(i);
            } catch (const std::bad_alloc&) {
            }
        }
    }

    OfBlock of(const Sequence& sequence, int64_t block) const {
        const int64_t number = &sequence - p_.sequences.data();
        return {matches_.data() + number * p_.tags, ranges_[size_t(first_range_[size_t(number)] + block)]};
    }

  private:
    const Problem& p_;
    std::vector<TagMatches> matches_;   // [sequences][tags]
    std::vector<MaskRange> ranges_;     // of the blocks of all sequences
    std::vector<int64_t> first_range_;  // of each sequence

    void look_at_mask(int64_t number) {
        const Sequence& sequence = p_.sequences[size_t(number)];
        MaskLook look(sequence.keys);
        for (int64_t row0 = 0; row0 < sequence.rows; row0 += kRows) {
            const int64_t rows = std::min(kRows, sequence.rows - row0);
            ranges_[size_t(first_range_[size_t(number)] + row0 / kRows)] = look(p_, sequence, row0, rows);
        }
    }

    void match_tags(int64_t number) {
        const Sequence& sequence = p_.sequences[size_t(number)];
        if (sequence.rows <= kNarrowRows) return;  // these go along the keys
        for (int64_t tag = 0; tag < p_.tags; ++tag) {
            matches_[size_t(number * p_.tags + tag)] = TagMatches(p_, tag, sequence);
        }
    }
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
