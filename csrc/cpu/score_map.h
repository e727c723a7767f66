// The scores of a task once more, as its forward had them, some keys at a time.
#pragma once

#include "cpu/gradient_workspace.h"
#include "cpu/seen_scores.h"

namespace attncap {
namespace ATTNCAP_ISA {

template <class T>
class ScoreMap {
  public:
    ScoreMap(const Task& task, GradientWorkspace<T>* workspace)
        : t_(task),
          p_(task.problem),
          w_(*workspace),
          vectors_(int(whole_vectors<T>(task.lanes()) / Lanes<T>::kWidth)),
          product_(t_, p_.query, p_.key, p_.key_dim, p_.scale, workspace->of_scores()) {}

    // Positions of the rows must be known.
    void load_rows() {
        product_.load_rows();
        const int64_t keys = t_.sequence.keys;
        seen_.set(p_, MaskRange::of_any(p_, keys), keys, t_.lanes(), w_.position);
    }

    const SeenRange<T>& seen() const { return seen_; }
    int vectors() const { return vectors_; }
    bool pairs() const { return product_.pairs(); }

    // Scores of at most kMapKeys keys to the workspace's prob; capped, before their bias, also to capped.
    void operator()(int64_t key0, int64_t key1) {
        const int64_t count = key1 - key0;
        product_(seen_, key0, key1, w_.prob, w_.largest);
        if (p_.softcap != 0) {
            cap_scores(T(p_.softcap), count, vectors_, w_.prob);
            std::copy(w_.prob, w_.prob + count * kRows, w_.capped);
        }
        mask_scores(t_, seen_, key0, count, vectors_, w_.prob);
    }

  private:
    const Task& t_;
    const Problem& p_;
    GradientWorkspace<T>& w_;
    const int vectors_;
    RowProduct<T> product_;
    SeenRange<T> seen_;
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
