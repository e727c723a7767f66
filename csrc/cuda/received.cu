// Launches of the received_mass kernel, and what it is compiled for.
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/received.cuh"
#include "cuda/schedule.h"

namespace attncap {
namespace {

void set_strides(int64_t (&bytes)[3], const Array& array) {
    for (int i = 0; i < 3; ++i) bytes[i] = item_size(array.dtype) * array.stride[i];
}

ReceivedParams params_of(const Problem& problem, const CudaCall& call) {
    ReceivedParams params = {};
    params.query = problem.query.data;
    params.key = problem.key.data;
    set_strides(params.query_stride, problem.query);
    set_strides(params.key_stride, problem.key);
    params.scales = row_scales(problem, call);
    params.received = reinterpret_cast<float*>(problem.received_mass.data);
    params.total_rows = call.rows;
    params.total_keys = call.keys;
    params.heads = int(problem.heads);
    params.group = int(problem.heads / problem.key_heads);
    params.rows = int(call.rows);
    params.keys = int(call.keys);
    params.table = call.key_tiles;
    params.sequences = call.sequences;
    params.tiles = int(call.packed() ? call.key_tile_count : (call.keys + RECEIVED_KEYS - 1) / RECEIVED_KEYS);
    if (!call.packed()) params.offset = int(problem.sequences.front().offset);
    params.left = problem.window_left < 0 ? UNLIMITED : int(problem.window_left);
    params.right = problem.causal ? 0 : problem.window_right < 0 ? UNLIMITED : int(problem.window_right);
    const bool capped = problem.softcap > 0;
    params.unit = (capped ? 1.0f : float(problem.scale)) * LOG2_E;  // to the bit what the forward's rows are scaled by
    params.softcap = float(problem.softcap);
    params.scale_by_cap = capped ? float(problem.scale / problem.softcap) : 0.0f;
    return params;
}

template <typename C>
void launch(const ReceivedParams& params, const CudaCall& call) {
    const int blocks = params.tiles * params.heads * int(call.batch);
    if (blocks == 0) return;
    device::launch(received_mass_kernel<C>, blocks, C::THREADS, int(sizeof(SharedQueries<C>)),
                   static_cast<device::Stream>(call.stream), "received_mass", params);
}

template <typename T, bool SOFTCAP>
void launch_for_dim(const ReceivedParams& params, const CudaCall& call, int64_t dim) {
    switch (dim) {
        case 64:
            return launch<Received<T, 64, SOFTCAP>>(params, call);
        case 128:
            return launch<Received<T, 128, SOFTCAP>>(params, call);
        case 256:
            return launch<Received<T, 256, SOFTCAP>>(params, call);
    }
    throw std::invalid_argument("received_mass: head dim " + std::to_string(dim));
}

}  // namespace

void received_mass(const Problem& problem, const CudaCall& call) {
    const ReceivedParams params = params_of(problem, call);
    const bool capped = problem.softcap > 0, bfloat = problem.query.dtype == DType::bfloat16;
    const auto launch = bfloat   ? capped ? launch_for_dim<BFloat16, true> : launch_for_dim<BFloat16, false>
                        : capped ? launch_for_dim<Float16, true>
                                 : launch_for_dim<Float16, false>;
    launch(params, call, problem.key_dim);
}

int received_tile_keys(const Problem&) { return RECEIVED_KEYS; }

}  // namespace attncap
