// attncap._C: descriptions of a call, and the kernels that run it. setup.py defines what it says of its build.
#include "bindings/bindings.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "attncap's compiled kernels; called by attncap.cpu and attncap.cuda.";
    m.attr("source_hash") = ATTNCAP_SOURCE_HASH;
    attncap::bind_problem(m);
    attncap::bind_cpu(m);
#ifdef ATTNCAP_CUDA_COMPILER
    m.attr("cuda_compiler") = ATTNCAP_CUDA_COMPILER;
    m.attr("cuda_hash") = ATTNCAP_CUDA_HASH;
    m.attr("cuda_lacks") = "";
    attncap::bind_cuda(m);
#else
    m.attr("cuda_compiler") = "";
    m.attr("cuda_hash") = "";
    m.attr("cuda_lacks") = ATTNCAP_CUDA_LACKS;
#endif
}
