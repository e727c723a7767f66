// The 64 bits that tell wgmma how an operand lies in shared memory. Here always: panels of 64 columns of 16 bits, so
// that a row is 128 bytes and the 128-byte swizzle moves chunks of 16 bytes within groups of eight rows (1024 bytes).
//
//     bits  0-13  address       all three in units of 16 bytes
//     bits 16-29  leading offset
//     bits 32-45  stride offset
//     bits 62-63  swizzle       1 = 128 bytes
#pragma once

#include <cstdint>

#include "statistics/inline.h"

namespace attncap {
namespace device {

constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 128;              // of a panel
constexpr int kGroupBytes = 8 * kRowBytes;  // the rows that a swizzle spans
constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;

ATTNCAP_INLINE constexpr uint64_t descriptor_bits(uint32_t address, int leading_bytes, int stride_bytes) {
    return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
           kSwizzle128;
}

// [M or N rows][16 of K], K along the columns. The leading offset has no meaning here; 1 is customary.
ATTNCAP_INLINE constexpr uint64_t k_major_bits(uint32_t address) { return descriptor_bits(address, 16, kGroupBytes); }

// [16 rows of K][N columns], N along the columns, the next 64 of them `panel_bytes` further on.
ATTNCAP_INLINE constexpr uint64_t mn_major_bits(uint32_t address, int panel_bytes) {
    return descriptor_bits(address, panel_bytes, kGroupBytes);
}

// The same operand `bytes` further on: 32 for the next 16 of K of k_major, 16 rows for those of mn_major. The address
// does not leave its bits, so that the upper half stays as it is and costs no instruction.
ATTNCAP_INLINE constexpr uint64_t advance(uint64_t descriptor, int bytes) {
    return (descriptor & 0xffffffff00000000) | uint32_t(uint32_t(descriptor) + uint32_t(bytes >> 4));
}

}  // namespace device
}  // namespace attncap
