// What does the CPU backend offer? Kernels on plain structs and pointers.
#pragma once

#include "params.h"

namespace magi::cpu {

void ffa_forward(const ForwardParams& params);
void ffa_backward(const BackwardParams& params);
// delta[row, head] = sum_d dout * out - dlse; dlse may be null.
void ffa_delta(Dtype dtype, int num_rows, int num_heads, int dim, const Heads& dout, const Heads& out, const void* dlse,
               void* delta);

struct RowRange {
    int begin, end;
};

// dst = the rows of src in ranges, range after range. A row is row_bytes contiguous bytes.
void range_gather(const char* src, char* dst, int64_t row_bytes, const RowRange* ranges, int64_t num_ranges);

// dst[row] = sum (or mean) over the positions of src whose range covers row; 0 where none does. Accumulates in fp32
// (fp64 for fp64).
enum class Reduce { kSum, kMean };
void range_scatter_reduce(Dtype dtype, const void* src, void* dst, int64_t num_rows, int64_t row_elements,
                          const RowRange* ranges, int64_t num_ranges, Reduce op);

// (out, lse) = online-softmax merge of two partials [num_rows = tokens * heads, dim]; out in the dtype of out_a.
void merge_partials(Dtype dtype_a, const void* out_a, const void* lse_a, Dtype dtype_b, const void* out_b,
                    const void* lse_b, void* out, void* lse, int64_t num_rows, int dim);

}  // namespace magi::cpu
