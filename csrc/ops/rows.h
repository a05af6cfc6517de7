// What do the row-movement ops accept? Checks shared by every backend.
#pragma once

#include "ops/checks.h"

namespace magi {

struct GatherCall {
    Tensor x, ranges, out;  // x and out contiguous
    int64_t row_elements;
};
GatherCall check_gather(const Tensor& x, const Tensor& ranges, int64_t total);

struct ScatterCall {
    Tensor y, ranges, out;
    int64_t row_elements;
    bool mean;
};
ScatterCall check_scatter(const Tensor& y, const Tensor& ranges, int64_t rows, const std::string& op);

struct MergeCall {
    Tensor out_a, lse_a, out_b, lse_b, out, lse;
};
MergeCall check_merge(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b);

}  // namespace magi
