// What the Hopper forward is compiled for: each forward_*.cu has one type of numbers and one head dim.
#pragma once

#include "cuda/forward_params.h"

namespace attncap {

// Runs the kernel of a level, or with a softcap the one that has everything.
template <typename T, int DIM>
void run_forward(Level level, const ForwardParams& params, int blocks, device::Stream stream);

}  // namespace attncap
