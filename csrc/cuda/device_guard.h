// The device that calls of the CUDA runtime are for, while this lives; the thread's own is put back. On the CPU's model
// of a GPU there is one device.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace attncap {

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

struct DeviceGuard {
    explicit DeviceGuard(int) {}
};

}  // namespace attncap
#endif
