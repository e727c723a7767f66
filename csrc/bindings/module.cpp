// attncap._C: descriptions of a call, and the kernels that run it. setup.py says whether CUDA is among them.
#include "bindings/bindings.h"

#ifndef ATTNCAP_CUDA_HASH
#define ATTNCAP_CUDA_HASH ""
#endif
#ifndef ATTNCAP_CUDA_LACKS
#define ATTNCAP_CUDA_LACKS ""
#endif

PYBIND11_MODULE(_C, m) {
    m.doc() = "attncap's compiled kernels; called by attncap.cpu and attncap.cuda.";
    m.attr("source_hash") = ATTNCAP_SOURCE_HASH;
    m.attr("cuda_hash") = ATTNCAP_CUDA_HASH;
    m.attr("cuda_lacks") = ATTNCAP_CUDA_LACKS;
    attncap::bind_problem(m);
    attncap::bind_cpu(m);
#ifdef ATTNCAP_CUDA
    attncap::bind_cuda(m);
#endif
}
