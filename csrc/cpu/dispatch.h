// The CPU kernels' entries: each picks the widest instruction set this processor has, or the one named by `isa`.
#pragma once

#include <vector>

#include "problem.h"

namespace attncap {

// Runs one call.
void attention(const Problem& problem, const char* isa);

// The gradients of a call from the outputs it had, which `problem` holds; the meaning is attncap/gradients.py's.
void backward(const Problem& problem, const Upstream& upstream, const Gradients& gradients, const char* isa);

// Billions of multiplications and additions a second of one thread, in registers alone.
double fma_rate(double seconds, const char* isa);

// Names of the instruction sets that this build and this processor both have, widest first.
std::vector<const char*> instruction_sets();

}  // namespace attncap
