// Which of a parallel region's threads this is; 0 without OpenMP.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace attncap {
namespace ATTNCAP_ISA {

inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace ATTNCAP_ISA
}  // namespace attncap
