// What a tensor map is made of, and what the hardware asks of it; hardware and model refuse the same.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace attncap {
namespace device {

// Four dimensions of 16-bit numbers, columns first; the columns lie side by side.
struct TensorShape {
    const void* base;
    int64_t size[4];          // columns, rows, heads, batch
    int64_t stride_bytes[3];  // of rows, heads, batch
    int box_rows;
    bool bfloat;
};

inline void require_shape(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("tensor map: ") + what);
}

// The shape as the hardware takes it: a dimension of one has any stride, so it gets one that is allowed.
inline TensorShape checked_shape(const void* base, const int64_t size[4], const int64_t stride_bytes[3], int box_rows,
                                 bool bfloat) {
    TensorShape shape{base, {size[0], size[1], size[2], size[3]}, {}, box_rows, bfloat};
    require_shape(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the tensor must start at a multiple of 16 bytes");
    require_shape(box_rows > 0 && box_rows <= 256, "a box has 1 to 256 rows");
    for (int64_t extent : shape.size) {
        require_shape(extent > 0 && extent <= int64_t(1) << 32, "a dimension has 1 to 2^32 elements");
    }
    for (int i = 0; i < 3; ++i) {
        shape.stride_bytes[i] = size[i + 1] == 1 ? 16 : stride_bytes[i];
        require_shape(shape.stride_bytes[i] > 0 && shape.stride_bytes[i] < int64_t(1) << 40,
                      "strides are positive and below 2^40 bytes");
        require_shape(shape.stride_bytes[i] % 16 == 0, "strides are multiples of 16 bytes");
    }
    return shape;
}

}  // namespace device
}  // namespace attncap
