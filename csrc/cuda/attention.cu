// One call on a GPU: the forward, then the passes that need its lse.
#include "cuda/device_guard.h"
#include "cuda/launch.h"

namespace attncap {

void attention_cuda(const Problem& problem, const CudaCall& call) {
    const DeviceGuard guard(call.device);
    forward(problem, call);
    if (problem.received) received_mass(problem, call);
}

std::string cuda_runtime_lacks() { return runtime_lacks(); }

int64_t cuda_workspace_bytes(const Problem& problem, const CudaCall& call) {
    const DeviceGuard guard(call.device);
    return forward_workspace_bytes(problem, call);
}

int cuda_tile_rows(const Problem& problem) { return forward_tile_rows(problem); }

int cuda_tile_keys(const Problem& problem) { return received_tile_keys(problem); }

}  // namespace attncap
