// The kernels of one type of numbers and one head dim.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/forward_table.h"

namespace attncap {

template <typename C>
void run_kernel(const ForwardParams& params, int blocks, device::Stream stream) {
    device::launch(&attention_forward<C>, blocks, C::THREADS, int(sizeof(SharedTiles<C>)), stream, "attention_forward",
                   params);
}

template <typename T, int DIM>
void run_forward(Level level, const ForwardParams& params, int blocks, device::Stream stream) {
    if (params.softcap > 0.0f) return run_kernel<Forward<T, DIM, Level::everything, true>>(params, blocks, stream);
    switch (level) {
        case Level::plain:
            return run_kernel<Forward<T, DIM, Level::plain, false>>(params, blocks, stream);
        case Level::entropy:
            return run_kernel<Forward<T, DIM, Level::entropy, false>>(params, blocks, stream);
        case Level::topk:
            return run_kernel<Forward<T, DIM, Level::topk, false>>(params, blocks, stream);
        case Level::everything:
            return run_kernel<Forward<T, DIM, Level::everything, false>>(params, blocks, stream);
    }
}

}  // namespace attncap
