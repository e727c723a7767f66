// The shared memory of a CTA: filled with NaNs, whatever the width of a number, and fenced by bytes that nobody may
// touch.
#pragma once

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "model/schedule.h"

namespace attncap {
namespace device {
namespace model {

constexpr unsigned char kPoison = 0xff;

class Memory {
  public:
    explicit Memory(int bytes) : bytes_(bytes), all_(size_t(bytes + 3 * kAlignment), kFence) {
        void* start = all_.data() + kAlignment;
        size_t space = all_.size() - kAlignment;
        start_ = static_cast<char*>(std::align(kAlignment, size_t(bytes), start, space));
        std::memset(start_, kPoison, size_t(bytes));
    }

    char* start() { return start_; }

    // The address of `count` bytes as the hardware counts it.
    uint32_t address(const void* at, int64_t count, const char* what) const {
        const int64_t offset = static_cast<const char*>(at) - start_;
        require_within(offset, count, what);
        return uint32_t(offset);
    }

    char* at(int64_t address, int64_t count, const char* what) {
        require_within(address, count, what);
        return start_ + address;
    }

    void check_fences() const {
        const char* end = start_ + bytes_;
        const char* last = reinterpret_cast<const char*>(all_.data()) + all_.size();
        for (const char* p = start_ - kAlignment; p < last; ++p) {
            if (p == start_) p = end;
            if (static_cast<unsigned char>(*p) == kFence) continue;
            throw Fault("shared memory: written " + (p < start_ ? std::to_string(start_ - p) + " bytes before its start"
                                                                : std::to_string(p - end) + " bytes after its end"));
        }
    }

  private:
    static constexpr int kAlignment = 1024;
    static constexpr unsigned char kFence = 0xa5;
    const int bytes_;
    std::vector<unsigned char> all_;
    char* start_;

    void require_within(int64_t offset, int64_t count, const char* what) const {
        if (offset >= 0 && offset + count <= bytes_) return;
        throw Fault(std::string(what) + ": bytes " + std::to_string(offset) + " to " + std::to_string(offset + count) +
                    " do not lie in the " + std::to_string(bytes_) + " bytes of shared memory");
    }
};

}  // namespace model
}  // namespace device
}  // namespace attncap
