// One aligned piece of memory, cut into arrays.
// Invariant: a layout is run twice, first to add up what its arrays take and then to place them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace attncap {
namespace ATTNCAP_ISA {

class Arena {
  public:
    template <class Layout>
    void lay_out(Layout&& layout) {
        memory_.reset();
        used_ = 0;
        layout();
        memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, size_t(std::max(used_, kAlignment)))));
        if (!memory_) throw std::bad_alloc();
        used_ = 0;
        layout();
    }

    template <class Item>
    void take(Item** array, int64_t count) {
        if (memory_) *array = reinterpret_cast<Item*>(memory_.get() + used_);
        used_ += (count * int64_t(sizeof(Item)) + kAlignment - 1) / kAlignment * kAlignment;
    }

  private:
    static constexpr int64_t kAlignment = 64;
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
    int64_t used_ = 0;
};

}  // namespace ATTNCAP_ISA
}  // namespace attncap
