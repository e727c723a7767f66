// Numbers that a seed determines on every machine.
#pragma once

#include <cstdint>

namespace attncap {
namespace device {
namespace model {

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t next() {  // splitmix64
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int below(int limit) { return int((next() >> 32) * uint64_t(limit) >> 32); }
    bool one_in(int count) { return below(count) == 0; }

  private:
    uint64_t state_;
};

}  // namespace model
}  // namespace device
}  // namespace attncap
