// What do the CUDA ops do to tensors before a launch?
#pragma once

#include <torch/csrc/stable/ops.h>

#include "cuda/launcher.h"
#include "ops/checks.h"

namespace magi {

inline Tensor scratch(const Tensor& like, size_t bytes) { return make_empty(like, {(int64_t)bytes}, ScalarType::Byte); }

// A view that TMA can read, copied only where alignment or strides forbid it.
inline Tensor mappable(const Tensor& t) {
    if (t.dim() != 3 || t.numel() == 0) return t;
    return t.stride(2) == 1 && cuda::can_map(heads_of(t)) ? t : torch::stable::clone(torch::stable::contiguous(t));
}

}  // namespace magi
