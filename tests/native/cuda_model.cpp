// The CUDA kernels on the model of a GPU, as a Python module: what attncap._C has of them, and parts for tests.
// With its bindings in one unit, for most of their compilation is pybind11's headers.
#include "bindings/cuda.cpp"
#include "bindings/problem.cpp"
#include "cuda/device.h"

PYBIND11_MODULE(cuda_model, m) {
    attncap::bind_problem(m);
    attncap::bind_cuda(m);
    m.def(
        "set_seed", [](uint64_t seed) { attncap::device::model::seed() = seed; }, py::arg("seed"),
        "Draws the order in which the launches that follow run their threads.");
}
