// What do host launchers hand to device code? Plain structs, passed by value as the one parameter of each kernel.
#pragma once

#include "band.h"
#include "tiles.cuh"

namespace magi {

struct alignas(64) TensorMap {  // encoded by the driver; opaque
    char bytes[128];
};

// A shape of the forward's work, known to both sides: a tile of 64 rows for each consumer against steps of keys,
// streamed through a ring. Registers (scores and outputs) and 227 KB of shared memory bound it.
struct ForwardShape {
    int head_dim, v_dim, consumers, keys, stages;
    MAGI_HD constexpr int rows() const { return 64 * consumers; }
    MAGI_HD constexpr unsigned smem() const {  // q, k, v; barriers, steps, alignment
        return 2 * (rows() * head_dim + stages * keys * (head_dim + v_dim)) + 2560;
    }
};
constexpr ForwardShape kForwardShapes[] = {
    {64, 64, 3, 128, 6},   {64, 64, 2, 128, 3},   {128, 128, 2, 128, 3},
    {192, 128, 2, 128, 2}, {192, 192, 2, 112, 2}, {256, 256, 2, 80, 2},
};
// Smaller heads take the first one that holds them, padded with zeros.
MAGI_HD constexpr ForwardShape forward_shape(int head_dim, int v_dim, int most_rows = 192) {
    int i = 0;
    while (kForwardShapes[i].head_dim < head_dim || kForwardShapes[i].v_dim < v_dim ||
           kForwardShapes[i].rows() > most_rows)
        ++i;
    return kForwardShapes[i];
}

constexpr float kForwardSlack = 8;  // log2 units that a score may exceed the maximum in use

// ffa_fwd.cu. Tensor maps are [rows, heads, dim]; strides in elements.
struct ForwardArgs {
    TensorMap q, k, v;
    TileTable table;      // tile_rows and step as compiled into the variant
    const Slice* slices;  // for tiles that overflowed the table's pool
    int num_slices;
    int num_q, num_k, num_heads, heads_per_kv, v_dim;
    int section_heads;  // heads worked on together, so that their keys and values stay in L2
    int last_section;   // of sections of so many heads; takes all heads that are left
    void* out;
    long long out_row_stride, out_head_stride;
    int out_is_float;
    float* lse;         // [num_q, num_heads]
    float* max_logits;  // [num_heads] or null; variants with a transform only
    const float* sink;  // [num_sinks, num_heads]
    int num_sinks;
    const float* out_prev;  // [num_q, num_heads, v_dim] or null
    const float* lse_prev;
    float scale_log2;  // softmax_scale * log2(e); variants with a transform use the next two instead
    float scale, softcap;
    float slack;    // kForwardSlack in units of the raw scores
    unsigned ones;  // two elements of 1, unknown to the compiler
};

// rows.cu: memory-bound row movement. Ranges are [num_ranges, 2] begin, end.
struct alignas(8) RowRange {
    int begin, end;
};
enum ElementType { kElementF16, kElementBF16, kElementF32 };

struct GatherArgs {
    const char* src;
    char* dst;
    const RowRange* ranges;
    // [num_ranges + 1] running sum of their lengths; null: at most kFewRanges of less than 2^31 rows, and each block
    // sums for itself (gather16 and the scatters of whole vectors only)
    const long long* first;
    int num_ranges;
    long long total;  // rows of dst
    long long row_bytes;
};
struct ScanArgs {
    const RowRange* ranges;
    long long* first;
    int num_ranges;
};
struct ScatterArgs {
    const void* src;
    void* dst;
    const RowRange* ranges;
    const long long* first;  // as above
    long long* scratch;      // [num_ranges + 1], for a block whose list does not hold its ranges
    int num_ranges;
    long long num_rows, row_elements;
    int type, mean;  // type: ElementType
};
struct MergeArgs {
    const void *out_a, *out_b;
    const float *lse_a, *lse_b;
    void* out;
    float* lse;
    long long num_rows;  // tokens * heads
    int dim, type_a, type_b;
};
struct DeltaArgs {
    const void *dout, *out;
    const float* dlse;
    float* delta;
    long long dout_row_stride, dout_head_stride, out_row_stride, out_head_stride;
    long long num_rows;  // tokens * heads
    int num_heads, dim, type;
};
struct BandArgs {
    const RowRange *q_ranges, *k_ranges;
    const int* types;
    Slice* slices;
    int num_slices;
};
constexpr int kFewRanges = 4096;
// Kernels that move rows by bulk copies: one block a multiprocessor, every warp with a ring of stages of its own;
// beside these barriers, and ranges or a list of them.
constexpr int kGatherWarps = 12, kGatherStages = 3, kScatterWarps = 16, kScatterStages = 3;
constexpr int kHits = 1024;  // ranges that touch a block's rows and are listed
constexpr unsigned kRowStageBytes = 4096;
constexpr unsigned kGatherSmem = kGatherWarps * kGatherStages * (kRowStageBytes + 8) + 8 * kFewRanges + 4096;
constexpr unsigned kScatterSmem = kScatterWarps * kScatterStages * (kRowStageBytes + 24) + 16 * kHits + 2048;
constexpr int kMergeEights = 1024;  // of a block of merge8

}  // namespace magi
