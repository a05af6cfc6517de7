// What does the CUDA backend offer? Launches on plain structs and pointers, queued on torch's current stream of the
// device.
#pragma once

#include <cstddef>

#include "kernels/args.cuh"
#include "params.h"

namespace magi::cuda {

// Throws unless the attention kernels can run it: bf16 or fp16, head_dim and v_dim multiples of 8 up to 256.
void check_support(Dtype dtype, const AttentionShape& shape);

// q, k, v as heads_map takes them.
size_t forward_workspace(const ForwardParams& params);
void ffa_forward(const ForwardParams& params, void* workspace, int device);

void ffa_delta(Dtype dtype, int num_rows, int num_heads, int dim, const Heads& dout, const Heads& out,
               const float* dlse, float* delta, int device);

// Bytes of scratch for num_ranges ranges.
size_t ranges_workspace(int64_t num_ranges);
void range_gather(const void* src, void* dst, int64_t row_bytes, int64_t total, const RowRange* ranges,
                  int64_t num_ranges, void* workspace, int device);
// src has `total` rows, dst num_rows.
void range_scatter_reduce(Dtype dtype, const void* src, void* dst, int64_t total, int64_t num_rows,
                          int64_t row_elements, const RowRange* ranges, int64_t num_ranges, bool mean, void* workspace,
                          int device);
void merge_partials(Dtype dtype_a, const void* out_a, const float* lse_a, Dtype dtype_b, const void* out_b,
                    const float* lse_b, void* out, float* lse, int64_t num_rows, int dim, int device);
void band_slices(const RowRange* q_ranges, const RowRange* k_ranges, const int* types, Slice* slices, int num_slices,
                 int device);

}  // namespace magi::cuda
