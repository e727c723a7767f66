// What the Hopper forward is compiled for: each forward_*.cu has one type of numbers and one head dim.
#pragma once

#include "cuda/forward_params.h"

namespace attncap {

// A tensor (batch, heads, rows, columns) that tiles are loaded from.
struct TiledTensor {
    const void* base;
    int64_t size[4];          // columns, rows, heads, batch
    int64_t stride_bytes[3];  // of rows, heads, batch

    template <typename T>
    device::TensorMap map(int tile_rows) const {
        return device::tensor_map(base, size, stride_bytes, tile_rows, std::is_same<T, BFloat16>::value);
    }
};

struct ForwardCall {
    ForwardParams params;  // its tensor maps are the kernel's to make, whose tiles they load
    TiledTensor query, key, value;
    Level level;
    int blocks;
    device::Stream stream;
};

// Runs the kernel of the call's level, or with a softcap the one that has everything.
template <typename T, int DIM>
void run_forward(const ForwardCall& call);

}  // namespace attncap
