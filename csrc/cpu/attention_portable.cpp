// The kernel for any processor: 16-byte vectors of the compiler (SSE2, NEON, ...).
#define ATTNCAP_ISA portable
#include "cpu/run.h"

namespace attncap {
ATTNCAP_DEFINE_ENTRIES(portable)
}  // namespace attncap
