// The attention backward on CUDA: what it takes, what scratch it needs, its launch.
#pragma once

#include <cstddef>

#include "params.h"

namespace magi::cuda {

// q, k, v, dout as heads_map takes them. The workspace is dominated by dq in fp32: 4 bytes for every element of q,
// padded to 64, 128, 192 or 256 columns, of as many heads as are worked on or finished at a time. Tiles in shares
// (ffa_bwd.cuh) add 1 KB a column for each, 17 MB at most on 132 multiprocessors.
size_t backward_workspace(const BackwardParams& params, int device);
void ffa_backward(const BackwardParams& params, void* workspace, int device);

}  // namespace magi::cuda
