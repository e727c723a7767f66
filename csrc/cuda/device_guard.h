// The CUDA runtime as a call finds it. On the model of a GPU there is one device, which is always there.
#pragma once

#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>

namespace attncap {

// Why the runtime does not start, as where the driver is older than it; "" where it does.
inline std::string runtime_lacks() {
    int devices = 0;
    const cudaError_t status = cudaGetDeviceCount(&devices);
    return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

// The device that calls of the runtime are for, while this lives; the thread's own is put back.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_));
        if (device != before_) check(cudaSetDevice(device));
        device_ = device;
    }
    ~DeviceGuard() {
        if (device_ != before_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    static void check(cudaError_t status) {
        if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA device: ") + cudaGetErrorString(status));
    }

    int before_ = 0, device_ = 0;
};

}  // namespace attncap
#else
namespace attncap {

inline std::string runtime_lacks() { return ""; }

struct DeviceGuard {
    explicit DeviceGuard(int) {}
};

}  // namespace attncap
#endif
