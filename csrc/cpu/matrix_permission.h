// Whether this process may use the processor's matrix registers (AMX): the kernel saves them only for those that ask.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attncap {

// Asks the kernel, for all threads.
inline bool may_use_matrix_registers() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kBfloat = 1u << 22, kTiles = 1u << 24;   // of cpuid's leaf 7, edx
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // as in the kernel's asm/prctl.h, which may be older
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBfloat) == 0 || (d & kTiles) == 0) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace attncap
