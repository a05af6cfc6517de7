// Launches the attention forward: the tile table, then one persistent kernel.
#include <algorithm>
#include <stdexcept>

#include "cuda/cuda.h"
#include "cuda/launcher.h"

namespace magi::cuda {

void check_support(Dtype dtype, const AttentionShape& shape) {
    constexpr int kMaxDim = 256;
    const auto fail = [](const std::string& what) { throw std::runtime_error("magi_attention: " + what); };
    if (dtype != Dtype::kBF16 && dtype != Dtype::kF16)
        fail("q must be bfloat16 or float16 on CUDA, got " + std::string(dtype == Dtype::kF32 ? "float32" : "float64") +
             ": cast q, k and v (q.bfloat16(), or torch.autocast around what makes them), or move them to the CPU");
    for (const auto& [name, dim] : {std::pair{"q", shape.head_dim}, {"v", shape.v_dim}})
        if (dim > kMaxDim || dim % 8 != 0)
            fail(std::string(name) + " must have a head dimension that is a multiple of 8 and at most " +
                 std::to_string(kMaxDim) + " on CUDA, got " + std::to_string(dim));
}

// Slices of few rows fill tiles of 128 rows better than those of 192.
static ForwardShape shape_of(const ForwardParams& p) {
    const bool few_rows = p.num_slices > 1 && p.shape.num_q / p.num_slices < 1024;
    return forward_shape(p.shape.head_dim, p.shape.v_dim, few_rows ? 128 : 192);
}

static bool cut_tiles(const ForwardParams& p) { return worth_cutting(p.shape.num_q, shape_of(p).rows(), p.num_slices); }

size_t forward_workspace(const ForwardParams& p) {
    return table_bytes(p.shape.num_q, shape_of(p).rows(), p.num_slices, cut_tiles(p));
}

// Key/value heads worked on together, and the number of the section that takes all that are left.
// As many as the L2 cache holds, so that tiles of one head find each other's keys there. Within a section heavy tiles
// come first, so the keys of a short document are read again when light ones come: one head at a time. The last section
// ends with light tiles on every multiprocessor, for which it needs more of them where they differ more.
struct Sections {
    int heads, last;
};
static Sections sections_of(const ForwardParams& p, int num_tiles, int num_sms) {
    const AttentionShape& shape = p.shape;
    const bool documents = p.num_slices > 1, short_ones = documents && shape.num_q / p.num_slices <= 1024;
    const int64_t head_bytes = std::max<int64_t>(1, 2LL * shape.num_k * (shape.head_dim + shape.v_dim));
    const int64_t head_tiles = (int64_t)num_tiles * (shape.num_q_heads / shape.num_kv_heads);
    const int64_t cached = short_ones ? 1 : std::max<int64_t>(1, (32 << 20) / head_bytes);
    const int64_t heads = std::min<int64_t>(cached, shape.num_kv_heads);
    const int64_t last_tiles = (documents && !short_ones ? 6 : 3) * num_sms;
    const int64_t last_heads = (last_tiles + head_tiles - 1) / head_tiles;
    return {(int)heads, (int)std::max<int64_t>(0, (shape.num_kv_heads - last_heads) / heads)};
}

void ffa_forward(const ForwardParams& p, void* workspace, int device) {
    const AttentionShape& shape = p.shape;
    if (shape.num_q == 0) return;
    void* stream = current_stream(device);
    const ForwardShape tile = shape_of(p);
    const bool transform = p.softcap > 0 || !(p.softmax_scale > 0) || p.max_logits;
    const std::string variant = "ffa_fwd_d" + std::to_string(tile.head_dim) + "_v" + std::to_string(tile.v_dim) + "_r" +
                                std::to_string(tile.rows()) + (p.dtype == Dtype::kBF16 ? "_bf16" : "_f16") +
                                (transform ? "_transform" : "");
    void* forward = kernel(variant, "ffa_fwd", device, tile.smem());

    ForwardArgs a{};
    a.table = build_tiles(workspace, p.slices, p.num_slices, shape.num_q, shape.num_k, tile.rows(), tile.keys, false,
                          device, stream, cut_tiles(p));
    a.q = heads_map(p.dtype, p.q, shape.num_q, shape.num_q_heads, shape.head_dim, tile.rows() / tile.consumers);
    if (shape.num_k > 0) {  // otherwise nothing is loaded
        a.k = heads_map(p.dtype, p.k, shape.num_k, shape.num_kv_heads, shape.head_dim, tile.keys);
        a.v = heads_map(p.dtype, p.v, shape.num_k, shape.num_kv_heads, shape.v_dim, tile.keys);
    }
    a.slices = p.slices;
    a.num_slices = p.num_slices;
    a.num_q = shape.num_q;
    a.num_k = shape.num_k;
    a.num_heads = shape.num_q_heads;
    a.heads_per_kv = shape.num_q_heads / shape.num_kv_heads;
    a.v_dim = shape.v_dim;
    const Sections sections = sections_of(p, a.table.num_tiles, num_sms(device));
    a.section_heads = sections.heads * a.heads_per_kv;
    a.last_section = sections.last;
    a.out = p.out.data;
    a.out_row_stride = p.out.row_stride;
    a.out_head_stride = p.out.head_stride;
    a.out_is_float = p.out_dtype == Dtype::kF32;
    a.max_logits = static_cast<float*>(p.max_logits);
    a.lse = static_cast<float*>(p.lse);
    a.sink = static_cast<const float*>(p.sink);
    a.num_sinks = p.num_sinks;
    a.out_prev = static_cast<const float*>(p.out_prev);
    a.lse_prev = static_cast<const float*>(p.lse_prev);
    a.scale_log2 = static_cast<float>(p.softmax_scale * 1.4426950408889634);
    a.slack = kForwardSlack / a.scale_log2;
    a.scale = static_cast<float>(p.softmax_scale);
    a.softcap = static_cast<float>(p.softcap);
    a.ones = p.dtype == Dtype::kBF16 ? 0x3f803f80u : 0x3c003c00u;
    const int64_t work = (int64_t)a.table.num_tiles * a.num_heads;
    const unsigned blocks = (unsigned)std::min<int64_t>(work, std::max(1, num_sms(device) - p.sm_margin));
    launch(forward, {blocks}, 128 * (1 + tile.consumers), tile.smem(), stream, a, /*overlap=*/true);
}

}  // namespace magi::cuda
