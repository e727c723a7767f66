// The CUDA kernels in Python.
#include "bindings/bindings.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace attncap {
namespace {

// Sets a pointer of CudaCall to an address.
template <auto Member>
void set_address(CudaCall& call, uintptr_t address) {
    using Pointer = std::decay_t<decltype(call.*Member)>;
    call.*Member = reinterpret_cast<Pointer>(address);
}

}  // namespace

void bind_cuda(py::module_& m) {
    py::class_<CudaCall>(m, "CudaCall", py::module_local())
        .def(py::init<>())
        .def_readwrite("device", &CudaCall::device)
        .def_readwrite("batch", &CudaCall::batch)
        .def_readwrite("rows", &CudaCall::rows)
        .def_readwrite("keys", &CudaCall::keys)
        .def_readwrite("tile_count", &CudaCall::tile_count)
        .def_readwrite("key_tile_count", &CudaCall::key_tile_count)
        .def_readwrite("workspace_bytes", &CudaCall::workspace_bytes)
        .def_property("stream", nullptr, &set_address<&CudaCall::stream>)
        .def_property("tiles", nullptr, &set_address<&CudaCall::tiles>)
        .def_property("key_tiles", nullptr, &set_address<&CudaCall::key_tiles>)
        .def_property("sequences", nullptr, &set_address<&CudaCall::sequences>)
        .def_property("workspace", nullptr, &set_address<&CudaCall::workspace>);
    m.def("attention_cuda", &attention_cuda, py::arg("problem"), py::arg("call"),
          py::call_guard<py::gil_scoped_release>(), "Queues one call on its stream.");
    m.def("cuda_runtime_lacks", &cuda_runtime_lacks);
    m.def("cuda_workspace_bytes", &cuda_workspace_bytes, py::arg("problem"), py::arg("call"));
    m.def("cuda_tile_rows", &cuda_tile_rows, py::arg("problem"));
    m.def("cuda_tile_keys", &cuda_tile_keys, py::arg("problem"));
}

}  // namespace attncap
