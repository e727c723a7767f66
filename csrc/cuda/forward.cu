// Describes a call to the Hopper forward, and chooses its kernel.
#include <algorithm>
#include <stdexcept>

#include "cuda/forward_table.h"
#include "cuda/launch.h"
#include "statistics/softmax.h"

namespace attncap {

namespace {

constexpr int ROWS = Forward<BFloat16, 64, Level::plain, false>::ROWS;  // of a block, the same in all kernels
constexpr int64_t COUNTER_BYTES = 256;  // at the head of the workspace; lists of candidates and scales of rows follow
constexpr int64_t CACHED_BYTES = int64_t(16) << 20;  // keys and values that stay in the L2 cache

Level level_of(const Problem& problem) {
    if (problem.softcap > 0) return Level::everything;
    if (problem.collision || problem.distance || !problem.offsets.empty()) return Level::everything;
    if (problem.topk > Forward<BFloat16, 64, Level::topk, false>::MOST_TOPK) return Level::everything;
    if (problem.topk > 0) return Level::topk;
    return problem.entropy ? Level::entropy : Level::plain;
}

Schedule schedule_of(const Problem& problem, const CudaCall& call) {
    Schedule schedule{};
    schedule.heads = int(problem.heads);
    schedule.batch = int(call.batch);
    schedule.table = call.tiles;
    schedule.sequences = call.sequences;
    if (call.packed()) {
        schedule.blocks = int(call.tile_count);
    } else {
        const Sequence& sequence = problem.sequences.front();
        schedule.rows = int(sequence.rows);
        schedule.keys = int(sequence.keys);
        schedule.offset = int(sequence.offset);
        schedule.blocks = int((sequence.rows + ROWS - 1) / ROWS);
    }
    const int64_t bytes = 4 * std::max<int64_t>(call.keys, 1) * problem.key_dim;  // of a key head's keys and values
    const int64_t cached = std::max<int64_t>(1, CACHED_BYTES / bytes) * (problem.heads / problem.key_heads);
    schedule.section = int(std::min(cached, problem.heads * call.batch));
    return schedule;
}

TiledTensor tiled(const Array& array, const Problem& problem, const CudaCall& call, int64_t heads, int64_t rows) {
    return {array.data,
            {problem.key_dim, rows, heads, call.batch},
            {2 * array.stride[2], 2 * array.stride[1], 2 * array.stride[0]}};
}

float* floats(const Array& array) { return reinterpret_cast<float*>(array.data); }

void set_numbers(ForwardParams& params, const Problem& problem) {
    const auto side = [](int64_t keys) { return keys < 0 ? UNLIMITED : int(std::min<int64_t>(keys, UNLIMITED)); };
    params.left = side(problem.window_left);
    params.right = problem.causal ? 0 : side(problem.window_right);
    params.softcap = float(problem.softcap);
    params.score = problem.softcap > 0 ? 1.0f : float(problem.scale);
    params.scale_by_cap = problem.softcap > 0 ? float(problem.scale / problem.softcap) : 0.0f;
    params.unit = params.score * LOG2_E;
    params.hidden = hidden_score(params.unit);
    params.sink = int(std::min<int64_t>(problem.sink, UNLIMITED));
    params.diagonal = int(std::min<int64_t>(problem.diagonal, UNLIMITED));
    params.topk = int(problem.topk);
    params.offsets = int(problem.offsets.size());
    std::copy(problem.offsets.begin(), problem.offsets.end(), params.offset);
}

void set_outputs(ForwardParams& params, const Problem& problem, const CudaCall& call) {
    params.out = problem.out.data;
    std::copy(problem.out.stride, problem.out.stride + 3, params.out_stride);
    params.total_rows = call.rows;
    params.lse = floats(problem.lse);
    params.max_logit = floats(problem.max_logit);
    params.entropy = floats(problem.entropy_out);
    params.collision = floats(problem.collision_out);
    params.sink_mass = floats(problem.sink_mass);
    params.diagonal_mass = floats(problem.diagonal_mass);
    params.distance = floats(problem.distance_out);
    params.null_mass = floats(problem.null_mass);
    params.offset_mass = floats(problem.offset_mass);
    params.topk_prob = floats(problem.topk_prob);
    params.topk_index = reinterpret_cast<int32_t*>(problem.topk_index.data);
    params.taken = reinterpret_cast<int*>(call.workspace);
    params.lists = reinterpret_cast<Candidate*>(call.workspace + COUNTER_BYTES);
    params.scales = row_scales(problem, call);
}

template <typename T>
void run(int64_t dim, const ForwardCall& call) {
    if (dim == 64) return run_forward<T, 64>(call);
    if (dim == 128) return run_forward<T, 128>(call);
    if (dim == 256) return run_forward<T, 256>(call);
    throw std::invalid_argument("attention_forward: expected a head dim of 64, 128 or 256, got " + std::to_string(dim));
}

// Lists of candidates.
int64_t list_bytes(const Problem& problem, const CudaCall& call) {
    if (problem.topk == 0) return 0;
    // Those of the head dim with the most keys a tile.
    const int64_t entries = level_of(problem) == Level::topk
                                ? Forward<BFloat16, 64, Level::topk, false>::LIST_ENTRIES
                                : Forward<BFloat16, 64, Level::everything, false>::LIST_ENTRIES;
    const int64_t blocks = std::min<int64_t>(device::multiprocessors(call.device), schedule_of(problem, call).size());
    return blocks * entries * int64_t(sizeof(Candidate));
}

}  // namespace

int forward_tile_rows(const Problem&) { return ROWS; }

RowScale* row_scales(const Problem& problem, const CudaCall& call) {
    if (!problem.received) return nullptr;
    return reinterpret_cast<RowScale*>(call.workspace + COUNTER_BYTES + list_bytes(problem, call));
}

int64_t forward_workspace_bytes(const Problem& problem, const CudaCall& call) {
    const int64_t rows = problem.received ? problem.heads * call.batch * call.rows : 0;
    return COUNTER_BYTES + list_bytes(problem, call) + rows * int64_t(sizeof(RowScale));
}

void forward(const Problem& problem, const CudaCall& call) {
    ForwardCall prepared{};
    ForwardParams& params = prepared.params;
    params.schedule = schedule_of(problem, call);
    if (params.schedule.size() == 0) return;
    params.group = int(problem.heads / problem.key_heads);
    set_numbers(params, problem);
    params.sink_logits = floats(problem.sink_logits);
    params.query_mask = reinterpret_cast<const uint8_t*>(problem.query_mask.data);
    std::copy(problem.query_mask.stride, problem.query_mask.stride + 2, params.query_mask_stride);
    set_outputs(params, problem, call);

    prepared.query = tiled(problem.query, problem, call, problem.heads, call.rows);
    prepared.key = tiled(problem.key, problem, call, problem.key_heads, call.keys);
    prepared.value = tiled(problem.value, problem, call, problem.key_heads, call.keys);
    prepared.level = level_of(problem);
    prepared.blocks = std::min(device::multiprocessors(call.device), params.schedule.size());
    prepared.stream = static_cast<device::Stream>(call.stream);
    device::clear(call.workspace, COUNTER_BYTES, prepared.stream);
    if (problem.query.dtype == DType::bfloat16)
        run<BFloat16>(problem.key_dim, prepared);
    else
        run<Float16>(problem.key_dim, prepared);
}

}  // namespace attncap
