// The kernel for AVX2 with FMA and F16C; compiled with those flags by setup.py.
#if defined(__AVX2__) && defined(__FMA__)
#define ATTNCAP_ISA avx2
#define ATTNCAP_AVX2
#include "cpu/run.h"

namespace attncap {
ATTNCAP_DEFINE_ENTRIES(avx2)
}  // namespace attncap
#endif
