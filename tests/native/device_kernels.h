// Kernels that show what each function of the device layer does; hardware and model compile them alike.
#pragma once

#include "cuda/device.h"
#include "statistics/elementary.h"

namespace attncap {
namespace device {

// Where a thread's accumulators of m64nN lie in a matrix of N columns.
template <int N>
ATTNCAP_DEVICE void store_accumulators(float* matrix, const float (&acc)[N / 2]) {
    const int t = thread() % 128;
    ATTNCAP_UNROLL
    for (int i = 0; i < N / 2; ++i) {
        const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        matrix[row * N + column] = acc[i];
    }
}

struct LoadParams {
    TensorMap map;
    int box_rows, column, row, head, batch;
    uint16_t* out;  // the panel as it lies in shared memory
};

ATTNCAP_KERNEL(128, 1) load_kernel(ATTNCAP_PARAM LoadParams params) {
    if constexpr (kHopper) {
        uint16_t* panel = shared_memory<uint16_t>();
        uint64_t* full = reinterpret_cast<uint64_t*>(panel + 256 * kPanelColumns);
        if (thread() == 0) {
            prefetch(&params.map);
            barrier_init(full, 1);
            barrier_fence();
            barrier_expect(full, params.box_rows * kRowBytes);
            load_tile(&params.map, full, panel, params.column, params.row, params.head, params.batch);
        }
        sync_block();
        barrier_wait(full, 0);
        for (int i = thread(); i < params.box_rows * kPanelColumns; i += 128) params.out[i] = panel[i];
    }
}

struct MultiplyParams {
    TensorMap a, b;
    const uint16_t* a_numbers;  // [64][depth], where A comes from registers
    int panels;                 // of b
    int depth;
    float* out;  // [64][N]
};

constexpr int kMultiplyPanel = 256 * kRowBytes;

// out = A B^T, A [64][64 panels] and B [N][64 panels], all of K in one group.
template <typename T, int N>
ATTNCAP_KERNEL(128, 1)
multiply_shared_kernel(ATTNCAP_PARAM MultiplyParams params) {
    if constexpr (kHopper) {
        char* memory = shared_memory<char>();
        char* of_b = memory + 2 * 64 * kRowBytes;
        uint64_t* full = reinterpret_cast<uint64_t*>(of_b + 2 * kMultiplyPanel);
        if (thread() == 0) {
            barrier_init(full, 1);
            barrier_fence();
            barrier_expect(full, params.panels * (64 + N) * kRowBytes);
            for (int panel = 0; panel < params.panels; ++panel) {
                load_tile(&params.a, full, memory + panel * 64 * kRowBytes, panel * kPanelColumns, 0, 0, 0);
                load_tile(&params.b, full, of_b + panel * kMultiplyPanel, panel * kPanelColumns, 0, 0, 0);
            }
        }
        sync_block();
        barrier_wait(full, 0);
        float acc[N / 2];
        pin(acc);
        multiply_fence();
        for (int panel = 0; panel < params.panels; ++panel) {
            const uint64_t a = k_major(memory + panel * 64 * kRowBytes), b = k_major(of_b + panel * kMultiplyPanel);
            ATTNCAP_UNROLL
            for (int k = 0; k < 4; ++k) {
                multiply<T, N>(acc, advance(a, 32 * k), advance(b, 32 * k), panel > 0 || k > 0);
            }
        }
        multiply_commit();
        multiply_wait<0>();
        pin(acc);
        store_accumulators<N>(params.out, acc);
    }
}

// out = A B, A [64][depth] from registers and B [depth][N].
template <typename T, int N>
ATTNCAP_KERNEL(128, 1)
multiply_registers_kernel(ATTNCAP_PARAM MultiplyParams params) {
    if constexpr (kHopper) {
        constexpr int kDepth = 32;
        char* memory = shared_memory<char>();
        uint64_t* full = reinterpret_cast<uint64_t*>(memory + 4 * kDepth * kRowBytes);
        if (thread() == 0) {
            barrier_init(full, 1);
            barrier_fence();
            barrier_expect(full, params.panels * kDepth * kRowBytes);
            for (int panel = 0; panel < params.panels; ++panel) {
                load_tile(&params.b, full, memory + panel * kDepth * kRowBytes, panel * kPanelColumns, 0, 0, 0);
            }
        }
        sync_block();
        uint32_t a[kDepth / 16][4];
        const int t = thread();
        ATTNCAP_UNROLL
        for (int k = 0; k < kDepth / 16; ++k) {
            ATTNCAP_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, column = k * 16 + i / 2 * 8 + t % 4 * 2;
                const uint16_t* pair = params.a_numbers + row * kDepth + column;
                a[k][i] = pair[0] | uint32_t(pair[1]) << 16;
            }
        }
        barrier_wait(full, 0);
        float acc[N / 2];
        ATTNCAP_UNROLL
        for (int i = 0; i < N / 2; ++i) acc[i] = 1;
        pin(acc);
        multiply_fence();
        ATTNCAP_UNROLL
        for (int k = 0; k < kDepth / 16; ++k) {
            multiply<T, N>(acc, a[k], mn_major(memory + k * 16 * kRowBytes, kDepth * kRowBytes), true);
        }
        multiply_commit();
        multiply_wait<0>();
        pin(acc);
        store_accumulators<N>(params.out, acc);
    }
}

struct PipelineParams {
    TensorMap a, b;
    int panels;
    float* out;  // [64][64], for each of two warpgroups
};

// A producer and two warpgroups that take turns: out = A B^T, rows 64 g .. of A for warpgroup g.
template <typename T>
ATTNCAP_KERNEL(384, 1)
pipeline_kernel(ATTNCAP_PARAM PipelineParams params) {
    if constexpr (kHopper) {
        constexpr int kStages = 2, kStage = (128 + 64) * kRowBytes;
        char* memory = shared_memory<char>();
        uint64_t* full = reinterpret_cast<uint64_t*>(memory + kStages * kStage);
        uint64_t* empty = full + kStages;
        if (thread() == 0) {
            for (int i = 0; i < kStages; ++i) {
                barrier_init(full + i, 1);
                barrier_init(empty + i, 256);
            }
            barrier_fence();
        }
        sync_block();
        const int group = shuffle(thread() / 128, 0) - 1;
        if (group < 0) {
            release_registers<24>();
            if (thread() == 0) {
                for (int i = 0; i < params.panels; ++i) {
                    char* stage = memory + i % kStages * kStage;
                    barrier_wait(empty + i % kStages, (i / kStages + 1) & 1);
                    barrier_expect(full + i % kStages, kStage);
                    load_tile(&params.a, full + i % kStages, stage, i * kPanelColumns, 0, 0, 0);
                    load_tile(&params.b, full + i % kStages, stage + 128 * kRowBytes, i * kPanelColumns, 0, 0, 0);
                }
            }
        } else {
            claim_registers<240>();
            if (group == 1) named_arrive(1, 256);
            float acc[32];
            for (int i = 0; i < params.panels; ++i) {
                const char* stage = memory + i % kStages * kStage;
                barrier_wait(full + i % kStages, i / kStages & 1);
                named_sync(group == 0 ? 1 : 2, 256);
                pin(acc);
                multiply_fence();
                const uint64_t a = k_major(stage + group * 64 * kRowBytes), b = k_major(stage + 128 * kRowBytes);
                ATTNCAP_UNROLL
                for (int k = 0; k < 4; ++k) {
                    multiply<T, 64>(acc, advance(a, 32 * k), advance(b, 32 * k), i > 0 || k > 0);
                }
                multiply_commit();
                named_arrive(group == 0 ? 2 : 1, 256);
                multiply_wait<0>();
                pin(acc);
                barrier_arrive(empty + i % kStages);
            }
            store_accumulators<64>(params.out + group * 64 * 64, acc);
        }
    }
}

struct FragmentParams {
    const uint16_t* a;  // [16][16]
    const uint16_t* b;  // [8][16]
    float* out;         // [16][8]
};

// out = A B^T + 1
template <typename T>
ATTNCAP_KERNEL(32, 1)
fragment_kernel(ATTNCAP_PARAM FragmentParams params) {
    uint16_t* of_a = shared_memory<uint16_t>();
    uint16_t* of_b = of_a + 16 * 16;
    const int lane = thread();
    copy_async(of_a + lane * 8, params.a + lane * 8, true);
    if (lane < 16) copy_async(of_b + lane * 8, params.b + lane * 8, true);
    copy_commit();
    copy_wait<0>();
    sync_warp();
    uint32_t a[4], b[4];
    // Matrices in the order of A's registers: rows 0-7 and 8-15 of the first eight columns, then of the others.
    load_matrix(a, of_a + lane % 16 * 16 + lane / 16 * 8);
    load_matrix(b, of_b + lane % 8 * 16 + lane / 8 % 2 * 8);
    float d[4] = {1, 1, 1, 1};
    multiply_16x8x16<T>(d, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) params.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

struct CopyParams {
    const float* in;  // 4 per thread and stage
    int stages;       // the last holds nothing
    float* out;
};

// Two copies under way, each waited for in its turn.
ATTNCAP_KERNEL(64, 2) copy_kernel(ATTNCAP_PARAM CopyParams params) {
    float* memory = shared_memory<float>();
    const auto begin = [&](int stage) {
        const int at = stage * 256 + thread() * 4;
        if (stage < params.stages)
            copy_async(memory + stage % 2 * 256 + thread() * 4, params.in + at, stage + 1 < params.stages);
        copy_commit();
    };
    begin(0);
    for (int stage = 0; stage < params.stages; ++stage) {
        begin(stage + 1);
        copy_wait<1>();
        sync_block();
        // What another thread copied.
        for (int i = 0; i < 4; ++i) {
            params.out[stage * 256 + thread() * 4 + i] = memory[stage % 2 * 256 + (63 - thread()) * 4 + i];
        }
        sync_block();
    }
}

struct WarpParams {
    const uint32_t* in;  // one per thread
    uint32_t* out;       // five per thread
};

ATTNCAP_KERNEL(64, 2) warp_kernel(ATTNCAP_PARAM WarpParams params) {
    const uint32_t x = params.in[thread()];
    uint32_t* out = params.out + 5 * thread();
    out[0] = shuffle_xor(x, 5);
    out[1] = uint32_t(shuffle(float(x % 1024), thread() % 32 / 4 * 4));
    out[2] = any(x == 7);
    out[3] = reduce_max(x);
    sync_warp();
    out[4] = uint32_t(block() + 100 * blocks());
}

struct NumberParams {
    const float* in;
    int count;
    uint32_t* packed;  // of bfloat16 and of float16
    float* powers;
};

ATTNCAP_KERNEL(32, 1) number_kernel(ATTNCAP_PARAM NumberParams params) {
    for (int i = thread(); i < params.count; i += 32) {
        const float low = params.in[i], high = -params.in[(i + 1) % params.count];
        params.packed[2 * i] = pack<BFloat16>(low, high);
        params.packed[2 * i + 1] = pack<Float16>(low, high);
        params.powers[i] = power_of_two(low);
    }
}

}  // namespace device
}  // namespace attncap
