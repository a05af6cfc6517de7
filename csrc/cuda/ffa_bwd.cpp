// Launches the attention backward: statistics and the transposed tile table, the persistent kernel, dq's conversion.
#include "cuda/ffa_bwd.h"

#include <algorithm>

#include "cuda/launcher.h"
#include "kernels/ffa_bwd.cuh"

namespace magi::cuda {
namespace {

int padded_dim(const AttentionShape& s) { return std::max(s.head_dim, s.v_dim) <= 64 ? 64 : 128; }

// Tall visits pay where walks are long: measured, from slices of this many rows on. (What a mask looks like inside is
// not known here.)
bool tall_visits(const BackwardParams& p) {
    const int long_slice = padded_dim(p.shape) == 64 ? 512 : 4096;
    return p.softcap == 0 && p.num_slices > 0 && p.shape.num_q / p.num_slices >= long_slice;
}

// Of rows that ordered visits take turns on.
int num_blocks(const BackwardParams& p) {
    return ceil_div(backward_rows_pad(p.shape.num_q), backward_rows(padded_dim(p.shape), tall_visits(p)));
}

// The workspace, in order. What must be zero comes first and is one fill.
struct Workspace {
    size_t dq, turn, zeroed, lse, delta, table, order, total;
};
Workspace layout(const BackwardParams& p) {
    const AttentionShape& s = p.shape;
    const size_t rows = backward_rows_pad(s.num_q), heads = s.num_q_heads, blocks = num_blocks(p);
    Workspace w{};
    size_t at = 0;
    const auto take = [&](size_t bytes) {
        const size_t from = at;
        at += (bytes + 255) / 256 * 256;
        return from;
    };
    w.dq = take(heads * rows * padded_dim(s) * sizeof(float));
    w.turn = take(p.deterministic ? heads * 2 * blocks * sizeof(int) : 0);
    w.zeroed = at;
    w.lse = take(heads * rows * sizeof(float));
    w.delta = take(heads * rows * sizeof(float));
    w.table = take(table_bytes(s.num_k, kBackwardKeys, p.num_slices));
    w.order = take(p.deterministic ? ceil_div(s.num_k, kBackwardKeys) * blocks * sizeof(int) : 0);
    w.total = at;
    return w;
}

}  // namespace

size_t backward_workspace(const BackwardParams& p) { return layout(p).total; }

void ffa_backward(const BackwardParams& p, void* workspace, int device) {
    const AttentionShape& shape = p.shape;
    void* stream = current_stream(device);
    const Workspace at = layout(p);
    char* base = static_cast<char*>(workspace);
    const int dim = padded_dim(shape), rows_pad = backward_rows_pad(shape.num_q);
    const std::string variant = "ffa_bwd_d" + std::to_string(dim) + (p.dtype == Dtype::kBF16 ? "_bf16" : "_f16") +
                                (p.softcap > 0 ? "_softcap" : "") + (p.deterministic ? "_ordered" : "") +
                                (tall_visits(p) ? "_tall" : "");
    const int rows = backward_rows(dim, tall_visits(p));
    const unsigned smem = backward_smem(dim, rows);
    void* backward = kernel(variant, "ffa_bwd", device, smem);
    float* const dq = reinterpret_cast<float*>(base + at.dq);

    if (shape.num_q > 0) zero(base, at.zeroed, stream);
    if (shape.num_k > 0) {
        BackwardArgs a{};
        a.table = build_tiles(base + at.table, p.slices, p.num_slices, shape.num_q, shape.num_k, kBackwardKeys, rows,
                              true, device, stream);
        a.lse_log2 = reinterpret_cast<float*>(base + at.lse);
        a.delta = reinterpret_cast<float*>(base + at.delta);
        a.rows_pad = rows_pad;
        if (shape.num_q > 0) {
            const BackwardStatsArgs stats{static_cast<const float*>(p.lse),
                                          static_cast<const float*>(p.delta),
                                          reinterpret_cast<float*>(base + at.lse),
                                          reinterpret_cast<float*>(base + at.delta),
                                          shape.num_q,
                                          shape.num_q_heads,
                                          rows_pad};
            launch(kernel("ffa_bwd_rows", "backward_stats", device, 0),
                   {(unsigned)ceil_div(rows_pad, 32), (unsigned)ceil_div(shape.num_q_heads, 32)}, 256, 0, stream,
                   stats);
            a.q = heads_map(p.dtype, p.q, shape.num_q, shape.num_q_heads, shape.head_dim, rows);
            a.dout = heads_map(p.dtype, p.dout, shape.num_q, shape.num_q_heads, shape.v_dim, rows);
        }
        a.k = heads_map(p.dtype, p.k, shape.num_k, shape.num_kv_heads, shape.head_dim, kBackwardKeys);
        a.v = heads_map(p.dtype, p.v, shape.num_k, shape.num_kv_heads, shape.v_dim, kBackwardKeys);
        a.slices = p.slices;
        a.num_slices = p.num_slices;
        a.num_q = shape.num_q;
        a.num_k = shape.num_k;
        a.num_kv_heads = shape.num_kv_heads;
        a.heads_per_kv = shape.num_q_heads / shape.num_kv_heads;
        a.head_dim = shape.head_dim;
        a.v_dim = shape.v_dim;
        // Heads whose q, dout and dq rows fit half of the L2 cache together run side by side.
        constexpr int64_t kCacheBytes = 28 << 20;
        const int64_t head_bytes = std::max<int64_t>(1, 8LL * shape.num_q * a.heads_per_kv * dim);
        // Ordered visits of one head follow each other closely, in time and in rows: more heads at once wait less.
        constexpr int kOrderedHeads = 16;
        a.section_heads =
            (int)std::clamp<int64_t>(p.deterministic ? kOrderedHeads : kCacheBytes / head_bytes, 1, shape.num_kv_heads);
        // Tiles of one head that run side by side: see plan_visits.
        const int sms = std::max(1, num_sms(device) - p.sm_margin);
        a.waves = a.section_heads > 1 ? 1 : std::max(1, (a.table.num_tiles + sms / 2) / sms);
        a.wave_tiles = a.waves > 1 ? sms : a.table.num_tiles;
        a.dq = dq;
        a.dk = p.dk.data;
        a.dv = p.dv.data;
        a.dk_row_stride = p.dk.row_stride;
        a.dk_head_stride = p.dk.head_stride;
        a.dv_row_stride = p.dv.row_stride;
        a.dv_head_stride = p.dv.head_stride;
        a.grad_is_float = p.grad_dtype == Dtype::kF32;
        a.scale = static_cast<float>(p.softmax_scale);
        a.scale_log2 = static_cast<float>(p.softmax_scale * 1.4426950408889634);
        a.softcap = static_cast<float>(p.softcap);
        if (p.deterministic) {
            a.turn = reinterpret_cast<int*>(base + at.turn);
            a.order = reinterpret_cast<int*>(base + at.order);
            a.num_blocks = num_blocks(p);
            launch(kernel("ffa_bwd_rows", "backward_order", device, 0), {(unsigned)ceil_div(a.num_blocks, 64)}, 64, 0,
                   stream,
                   BackwardOrderArgs{a.table, p.slices, p.num_slices, shape.num_q, shape.num_k, a.num_blocks, rows,
                                     reinterpret_cast<int*>(base + at.order)});
        }
        const int64_t work = (int64_t)a.table.num_tiles * a.num_kv_heads;
        const unsigned blocks = (unsigned)std::min<int64_t>(work, sms);
        launch(backward, {blocks}, 384, smem, stream, a);
    }
    if (shape.num_q > 0) {
        BackwardFinishArgs f{};
        f.dq = dq;
        f.dq_prev = p.dq_prev;
        f.out = p.dq.data;
        f.out_row_stride = p.dq.row_stride;
        f.out_head_stride = p.dq.head_stride;
        f.num_q = shape.num_q;
        f.num_heads = shape.num_q_heads;
        f.head_dim = shape.head_dim;
        f.padded_dim = dim;
        f.rows_pad = rows_pad;
        f.type = p.dtype == Dtype::kBF16 ? kElementBF16 : kElementF16;
        f.is_float = p.grad_dtype == Dtype::kF32;
        f.scale = static_cast<float>(p.softmax_scale);
        const int64_t items = (int64_t)ceil_div(shape.num_q, 4) * 2 * (dim / 16);
        launch(kernel("ffa_bwd_rows", "backward_finish", device, 0),
               {(unsigned)((items + 255) / 256), (unsigned)shape.num_q_heads}, 256, 0, stream, f);
    }
}

}  // namespace magi::cuda
