// The device layer of csrc/cuda/device.h on the CPU. (Signatures first; the model follows.)
#pragma once

#include <cstdint>

#include "cuda/descriptor.h"
#include "cuda/number.h"
#include "cuda/tensor_shape.h"

namespace attncap {
namespace device {

constexpr bool kHopper = true;

int thread();
int block();
int blocks();
template <typename T>
T* shared_memory();
void sync_block();
void named_sync(int id, int threads);
void named_arrive(int id, int threads);
template <int N>
void claim_registers();
template <int N>
void release_registers();

void barrier_init(uint64_t* barrier, int arrivals);
void barrier_fence();
void barrier_expect(uint64_t* barrier, int bytes);
void barrier_arrive(uint64_t* barrier);
void barrier_wait(uint64_t* barrier, int phase);
void fence_async();

using TensorMap = TensorShape;
TensorMap tensor_map(const void* base, const int64_t size[4], const int64_t stride_bytes[3], int box_rows, bool bfloat);

enum class Keep { normally, shortly, longest };
template <Keep keep = Keep::normally>
void load_tile(const TensorMap* map, uint64_t* barrier, void* destination, int column, int row, int head, int batch);
void prefetch(const TensorMap* map);

uint64_t k_major(const void* at);
uint64_t mn_major(const void* at, int panel_bytes);
template <typename T, int N>
void multiply(float (&acc)[N / 2], uint64_t a, uint64_t b, bool add);
template <typename T, int N>
void multiply(float (&acc)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add);
void multiply_fence();
void multiply_commit();
template <int N>
void multiply_wait();
template <int N>
void pin(float (&registers)[N]);
template <int N>
void pin(uint32_t (&registers)[N]);

void copy_async(void* shared, const void* global, bool exists);
void copy_commit();
template <int N>
void copy_wait();
void load_matrix(uint32_t (&to)[4], const void* row);
void load_matrix_transposed(uint32_t (&to)[4], const void* row);
template <typename T>
void multiply_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <typename V>
V shuffle_xor(V value, int mask);
template <typename V>
V shuffle(V value, int lane);
uint32_t ballot(bool holds);
bool any(bool holds);
uint32_t reduce_max(uint32_t value);
uint32_t reduce_min(uint32_t value);
void sync_warp();

float exp2(float x);
float to_float(BFloat16 x);
float to_float(Float16 x);
template <typename T>
uint32_t pack(float low, float high);
template <typename T>
void unpack(uint32_t pair, float& low, float& high);

using Stream = void*;
template <typename Params>
void launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, Stream stream, const char* name,
            const Params& params);

}  // namespace device
}  // namespace attncap
