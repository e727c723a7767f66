// The kernels of one type of numbers and one head dim.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/forward_table.h"

namespace attncap {

template <typename C>
void run_kernel(const ForwardCall& call) {
    static_assert(sizeof(SharedTiles<C>) <= MOST_SHARED_BYTES, "tiles fit in shared memory");
    ForwardParams params = call.params;
    params.query = call.query.map<typename C::T>(C::ROWS);
    params.key = call.key.map<typename C::T>(C::KEYS);
    params.value = call.value.map<typename C::T>(C::KEYS);
    device::launch(&attention_forward<C>, call.blocks, C::THREADS, int(sizeof(SharedTiles<C>)), call.stream,
                   "attention_forward", params);
}

template <typename T, int DIM>
void run_forward(const ForwardCall& call) {
    if (call.params.softcap > 0.0f) return run_kernel<Forward<T, DIM, Level::everything, true>>(call);
    switch (call.level) {
        case Level::plain:
            return run_kernel<Forward<T, DIM, Level::plain, false>>(call);
        case Level::entropy:
            return run_kernel<Forward<T, DIM, Level::entropy, false>>(call);
        case Level::topk:
            return run_kernel<Forward<T, DIM, Level::topk, false>>(call);
        case Level::everything:
            return run_kernel<Forward<T, DIM, Level::everything, false>>(call);
    }
}

}  // namespace attncap
