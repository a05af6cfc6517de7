// What does a kernel get? Plain structs of pointers, sizes and strides (strides in elements); no torch type below the
// border.
#pragma once

#include <cstdint>

#include "band.h"

namespace magi {

enum class Dtype { kF16, kBF16, kF32, kF64 };

// [rows, heads, dim] with a contiguous last dimension.
struct Heads {
    void* data = nullptr;
    int64_t row_stride = 0, head_stride = 0;
};

// q [num_q, num_q_heads, head_dim], k [num_k, num_kv_heads, head_dim], v [num_k, num_kv_heads, v_dim].
struct AttentionShape {
    int num_q, num_k, num_q_heads, num_kv_heads, head_dim, v_dim;
};

// Statistics and accumulators (lse, delta, sink, previous partials) are contiguous, fp64 where q is fp64 and fp32
// otherwise.
struct ForwardParams {
    AttentionShape shape;
    Dtype dtype, out_dtype;
    Heads q, k, v, out;
    const Slice* slices;  // [num_slices]
    int num_slices;
    const void* sink;  // [num_sinks, num_q_heads] natural-log logits
    int num_sinks;
    const void* out_prev;  // [num_q, num_q_heads, v_dim], null without a previous partial
    const void* lse_prev;  // [num_q, num_q_heads]
    void* lse;             // [num_q, num_q_heads] natural log
    double softmax_scale, softcap;
    int sm_margin;
    void* max_logits;  // [num_q_heads], -inf before; null where not asked for
};

struct BackwardParams {
    AttentionShape shape;
    Dtype dtype, grad_dtype;
    Heads q, k, v, dout;
    Heads dq, dk, dv;
    const Slice* slices;
    int num_slices;
    const void* lse;      // [num_q, num_q_heads]
    const void* delta;    // [num_q, num_q_heads] rowsum(dout * out) - dlse, or null: then CUDA takes it from these
    Heads out;            // [num_q, num_q_heads, v_dim]
    const void* dlse;     // [num_q, num_q_heads] or null
    const void* dq_prev;  // [num_q, num_q_heads, head_dim] in grad_dtype, null where nothing is added
    double softmax_scale, softcap;
    bool deterministic;
    int sm_margin;
};

}  // namespace magi
