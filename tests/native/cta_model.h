// The device layer of csrc/cuda/device.h on the CPU: kernels run as they are written, one thread of a CTA at a time, in
// an order that a seed draws. What the hardware does beside the threads (TMA, cp.async, wgmma) is done at moments that
// the seed draws too, as late as the waits for it allow. What a kernel does wrong throws, and what it must not read is
// NaN.
//
// Not modelled: clusters, fences between proxies, weak ordering of memory, global memory's bounds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/descriptor.h"
#include "cuda/number.h"
#include "cuda/tensor_shape.h"
#include "model/cta.h"
#include "model/fragments.h"
#include "model/number.h"

namespace attncap {
namespace device {

constexpr bool kHopper = true;

// Threads of a CTA.

inline int thread() { return model::Cta::current().schedule.current(); }
inline int block() { return model::Cta::current().block; }
inline int blocks() { return model::Cta::current().launch.blocks; }

template <typename T>
T* shared_memory() {
    return reinterpret_cast<T*>(model::Cta::current().memory.start());
}

inline void named_sync(int id, int threads) { model::Cta::current().barriers.named_sync(id, threads); }
inline void sync_block() { named_sync(0, model::Cta::current().launch.threads); }

inline void named_arrive(int id, int threads) {
    model::Cta::current().barriers.named_arrive(id, threads);
    model::Cta::current().schedule.pause();
}

// What the 32 lanes of a warp do together.

namespace model {

template <typename V>
struct Sent {
    V value;
    int lane;
};

// Every lane gets what the lane that it names has.
template <typename V>
V exchange(const char* what, V value, int lane) {
    return Cta::current().warps.meet<V>(what, Sent<V>{value, lane}, [](const Sent<V>* in, V* out) {
        for (int i = 0; i < kWarp; ++i) out[i] = in[in[i].lane % kWarp].value;
    });
}

// Every lane gets what all of theirs fold to.
template <typename Fold>
uint32_t fold_lanes(const char* what, uint32_t value, const Fold& fold) {
    return Cta::current().warps.meet<uint32_t>(what, value, [&](const uint32_t* in, uint32_t* out) {
        std::fill(out, out + kWarp, std::accumulate(in + 1, in + kWarp, in[0], fold));
    });
}

}  // namespace model

template <typename V>
V shuffle_xor(V value, int mask) {
    return model::exchange("shuffle_xor", value, thread() % model::kWarp ^ mask);
}

template <typename V>
V shuffle(V value, int lane) {
    return model::exchange("shuffle", value, lane);
}

inline uint32_t reduce_max(uint32_t value) {
    return model::fold_lanes("reduce_max", value, [](uint32_t a, uint32_t b) { return std::max(a, b); });
}

inline bool any(bool holds) { return model::fold_lanes("any", holds, std::bit_or<uint32_t>()) != 0; }
inline void sync_warp() { model::fold_lanes("sync_warp", 0, std::bit_or<uint32_t>()); }

// Registers.

template <int N>
void claim_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
    model::Cta::current().registers.claim(N);
}

template <int N>
void release_registers() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
    model::Cta::current().registers.release(N);
}

template <typename N>
N again(N number) {
    return number;
}

template <int N>
void pin(float (&)[N]) {}
template <int N>
void pin(uint32_t (&)[N]) {}

// Memory.

inline void fence_async() {}

inline int fetch_add(int* number, int by) {
    const int before = *number;
    *number += by;
    return before;
}

// mbarriers, each a uint64_t in shared memory.

inline void barrier_init(uint64_t* barrier, int arrivals) { model::Cta::current().barriers.init(barrier, arrivals); }
inline void barrier_fence() { model::Cta::current().barriers.fence(); }

inline void barrier_expect(uint64_t* barrier, int bytes) {
    model::Cta::current().barriers.arrive(barrier, bytes);
    model::Cta::current().schedule.pause();
}

inline void barrier_arrive(uint64_t* barrier) { barrier_expect(barrier, 0); }
inline void barrier_wait(uint64_t* barrier, int phase) { model::Cta::current().barriers.wait(barrier, phase); }

// Tensor maps, and the tiles that TMA loads by them.

using TensorMap = TensorShape;

inline void load_tile(const TensorMap* map, uint64_t* barrier, void* destination, int column, int row, int head,
                      int batch) {
    model::Cta::current().tiles.issue(*map, barrier, destination, {column, row, head, batch});
    model::Cta::current().schedule.pause();
}

inline void prefetch(const TensorMap*) {}

// Products of a warpgroup (wgmma).

inline uint64_t k_major(const void* at) {
    return k_major_bits(model::Cta::current().memory.address(at, 2 * model::kDepth, "k_major"));
}

inline uint64_t mn_major(const void* at, int panel_bytes) {
    return mn_major_bits(model::Cta::current().memory.address(at, kRowBytes, "mn_major"), panel_bytes);
}

template <typename T, int N>
void multiply(float (&acc)[N / 2], uint64_t a, uint64_t b, bool add) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has multiples of 8 columns up to 256");
    model::Cta::current().products.issue({model::widened<T>, N, a, b, false, add}, acc, nullptr);
    model::Cta::current().schedule.pause();
}

template <typename T, int N>
void multiply(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has multiples of 8 columns up to 256");
    model::Cta::current().products.issue({model::widened<T>, N, 0, b, true, add}, acc, a);
    model::Cta::current().schedule.pause();
}

inline void multiply_fence() { model::Cta::current().products.fence(); }
inline void multiply_commit() { model::Cta::current().products.commit(); }

template <int N>
void multiply_wait() {
    static_assert(N >= 0 && N <= 7, "wgmma.wait_group takes 0 to 7");
    model::Cta::current().products.wait(N);
}

// Copies and products of a warp, on sm_80 and newer.

inline void copy_async(void* shared, const void* global, bool exists) {
    model::Cta::current().copies.issue(shared, global, exists);
    model::Cta::current().schedule.pause();
}

inline void copy_commit() { model::Cta::current().copies.commit(); }

template <int N>
void copy_wait() {
    model::Cta::current().copies.wait(N);
}

namespace model {

struct Registers4 {
    uint32_t at[4];
};

// Register `matrix` of a lane has two neighbours of row lane / 4 of the matrix.
inline void load_matrices(const void* const* rows, Registers4* out) {
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            const char* row = static_cast<const char*>(rows[matrix * 8 + lane / 4]);
            std::memcpy(&out[lane].at[matrix], row + lane % 4 * 4, sizeof(uint32_t));
        }
    }
}

struct MultiplyIn {
    float d[4];
    uint32_t a[4], b[2];
};
struct MultiplyOut {
    float d[4];
};

// m16n8k16
template <typename T>
void multiply_fragments(const MultiplyIn* in, MultiplyOut* out) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const Element e = of_a(lane, i);
            unpack<T>(in[lane].a[i], a[e.row][e.column], a[e.row][e.column + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            const Element e = of_b(lane, i);
            unpack<T>(in[lane].b[i], b[e.row][e.column], b[e.row + 1][e.column]);
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const Element e = accumulator(lane, i);
            float sum = in[lane].d[i];
            for (int k = 0; k < 16; ++k) sum += a[e.row][k] * b[k][e.column];
            out[lane].d[i] = sum;
        }
    }
}

}  // namespace model

inline void load_matrix(uint32_t (&to)[4], const void* row) {
    model::Cta& cta = model::Cta::current();
    if (cta.memory.address(row, 16, "load_matrix") % 16 != 0)
        throw model::Fault("load_matrix: a row is not aligned to 16 bytes");
    const auto loaded = cta.warps.meet<model::Registers4>("load_matrix", row, model::load_matrices);
    std::memcpy(to, loaded.at, sizeof to);
}

template <typename T>
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const model::MultiplyIn in{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    const auto out =
        model::Cta::current().warps.meet<model::MultiplyOut>("multiply_16x8x16", in, model::multiply_fragments<T>);
    std::memcpy(d, out.d, sizeof d);
}

// The host's part: launching, and making tensor maps.

namespace model {

// The seed of the launches that follow.
inline uint64_t& seed() {
    static uint64_t value = 0;
    return value;
}

}  // namespace model

using Stream = void*;

// Few, so that a CTA serves several blocks.
inline int multiprocessors(int) { return 3; }

inline void clear(void* memory, int64_t bytes, Stream) { std::memset(memory, 0, size_t(bytes)); }

template <typename Params>
void launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, Stream, const char* name,
            const Params& params) {
    constexpr int kMostThreads = 1024, kMostSharedBytes = 227 * 1024;
    const bool fits = blocks > 0 && threads > 0 && threads <= kMostThreads && threads % model::kWarp == 0 &&
                      shared_bytes >= 0 && shared_bytes <= kMostSharedBytes;
    if (!fits) throw std::runtime_error(std::string(name) + ": launching: invalid configuration");
    model::Random random(model::seed());
    std::vector<int> order(static_cast<size_t>(blocks));
    std::iota(order.begin(), order.end(), 0);
    for (int i = blocks; i > 1; --i) std::swap(order[size_t(i - 1)], order[size_t(random.below(i))]);
    for (int block : order) {
        try {
            model::Cta({blocks, threads, shared_bytes}, block, random.next(), [&] { kernel(params); }).run();
        } catch (const model::Fault& fault) {
            throw std::runtime_error(std::string(name) + ", block " + std::to_string(block) + ", seed " +
                                     std::to_string(model::seed()) + ": " + fault.what());
        }
    }
}

inline TensorMap tensor_map(const void* base, const int64_t size[4], const int64_t stride_bytes[3], int box_rows,
                            bool bfloat) {
    return checked_shape(base, size, stride_bytes, box_rows, bfloat);
}

}  // namespace device
}  // namespace attncap
