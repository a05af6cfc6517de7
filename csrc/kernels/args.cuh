// What do host launchers hand to device code? Plain structs, passed by value as the one parameter of each kernel.
#pragma once

#include "band.h"
#include "tiles.cuh"

namespace magi {

struct alignas(64) TensorMap {  // encoded by the driver; opaque
    char bytes[128];
};

// ffa_fwd.cu. Tensor maps are [rows, heads, dim]; strides in elements.
struct ForwardArgs {
    TensorMap q, k, v;
    TileTable table;       // tile_rows and step as compiled into the variant
    const Slice* slices;   // for tiles that overflowed the table's pool
    int num_slices;
    int num_q, num_k, num_heads, heads_per_kv, v_dim;
    int section_heads;     // heads worked on together, so that their keys and values stay in L2
    void* out;
    long long out_row_stride, out_head_stride;
    int out_is_float;
    float* lse;            // [num_q, num_heads]
    const float* sink;     // [num_sinks, num_heads]
    int num_sinks;
    const float* out_prev; // [num_q, num_heads, v_dim] or null
    const float* lse_prev;
    float scale_log2;      // softmax_scale * log2(e); variants with a transform use the next two instead
    float scale, softcap;
};

}  // namespace magi
