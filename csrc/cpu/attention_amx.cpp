// The kernel for AVX-512 with products of bfloat16 pairs on matrix registers; compiled with those flags by setup.py.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#define ATTNCAP_ISA amx
#define ATTNCAP_AVX512
#define ATTNCAP_BF16
#define ATTNCAP_AMX
#include "cpu/run.h"

namespace attncap {
ATTNCAP_DEFINE_ENTRIES(amx)
}  // namespace attncap
#endif
