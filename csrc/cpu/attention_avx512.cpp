// The kernel for AVX-512 (F, BW, DQ, VL); compiled with those flags by setup.py.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define ATTNCAP_ISA avx512
#define ATTNCAP_AVX512
#include "cpu/run.h"

namespace attncap {
ATTNCAP_DEFINE_ENTRIES(avx512)
}  // namespace attncap
#endif
