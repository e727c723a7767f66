// Which thread holds which element of a matrix in which register, as the PTX ISA lays it down.
#pragma once

namespace attncap {
namespace device {
namespace model {

struct Element {
    int row, column;
};

// Accumulators of wgmma's m64nNk16: register i of a thread of a warpgroup. Those of mma's m16n8 are the first four of a
// warp's.
constexpr Element accumulator(int thread, int i) {
    return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}

// The two numbers of register i of A, m64k16 of wgmma or m16k16 of mma; the second is that of the next column.
constexpr Element of_a(int thread, int i) {
    return {thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8, i / 2 * 8 + thread % 4 * 2};
}

// The two numbers of register i of B, k16n8 of mma; the second is that of the next row.
constexpr Element of_b(int lane, int i) { return {i * 8 + lane % 4 * 2, lane / 4}; }

}  // namespace model
}  // namespace device
}  // namespace attncap
