// What ffa_bwd.cu and ffa_bwd_wide.cu share: how a tile of keys becomes visits, and what a score gives. Included by
// them after their constants, Visit and Plan.
#pragma once

namespace magi {

__device__ __forceinline__ Slice slice_at(const BackwardArgs& a, int first, int i) {
    if (first < 0) return table_slice(a.slices[i], a.num_q, a.num_k, true);
    const int4* entry = reinterpret_cast<const int4*>(a.table.pool + first + i);
    const int4 x = __ldg(entry), y = __ldg(entry + 1);
    return {x.x, x.y, x.z, x.w, y.x, y.y};
}

constexpr int kUp = 1 << 30;  // Plan::top: a walk from the first row on

// Where the visits of a slice begin whose first row is this one.
__device__ __forceinline__ int first_row(int row) { return row - static_cast<u32>(row) % kRowAlign; }

// The tile of the n-th work item, and which way it is walked.
__device__ __forceinline__ void find_tile(const BackwardArgs& a, Plan& plan, int n) {
    {
        const WorkItem work = work_item(n, a.table.num_tiles, a.sections, a.num_kv_heads);
        plan.index = work.tile;
        plan.kv_head = work.kv_head;
    }
    // Tiles that begin together come down from the last row. Under a causal mask they end one after the
    // other, each at its first row; the next ones go up from there and meet those that began before them,
    // so that all blocks visit the same rows at the same time, while these are in L2. Waves of tiles, or
    // heads where all tiles are one wave, therefore take turns. Ordered visits all go down, from the last slice
    // to the first: where slices come by ascending rows, as masks make them, tiles of a document then come to
    // a block of rows in the order of their keys. (Any walk is right, and waits only for tiles before; but from
    // the first slice on, each tile of a block-causal document waits for the whole walk of the one before.)
    {
        int wave = plan.kv_head * a.waves;
        for (int i = plan.index; i >= a.wave_tiles; i -= a.wave_tiles) ++wave;
        plan.down = DETERMINISTIC || wave % 2 == 0;
    }
    {
        const int4 tile =
            __ldg(reinterpret_cast<const int4*>(DETERMINISTIC ? a.table.unsorted : a.table.tiles) + plan.index);
        plan.tile_key0 = tile.x;
        plan.tile_key1 = min(tile.x + kKeys, a.num_k);
        plan.first = tile.y;
        plan.num_slices = tile.z;
    }
}

// The tile's next slice on its walk; false where it has no rows for these keys.
__device__ __forceinline__ bool enter_slice(const BackwardArgs& a, Plan& plan) {
    const int i = plan.down ? plan.num_slices - 1 - plan.slice : plan.slice;
    const Slice x = slice_at(a, plan.first, i);  // transposed: its rows are keys
    const Range rows = tile_columns(x, plan.tile_key0, plan.tile_key1);
    if (rows.begin >= rows.end) return false;
    plan.row0 = rows.begin;
    plan.row1 = rows.end;
    plan.key0 = max(x.q0 - plan.tile_key0, 0);
    plan.key1 = min(x.q1 - plan.tile_key0, kKeys);
    plan.lo = x.lo + plan.tile_key0;  // bounds of row - (key - tile_key0)
    plan.hi = x.hi + plan.tile_key0;
    return true;
}

// Adds the tile's visits for each of its heads.
__device__ __forceinline__ void count_visits(const BackwardArgs& a, const Plan& plan, int& visits) {
    for (int i = 0; i < plan.num_slices; ++i) {
        const Range rows = tile_columns(slice_at(a, plan.first, i), plan.tile_key0, plan.tile_key1);
        if (rows.begin < rows.end) visits += ceil_div(rows.end - first_row(rows.begin), kRows);
    }
    visits *= a.heads_per_kv;
}

// The tile's walk: visit(row0) for each visit, of plan.head and the current slice. A block of rows is visited for all
// heads of the group while its rows are in L2, where other tiles visit it too, and while ordered visits wait for one
// head, other heads' add up. Of a part of the tile, only its visits from *begin to *end.
template <bool Parts = false, class F>
__device__ __forceinline__ void walk_tile(const BackwardArgs& a, Plan& plan, F visit, int* begin = nullptr,
                                          int* end = nullptr) {
    for (plan.slice = 0; plan.slice < plan.num_slices; plan.slice = plan.slice + 1) {
        if (!enter_slice(a, plan)) continue;
        const int from = first_row(plan.row0), last = (plan.row1 - 1 - from) / kRows;
        // Tiles of a sliding window begin side by side but each at a row of its own; so that they visit the same
        // rows at the same time all the same, each begins within its rows where the others do, and goes round.
        plan.top = plan.down ? last : kUp;
        if (!DETERMINISTIC && plan.lo - plan.tile_key0 > kNoLo && plan.hi - plan.tile_key0 < kNoHi)
            plan.top = last - (from / kRows + last) % (last + 1) - 1;
        // Ordered ones cannot, as they would wait for each other; but with a window's heads one after the other a
        // tile comes to a row soon after the tile before it, whose turn it is first anyway.
        const bool heads_outside =
            DETERMINISTIC && plan.lo - plan.tile_key0 > kNoLo && plan.hi - plan.tile_key0 < kNoHi;
        const int outer = heads_outside ? a.heads_per_kv : last + 1;
        const int inner = heads_outside ? last + 1 : a.heads_per_kv;
        const int all = outer * inner;
        int i = 0, j = 0, next = 0, stop = all;  // of the slice's visits
        if (Parts && begin) {
            next = max(*begin, 0);
            stop = min(*end, all);
            *begin = *begin - all;
            *end = *end - all;
            i = next / inner;
            j = next - i * inner;
        }
        for (; Parts ? next < stop : i < outer; ++i, j = 0) {
#pragma unroll 1
            for (; j < inner && (!Parts || next < stop); ++j, ++next) {
                const int block = heads_outside ? j : i;
                int at = plan.top == kUp ? block : plan.top - block;
                if (at < 0) at += last + 1;
                plan.head = plan.kv_head * a.heads_per_kv + (heads_outside ? i : j);
                visit(from + at * kRows);
            }
        }
    }
}

// What consumers may use of the rows from row0 on of the current slice, and when it is the visit's turn.
__device__ __forceinline__ void describe_cells(const Plan& plan, int row0, Visit& visit) {
    bool masked = row0 < plan.row0 || row0 + kRows > plan.row1 || plan.key0 > 0 || plan.key1 < kKeys;
    visit.first = plan.row0 - row0;
    visit.last = min(plan.row1 - row0, kRows);
    visit.key0 = plan.key0;
    visit.key1 = plan.key1;
    const int lo = row0 - plan.hi, hi = row0 - plan.lo;  // of key - row within the tile
    visit.lo = lo;
    visit.hi = hi;
    visit.masked = masked || lo > 1 - kRows || hi < kKeys - 1;
    if (DETERMINISTIC) visit.order = plan.orders[row0 / kRows];
}

// Loads what a visit has of q and lse, or of dout and delta.
template <int Chunks, int Elements>
__device__ __forceinline__ void load_rows(const BackwardArgs& a, const Visit& visit, const TensorMap& map,
                                          const float* statistic, u16 (&rows)[Chunks][Elements],
                                          float (&of_rows)[kRows], u64& full) {
    barrier_arrive_expect(full, sizeof(rows) + sizeof(of_rows));
#pragma unroll 1
    for (int c = 0; c < Chunks; ++c) tma_load(rows[c], map, full, 64 * c, visit.head, visit.row0);
    bulk_load(of_rows, statistic + static_cast<long long>(visit.head) * a.rows_pad + visit.row0, sizeof(of_rows), full);
}

// p = exp2(score - minus), both in log2 units: minus is the row's lse.
__device__ __forceinline__ float probability(const BackwardArgs& a, float score, float minus) {
    const float inner = 2 * kLog2e * a.scale / a.softcap, outer = a.softcap * kLog2e;
    if (SOFTCAP)
        return exp2_fast(outer - __fdividef(2 * outer, exp2_fast(score * inner) + 1) - minus);  // cap * tanh(x / cap)
    return exp2_fast(score * a.scale_log2 - minus);
}

// Under a softcap: the derivative 1 - tanh^2 of the capped score, with tanh read back from p.
__device__ __forceinline__ float cap_slope(const BackwardArgs& a, float p, float lse) {
    const float per_cap = 1 / (a.softcap * kLog2e);
    const float tanh = (__log2f(p) + lse) * per_cap;
    return p > 0 ? 1 - tanh * tanh : 0.f;
}

}  // namespace magi
