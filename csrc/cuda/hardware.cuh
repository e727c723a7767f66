// The device layer on the hardware. Instructions come from CuTe's and CUTLASS's headers where they have them.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/descriptor.h"
#include "cuda/number.h"
#include "cuda/tensor_shape.h"

namespace attncap {
namespace device {

// Kernels for Hopper wrap their body in `if constexpr (kHopper)`: for other architectures they compile to nothing.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHopper = false;
#else
constexpr bool kHopper = true;
#endif

constexpr uint32_t kAllLanes = 0xffffffff;

// Threads of a CTA.

ATTNCAP_DEVICE int thread() { return int(threadIdx.x); }
ATTNCAP_DEVICE int block() { return int(blockIdx.x); }
ATTNCAP_DEVICE int blocks() { return int(gridDim.x); }

template <typename T>
ATTNCAP_DEVICE T* shared_memory() {
    extern __shared__ __align__(1024) unsigned char attncap_shared_memory[];
    return reinterpret_cast<T*>(attncap_shared_memory);
}

ATTNCAP_DEVICE void sync_block() { __syncthreads(); }

// Not CUTLASS's NamedBarrier, which stops the program on anything older than Hopper.
ATTNCAP_DEVICE void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

ATTNCAP_DEVICE void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What the 32 lanes of a warp do together.

template <typename V>
ATTNCAP_DEVICE V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(kAllLanes, value, mask);
}

template <typename V>
ATTNCAP_DEVICE V shuffle(V value, int lane) {
    return __shfl_sync(kAllLanes, value, lane);
}

ATTNCAP_DEVICE bool any(bool holds) { return __any_sync(kAllLanes, holds) != 0; }
ATTNCAP_DEVICE uint32_t reduce_max(uint32_t value) { return __reduce_max_sync(kAllLanes, value); }
ATTNCAP_DEVICE void sync_warp() { __syncwarp(); }

// Registers.

template <int N>
ATTNCAP_DEVICE void claim_registers() {
    cutlass::arch::warpgroup_reg_alloc<N>();
}

template <int N>
ATTNCAP_DEVICE void release_registers() {
    cutlass::arch::warpgroup_reg_dealloc<N>();
}

// The same number, of which the compiler knows nothing: what is computed of it again is not kept in registers since.
ATTNCAP_DEVICE int again(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

ATTNCAP_DEVICE uint64_t again(uint64_t number) {
    asm volatile("" : "+l"(number));
    return number;
}

// Keeps the compiler from moving the registers' reads and writes over what stands here.
template <int N>
ATTNCAP_DEVICE void pin(float (&registers)[N]) {
    ATTNCAP_UNROLL
    for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(registers[i]);
}

template <int N>
ATTNCAP_DEVICE void pin(uint32_t (&registers)[N]) {
    ATTNCAP_UNROLL
    for (int i = 0; i < N; ++i) cute::warpgroup_fence_operand(registers[i]);
}

// Two numbers in one register, the first in the low half, rounded to nearest, ties to even.
template <typename T>
ATTNCAP_DEVICE uint32_t pack(float low, float high) {
    using Pair = std::conditional_t<std::is_same_v<T, BFloat16>, __nv_bfloat162, __half2>;
    Pair pair;
    if constexpr (std::is_same_v<T, BFloat16>) {
        pair = __floats2bfloat162_rn(low, high);
    } else {
        pair = __floats2half2_rn(low, high);
    }
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// Memory.

// Writes of this thread to shared memory are seen by TMA and wgmma that are issued after it.
ATTNCAP_DEVICE void fence_async() { cutlass::arch::fence_view_async_shared(); }

// The number before; threads of all CTAs come one after another.
ATTNCAP_DEVICE int fetch_add(int* number, int by) { return atomicAdd(number, by); }

// mbarriers, each a uint64_t in shared memory.

ATTNCAP_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
    cutlass::arch::ClusterBarrier::init(barrier, uint32_t(arrivals));
}

ATTNCAP_DEVICE void barrier_fence() { cutlass::arch::fence_barrier_init(); }

// The compiler must not move reads and writes of shared memory over the barriers: CUTLASS's instructions do not say so.
ATTNCAP_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("" ::: "memory");
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, uint32_t(bytes));
}

ATTNCAP_DEVICE void barrier_arrive(uint64_t* barrier) {
    asm volatile("" ::: "memory");
    cutlass::arch::ClusterBarrier::arrive(barrier);
}

ATTNCAP_DEVICE void barrier_wait(uint64_t* barrier, int phase) {
    cutlass::arch::ClusterBarrier::wait(barrier, uint32_t(phase));
    asm volatile("" ::: "memory");
}

// Tensor maps, and the tiles that TMA loads by them.

using TensorMap = CUtensorMap;

ATTNCAP_DEVICE void load_tile(const TensorMap* map, uint64_t* barrier, void* destination, int column, int row, int head,
                              int batch) {
    constexpr auto hint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    cute::SM90_TMA_LOAD_4D::copy(map, barrier, hint, destination, column, row, head, batch);
}

ATTNCAP_DEVICE void prefetch(const TensorMap* map) { cute::prefetch_tma_descriptor(map); }

// Products of a warpgroup (wgmma).

ATTNCAP_DEVICE uint64_t k_major(const void* at) { return k_major_bits(cute::cast_smem_ptr_to_uint(at)); }

ATTNCAP_DEVICE uint64_t mn_major(const void* at, int panel_bytes) {
    return mn_major_bits(cute::cast_smem_ptr_to_uint(at), panel_bytes);
}

// m64nNk16 with both operands in shared memory, and with A in registers.
template <typename T, int N>
struct Wgmma;

#define ATTNCAP_WGMMA(N)                                                                         \
    template <>                                                                                  \
    struct Wgmma<BFloat16, N> {                                                                  \
        using Major = cute::SM90::GMMA::Major;                                                   \
        using Shared = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<Major::K, Major::K>;     \
        using Registers = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<Major::K, Major::MN>; \
    };                                                                                           \
    template <>                                                                                  \
    struct Wgmma<Float16, N> {                                                                   \
        using Major = cute::SM90::GMMA::Major;                                                   \
        using Shared = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<Major::K, Major::K>;       \
        using Registers = cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<Major::K, Major::MN>;   \
    };

ATTNCAP_WGMMA(32)
ATTNCAP_WGMMA(64)
ATTNCAP_WGMMA(96)
ATTNCAP_WGMMA(128)
ATTNCAP_WGMMA(256)
#undef ATTNCAP_WGMMA

ATTNCAP_DEVICE cute::SM90::GMMA::ScaleOut scale_out(bool add) {
    return add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
}

template <typename Op, int... I>
ATTNCAP_DEVICE void multiply_each(float* acc, uint64_t a, uint64_t b, bool add, std::integer_sequence<int, I...>) {
    Op::fma(a, b, acc[I]..., scale_out(add));
}

template <typename Op, int... I>
ATTNCAP_DEVICE void multiply_each(float* acc, const uint32_t (&a)[4], uint64_t b, bool add,
                                  std::integer_sequence<int, I...>) {
    Op::fma(a[0], a[1], a[2], a[3], b, acc[I]..., scale_out(add));
}

// acc = a b, or acc + a b: A is [64][16] and B [N][16] in shared memory, see k_major.
template <typename T, int N>
ATTNCAP_DEVICE void multiply(float (&acc)[N / 2], uint64_t a, uint64_t b, bool add) {
    multiply_each<typename Wgmma<T, N>::Shared>(acc, a, b, add, std::make_integer_sequence<int, N / 2>());
}

// A from registers, which must stay as they are until multiply_wait; B is [16][N] in shared memory, see mn_major.
template <typename T, int N>
ATTNCAP_DEVICE void multiply(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    multiply_each<typename Wgmma<T, N>::Registers>(acc, a, b, add, std::make_integer_sequence<int, N / 2>());
}

ATTNCAP_DEVICE void multiply_fence() { cute::warpgroup_arrive(); }
ATTNCAP_DEVICE void multiply_commit() { cute::warpgroup_commit_batch(); }

// Until at most N of the committed groups are under way.
template <int N>
ATTNCAP_DEVICE void multiply_wait() {
    cute::warpgroup_wait<N>();
}

// Copies and products of a warp, on sm_80 and newer.

// 16 bytes; zeros where they do not exist.
ATTNCAP_DEVICE void copy_async(void* shared, const void* global, bool exists) {
    using Chunk = cute::uint128_t;
    cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<Chunk>::copy(*static_cast<const Chunk*>(global), *static_cast<Chunk*>(shared),
                                                       exists);
}

ATTNCAP_DEVICE void copy_commit() { cute::cp_async_fence(); }

template <int N>
ATTNCAP_DEVICE void copy_wait() {
    cute::cp_async_wait<N>();
    asm volatile("" ::: "memory");
}

// Four 8x8 matrices of 16 bits: lane i gives the address of row i % 8 of matrix i / 8.
ATTNCAP_DEVICE void load_matrix(uint32_t (&to)[4], const void* row) {
    cute::SM75_U32x4_LDSM_N::copy(*static_cast<const cute::uint128_t*>(row), to[0], to[1], to[2], to[3]);
}

// d += a b
template <typename T>
ATTNCAP_DEVICE void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    using Op = std::conditional_t<std::is_same_v<T, BFloat16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                  cute::SM80_16x8x16_F32F16F16F32_TN>;
    Op::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]);
}

// The host's part: launching, and making tensor maps.

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* name, const char* doing) {
    if (status == cudaSuccess) return;
    // A launch that failed leaves its error behind for whoever asks next.
    cudaGetLastError();
    throw std::runtime_error(std::string(name) + ": " + doing + ": " + cudaGetErrorString(status));
}

inline int multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device", "counting multiprocessors");
    return count;
}

inline void clear(void* memory, int64_t bytes, Stream stream) {
    check(cudaMemsetAsync(memory, 0, size_t(bytes), stream), "device", "clearing memory");
}

template <typename Params>
void launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, Stream stream, const char* name,
            const Params& params) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name,
          "asking for shared memory");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, params), name, "launching");
}

// cuTensorMapEncodeTiled of the driver that is loaded: nothing links libcuda, so that attncap imports without one.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const auto encoder = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
              "tensor map", "looking for the driver's cuTensorMapEncodeTiled");
        if (result != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("tensor map: the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
        }
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
    }();
    return encoder;
}

// size: columns, rows, heads, batch. A box is 64 columns of box_rows rows.
inline TensorMap tensor_map(const void* base, const int64_t size[4], const int64_t stride_bytes[3], int box_rows,
                            bool bfloat) {
    const TensorShape shape = checked_shape(base, size, stride_bytes, box_rows, bfloat);
    cuuint64_t sizes[4], strides[3];
    for (int i = 0; i < 4; ++i) sizes[i] = cuuint64_t(shape.size[i]);
    for (int i = 0; i < 3; ++i) strides[i] = cuuint64_t(shape.stride_bytes[i]);
    const cuuint32_t box[4] = {kPanelColumns, cuuint32_t(box_rows), 1, 1}, step[4] = {1, 1, 1, 1};
    TensorMap map;
    const CUresult result = tensor_map_encoder()(
        &map, bfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(base),
        sizes, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("tensor map: the driver refused it (CUresult " + std::to_string(int(result)) + ")");
    }
    return map;
}

}  // namespace device
}  // namespace attncap
