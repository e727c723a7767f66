// The 16-bit numbers that tensor cores multiply, as they lie in memory.
#pragma once

#include <cstdint>

namespace attncap {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

}  // namespace attncap
