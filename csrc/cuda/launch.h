// The CUDA kernels' entries. All of them queue work on the call's stream and wait for nothing, so that a CUDA graph can
// capture them; errors of a launch are thrown as std::runtime_error with the kernel's name.
#pragma once

#include <cstdint>
#include <string>

#include "problem.h"
#include "statistics/softmax.h"

namespace attncap {

// What a call needs besides its description. Tensors, tables and workspace lie on `device`, statistics contiguous.
struct CudaCall {
    int device = 0;
    void* stream = nullptr;                 // cudaStream_t
    int64_t batch = 0, rows = 0, keys = 0;  // of the tensors: packed sequences are one batch entry

    // Packed calls, null otherwise: (sequence, block of cuda_tile_rows() rows) and (sequence, block of
    // cuda_tile_keys() keys), most work first; of each sequence (row0, rows, key0, keys, offset).
    const int32_t *tiles = nullptr, *key_tiles = nullptr, *sequences = nullptr;
    int64_t tile_count = 0, key_tile_count = 0;

    char* workspace = nullptr;  // cuda_workspace_bytes() of it, 256-byte aligned, holding anything
    int64_t workspace_bytes = 0;

    bool packed() const { return sequences != nullptr; }
};

// Runs one call: `out` and every statistic it has memory for.
void attention_cuda(const Problem& problem, const CudaCall& call);

// Why nothing runs on any GPU here; "" where it does.
std::string cuda_runtime_lacks();

// What Python allocates for a call, of whose `device` and sizes this takes notice.
int64_t cuda_workspace_bytes(const Problem& problem, const CudaCall& call);
int cuda_tile_rows(const Problem& problem);
int cuda_tile_keys(const Problem& problem);

// `out` and all statistics of rows (forward.cu).
void forward(const Problem& problem, const CudaCall& call);
int64_t forward_workspace_bytes(const Problem& problem, const CudaCall& call);
int forward_tile_rows(const Problem& problem);

// Where the forward leaves what turns every row's scores into probabilities, for passes over the scores again; null
// where none follows.
RowScale* row_scales(const Problem& problem, const CudaCall& call);

// received_mass, from the row_scales (received.cu).
void received_mass(const Problem& problem, const CudaCall& call);
int received_tile_keys(const Problem& problem);

}  // namespace attncap
