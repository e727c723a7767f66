// The parts that Python modules of the kernels are put together from. Nothing here links torch: tensors arrive as
// pointers and strides.
#pragma once

#include <pybind11/pybind11.h>

namespace attncap {

void bind_problem(pybind11::module_& m);
void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace attncap
