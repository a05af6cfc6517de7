// Launches the attention backward: the transposed tile table, statistics and zeros beside it, the persistent kernel.
#include "cuda/ffa_bwd.h"

#include <algorithm>

#include "cuda/launcher.h"
#include "kernels/ffa_bwd.cuh"

namespace magi::cuda {
namespace {

bool is_wide(const AttentionShape& s) { return std::max(s.head_dim, s.v_dim) > 128; }
const BackwardWideShape& wide_shape(const AttentionShape& s) {
    return kBackwardWideShapes[backward_wide_shape(s.head_dim, s.v_dim)];
}
int padded_dim(const AttentionShape& s) {
    return is_wide(s) ? wide_shape(s).head_dim : std::max(s.head_dim, s.v_dim) <= 64 ? 64 : 128;
}
int tile_keys(const AttentionShape& s) { return is_wide(s) ? wide_shape(s).keys : kBackwardKeys; }

// Tall visits pay where walks are long: measured, from slices of this many rows on.
bool tall_visits(const BackwardParams& p) {
    const int long_slice = padded_dim(p.shape) == 64 ? 512 : 4096;
    return !is_wide(p.shape) && p.softcap == 0 && p.num_slices > 0 && p.shape.num_q / p.num_slices >= long_slice;
}
// Unless bands make them short, which the table then says. (At head_dim 64 they are worth it that early.)
bool table_decides(const BackwardParams& p) {
    return tall_visits(p) && padded_dim(p.shape) == 128 && p.shape.num_k > 0;
}

std::string variant(const BackwardParams& p, int rows) {
    const AttentionShape& s = p.shape;
    return "ffa_bwd_d" + std::to_string(padded_dim(s)) +
           (is_wide(s) ? "_v" + std::to_string(wide_shape(s).v_dim) : "") +
           (p.dtype == Dtype::kBF16 ? "_bf16" : "_f16") + (p.softcap > 0 ? "_softcap" : "") +
           (p.deterministic ? "_ordered" : "") + (rows != backward_rows(padded_dim(s), false) ? "_tall" : "");
}

// How the work is handed out: tiles by sections of heads, dq finished `lag` work items later, its sums in a ring.
struct Schedule {
    int rows, blocks, num_tiles, waves, wave_tiles, lag, ring_heads;
    int num_blocks;  // of rows that ordered visits take turns on
    Sections sections;
    Shares shares;
    bool finishes;
};
Schedule schedule(const BackwardParams& p, int device, bool tall) {
    const AttentionShape& s = p.shape;
    const int64_t group = s.num_q_heads / std::max(1, s.num_kv_heads);
    Schedule x{};
    x.rows = is_wide(s) ? kBackwardWideRows : backward_rows(padded_dim(s), tall);
    x.num_blocks = ceil_div(backward_rows_pad(s.num_q), x.rows);
    x.finishes = !is_wide(s) && backward_finishes(x.rows);
    x.num_tiles = ceil_div(s.num_k, tile_keys(s));
    const int64_t shares = x.finishes ? (int64_t)ceil_div(s.num_q, kFinishRows) * s.num_q_heads : 0;
    const int64_t work = std::max<int64_t>((int64_t)x.num_tiles * s.num_kv_heads, shares);
    const int sms = std::max(1, num_sms(device) - p.sm_margin);
    x.blocks = (int)std::min<int64_t>(work, sms);
    // Heads whose q, dout and dq rows fit half of the L2 cache together run side by side.
    constexpr int64_t kCacheBytes = 28 << 20;
    const int64_t head_bytes = std::max<int64_t>(1, 8LL * s.num_q * group * padded_dim(s));
    // Ordered visits wait least with many heads side by side, but tiles of one head then drift apart, and their rows
    // leave L2. How much work is side by side, in tiles of query heads: walks of one long slice drift furthest, but
    // those of wide heads take so long for their rows that chains count for more.
    const int64_t heads = std::max(1, s.num_kv_heads);
    // Tiles of a short document all begin at its end, where each waits for those before it: heads between two of them
    // give those time.
    const int64_t most_heads = !is_wide(s) && p.num_slices > 1 && s.num_q / p.num_slices <= 512 ? 32 : 16;
    const int64_t ordered_work = p.num_slices != 1 ? 4096 : is_wide(s) ? 2048 : 512;
    const int64_t head_work = std::max<int64_t>(1, x.num_tiles * group);
    const int64_t ordered_heads = std::min(most_heads, (ordered_work + head_work - 1) / head_work);
    const int section_heads =
        (int)std::clamp<int64_t>(p.deterministic ? ordered_heads : kCacheBytes / head_bytes, 1, heads);
    // Tiles of one head that run side by side: see plan_visits.
    x.waves = section_heads > 1 ? 1 : std::max(1, (x.num_tiles + sms / 2) / sms);
    x.wave_tiles = x.waves > 1 ? sms : x.num_tiles;
    const FinishRing ring = finish_ring(x.num_tiles, section_heads, (int)heads, x.blocks);
    x.lag = ring.lag;
    x.ring_heads = x.finishes ? ring.heads : (int)heads;
    // Where walks differ, as under a causal mask, heads with fewer tiles than blocks leave some idle at the end; a last
    // section of a few rounds keeps them busy, but what is finished here must fit its lag. Heads that fill the blocks
    // share rows better one by one, and documents are short anyway.
    const int64_t rounds = (int64_t)x.num_tiles * section_heads + 4LL * x.blocks;
    const bool few = !is_wide(s) && p.num_slices < 4 && 4LL * x.num_tiles <= 3LL * x.blocks;
    // Fewer heads than a section would wait for each other longer than the others do.
    const int64_t section_and_rest = is_wide(s) && p.deterministic ? (2LL * section_heads - 1) * x.num_tiles : 0;
    const int64_t last_section = few && x.finishes ? x.lag : few ? rounds : section_and_rest;
    x.sections = sections_of(x.num_tiles, section_heads, (int)heads, last_section);
    const int tiles = x.num_tiles * s.num_kv_heads;
    x.shares = {tiles, 0};
    if (!is_wide(s) && !p.deterministic && p.softcap == 0 && p.num_slices < 4 && tiles > 0)
        x.shares = shares_of(tiles, sms, ceil_div(s.num_q, x.rows) * group, !x.finishes);
    if (x.shares.count > 0 && x.shares.first == 0) x.sections.last_head = 0;  // one section: by tiles, then heads
    x.blocks = std::max(x.blocks, x.shares.count);
    return x;
}

// The workspace, in order. What must be zero comes first and is one fill, shorter if visits turn out not to be tall.
struct Workspace {
    size_t added, finished, turn, parts, dq_sum, zeroed, zeroed_tall, lse, delta, table, order, partial, total;
};
// x: of the way that is there in any case.
Workspace layout(const BackwardParams& p, const Schedule& x, const Schedule& tall, bool both) {
    const AttentionShape& s = p.shape;
    const size_t rows = backward_rows_pad(s.num_q), heads = s.num_q_heads;
    const size_t slot = s.num_kv_heads ? heads / s.num_kv_heads * rows * padded_dim(s) * sizeof(float) : 0;
    Workspace w{};
    size_t at = 0;
    const auto take = [&](size_t bytes) {
        const size_t from = at;
        at += (bytes + 255) / 256 * 256;
        return from;
    };
    w.added = take(s.num_kv_heads * sizeof(int));
    w.finished = take(s.num_kv_heads * sizeof(int));
    w.turn = take(p.deterministic ? heads * 2 * x.num_blocks * sizeof(int) : 0);
    const auto slots_of = [&](const Schedule& y) {
        return std::min(x.num_tiles * s.num_kv_heads - y.shares.first, y.shares.count);
    };
    const size_t slots = std::max(slots_of(x), both ? slots_of(tall) : 0);
    w.parts = take(slots * 8 * sizeof(int));
    w.dq_sum = take(slot * x.ring_heads);
    w.zeroed = at;
    take(both ? slot * std::max(0, tall.ring_heads - x.ring_heads) : 0);
    w.zeroed_tall = at;
    w.lse = take(heads * rows * sizeof(float));
    w.delta = take(heads * rows * sizeof(float));
    w.table = take(table_bytes(s.num_k, tile_keys(s), p.num_slices));
    w.order = take(p.deterministic ? (size_t)x.num_tiles * x.num_blocks * sizeof(int) : 0);
    w.partial = take(slots * kBackwardKeys * 2 * padded_dim(s) * sizeof(float));
    w.total = at;
    return w;
}

// What is launched: one way, or both where the table decides.
struct Ways {
    Schedule first, tall;
    bool both;
    Workspace at;
};
Ways ways(const BackwardParams& p, int device) {
    Ways x{};
    x.both = table_decides(p);
    x.first = schedule(p, device, tall_visits(p) && !x.both);
    x.tall = schedule(p, device, true);
    x.at = layout(p, x.first, x.tall, x.both);
    return x;
}

}  // namespace

size_t backward_workspace(const BackwardParams& p, int device) { return ways(p, device).at.total; }

void ffa_backward(const BackwardParams& p, void* workspace, int device) {
    const AttentionShape& shape = p.shape;
    if (shape.num_q_heads == 0 || shape.num_q + shape.num_k == 0) return;
    void* stream = current_stream(device);
    const Ways plan = ways(p, device);
    const Workspace& at = plan.at;
    char* base = static_cast<char*>(workspace);
    const auto ints = [&](size_t offset) { return reinterpret_cast<int*>(base + offset); };
    const auto floats = [&](size_t offset) { return reinterpret_cast<float*>(base + offset); };
    const int dim = padded_dim(shape), rows_pad = backward_rows_pad(shape.num_q);
    const TileTable table = build_tiles(base + at.table, p.slices, p.num_slices, shape.num_q, shape.num_k,
                                        tile_keys(shape), plan.first.rows, true, device, stream);
    const Tile* const middle = plan.both ? table.tiles + table.num_tiles / 2 : nullptr;
    int* const order = p.deterministic ? ints(at.order) : nullptr;
    const BackwardPrepareArgs prepare{static_cast<const float*>(p.lse),
                                      static_cast<const float*>(p.delta),
                                      p.dout.data,
                                      p.out.data,
                                      static_cast<const float*>(p.dlse),
                                      p.dout.row_stride,
                                      p.dout.head_stride,
                                      p.out.row_stride,
                                      p.out.head_stride,
                                      shape.v_dim,
                                      p.dtype == Dtype::kBF16 ? kElementBF16 : kElementF16,
                                      floats(at.lse),
                                      floats(at.delta),
                                      shape.num_q,
                                      shape.num_q_heads,
                                      rows_pad,
                                      middle,
                                      floats(0),
                                      (long long)(at.zeroed / sizeof(float)),
                                      (long long)(at.zeroed_tall / sizeof(float)),
                                      table,
                                      p.slices,
                                      p.num_slices,
                                      shape.num_k,
                                      plan.first.rows,
                                      order};
    // Either way of building the table lets the next kernel start once all before it has ended, no earlier.
    launch(kernel("ffa_bwd_rows", "backward_prepare", device, 0),
           {(unsigned)(rows_pad / kPrepareRows), (unsigned)ceil_div(shape.num_q_heads, kPrepareHeads)}, 256, 0, stream,
           prepare,
           /*overlap=*/true);

    BackwardArgs a{};
    a.table = table;
    if (shape.num_k > 0) {
        a.k = heads_map(p.dtype, p.k, shape.num_k, shape.num_kv_heads, shape.head_dim, tile_keys(shape));
        a.v = heads_map(p.dtype, p.v, shape.num_k, shape.num_kv_heads, shape.v_dim, tile_keys(shape));
    }
    a.grad_is_float = p.grad_dtype == Dtype::kF32;
    if (plan.first.finishes && shape.num_k > 0 && !a.grad_is_float) {  // tall and wide visits store by threads
        a.dk_map = heads_map(p.dtype, p.dk, shape.num_k, shape.num_kv_heads, shape.head_dim, 16);
        a.dv_map = heads_map(p.dtype, p.dv, shape.num_k, shape.num_kv_heads, shape.v_dim, 16);
    }
    a.slices = p.slices;
    a.num_slices = p.num_slices;
    a.num_q = shape.num_q;
    a.num_k = shape.num_k;
    a.num_heads = shape.num_q_heads;
    a.num_kv_heads = shape.num_kv_heads;
    a.heads_per_kv = shape.num_q_heads / shape.num_kv_heads;
    a.head_dim = shape.head_dim;
    a.v_dim = shape.v_dim;
    a.rows_pad = rows_pad;
    a.middle = middle;
    a.lse_log2 = floats(at.lse);
    a.delta = floats(at.delta);
    a.dq_sum = floats(at.dq_sum);
    a.dq = p.dq.data;
    a.dk = p.dk.data;
    a.dv = p.dv.data;
    a.dq_prev = p.dq_prev;
    a.dq_row_stride = p.dq.row_stride;
    a.dq_head_stride = p.dq.head_stride;
    a.dk_row_stride = p.dk.row_stride;
    a.dk_head_stride = p.dk.head_stride;
    a.dv_row_stride = p.dv.row_stride;
    a.dv_head_stride = p.dv.head_stride;
    a.scale = static_cast<float>(p.softmax_scale);
    a.scale_log2 = static_cast<float>(p.softmax_scale * 1.4426950408889634);
    a.softcap = static_cast<float>(p.softcap);
    a.row_blocks = ceil_div(shape.num_q, kFinishRows);
    a.share = ceil_div(a.row_blocks * a.heads_per_kv, std::max(1, table.num_tiles));
    a.added = ints(at.added);
    a.finished = ints(at.finished);
    a.turn = ints(at.turn);
    a.order = order;
    a.parts = ints(at.parts);
    a.partial = floats(at.partial);
    const auto launch_way = [&](const Schedule& x) {
        if (shape.num_q > 0) {
            a.q = heads_map(p.dtype, p.q, shape.num_q, shape.num_q_heads, shape.head_dim, x.rows);
            a.dout = heads_map(p.dtype, p.dout, shape.num_q, shape.num_q_heads, shape.v_dim, x.rows);
        }
        a.sections = x.sections;
        a.shares = x.shares;
        a.waves = x.waves;
        a.wave_tiles = x.wave_tiles;
        a.lag = x.lag;
        a.ring_heads = x.ring_heads;
        a.num_blocks = x.num_blocks;
        const unsigned smem = is_wide(shape) ? wide_shape(shape).smem() : backward_smem(dim, x.rows);
        launch(kernel(variant(p, x.rows), "ffa_bwd", device, smem), {(unsigned)x.blocks}, 384, smem, stream, a,
               /*overlap=*/true);
    };
    launch_way(plan.first);
    if (plan.both) launch_way(plan.tall);
    if (shape.num_q > 0 && !(plan.both ? plan.tall : plan.first).finishes) {
        BackwardFinishArgs f{};
        f.middle = plan.first.finishes ? middle : nullptr;
        f.dq = floats(at.dq_sum);
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
