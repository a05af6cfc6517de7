// Builds the tile table on the device. A table of some hundreds of tiles is built by one block, which needs no other's
// results and no cleared header (`tiles_small`). Otherwise one block a tile lists its slices, and the last block to
// finish sorts the tiles (`tiles`).
#include "tiles.cuh"

#include "ptx.cuh"

namespace magi {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBuckets = 1024;

__device__ Slice slice_at(const TilesArgs& a, int i) {
    return table_slice(a.slices[i], a.num_q, a.num_k, a.transposed);
}
__device__ int rows_of(const TilesArgs& a) { return a.transposed ? a.num_k : a.num_q; }
// The sum of x over neighbouring lanes, `group` of them.
__device__ __forceinline__ int group_sum(int x, int group) {
#pragma unroll 1
    for (int step = 1; step < group; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// ---- rows of tiles ----
// Where slices cut the rows, ascending: cut i begins at row begin[i] and has the tiles before last_tile[i] that no
// earlier one has. Past the slices no cut begins before the end, and none ends.
struct alignas(16) Cuts {
    int start[kMaxCuts + 1], last_tile[kMaxCuts + 1], begin[kMaxCuts + 1];  // start: of each slice's rows, as they come
};
__device__ void set_cut(const TilesArgs& a, Cuts& c, int i, const Slice& slice) {
    c.start[i] = i < a.num_slices && slice.q0 < slice.q1 ? slice.q0 : rows_of(a);
    c.last_tile[i] = 0x7fffffff;
}

// Orders the starts of all slices, by one block, and counts the tiles; returns their number. The first cut begins at
// row 0, so that every row has a tile.
__device__ int cut_rows(const TilesArgs& a, Cuts& c) {
    const int lane = threadIdx.x % 32, n = a.num_slices;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < n; i += blockDim.x / 32) {
        const int own = c.start[i];
        int place = 0, next = rows_of(a);
#pragma unroll 1
        for (int j = lane; j - lane < n; j += 32) {
            const int other = c.start[j];
            const bool before = other < own || (other == own && j < i);
            place += __popc(__ballot_sync(~0u, before));
            if (!before && j != i) next = min(next, other);
        }
        next = __reduce_min_sync(~0u, next);
        if (lane == 0) {
            const int begin = place ? own : 0;
            c.begin[place] = begin;
            c.last_tile[place] = next - begin;
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int before = 0;
#pragma unroll 1
        for (int i = lane; i - lane < n; i += 32) {
            const int last = before + sum_upto(i < n ? ceil_div(c.last_tile[i], a.table.tile_rows) : 0);
            if (i < n) c.last_tile[i] = last;
            before = __shfl_sync(~0u, last, 31);
        }
    }
    __syncthreads();
    return c.last_tile[n - 1];
}

// By whole warps, `group` lanes a tile, a power of two; none where there is no such tile.
__device__ Range tile_range(const TilesArgs& a, const Cuts& c, int num_tiles, int tile, int group) {
    const int tile_rows = a.table.tile_rows, n = a.num_slices;
    int row0 = tile * tile_rows, end = rows_of(a);
    if (a.table.cut) {
        int cut = 0;
#pragma unroll 2
        for (int j = (threadIdx.x & (group - 1)) * 4; j < n; j += 4 * group) {
            const int4 last = *reinterpret_cast<const int4*>(&c.last_tile[j]);
            cut += (last.x <= tile) + (last.y <= tile) + (last.z <= tile) + (last.w <= tile);
        }
        cut = min(group_sum(cut, group), n - 1);
        row0 = c.begin[cut] + (tile - (cut ? c.last_tile[cut - 1] : 0)) * tile_rows;
        if (cut + 1 < n) end = c.begin[cut + 1];
    }
    return tile < num_tiles ? Range{row0, min(row0 + tile_rows, end)} : Range{0, 0};
}

// The same for up to 32 slices that come ordered by their first rows, as documents do: every warp by itself, a slice a
// lane. Returns whether they do; `group` lanes share each of the tiles from `tile` of lane 0 on.
__device__ __forceinline__ bool ordered_range(const TilesArgs& a, const Cuts& c, int tile, int group, Range& rows,
                                              int& num_tiles) {
    const int lane = threadIdx.x % 32, n = a.num_slices, end = rows_of(a);
    const int start = lane < n ? c.start[lane] : end, next = __shfl_down_sync(~0u, start, 1);
    if (__any_sync(~0u, lane < 31 && next < start)) return false;
    const int begin = lane ? start : 0, stop = lane < 31 ? next : end;
    const int last = sum_upto(ceil_div(stop - begin, a.table.tile_rows));  // tiles up to this slice's last
    num_tiles = __shfl_sync(~0u, last, 31);
    const int first = __shfl_sync(~0u, tile, 0);
    int cut = 0;
#pragma unroll 2
    for (int i = 0; i < 32 / group; ++i) {
        const int before = __popc(__ballot_sync(~0u, last <= first + i));
        if (first + i == tile) cut = before;
    }
    const int slice = min(cut, 31), at = __shfl_sync(~0u, begin, slice), upto = __shfl_sync(~0u, stop, slice);
    const int earlier = __shfl_sync(~0u, last, max(0, cut - 1));
    const int row0 = at + (tile - (cut ? earlier : 0)) * a.table.tile_rows;
    rows = tile < num_tiles ? Range{row0, min(row0 + a.table.tile_rows, upto)} : Range{0, 0};
    return true;
}

__device__ Tile tile_of(const TilesArgs& a, Range rows, int first, int count, int steps) {
    return {rows.begin, a.table.cut ? first | (rows.end - rows.begin - 1) << kRowsShift : first,
            first >= 0 ? count : a.num_slices, steps};
}

// ---- one block ----
// It is over in microseconds, so what counts is how few instructions follow each other.
struct SmallSmem {
    Cuts cuts;
    alignas(16) int weight[kMostSmallTiles];  // steps, then tiles that come first: no two are equal; -1: no tile
    alignas(16) int2 rows[kMostSmallSlices];  // of each slice; none past the slices
    Tile tile[kMostSmallTiles];
    Slice slice[kMostSmallSlices];
    int warp_count[kSmallThreads / 32];
};

extern "C" __global__ __launch_bounds__(kSmallThreads) void tiles_small(const __grid_constant__ TilesArgs a) {
    __shared__ SmallSmem s;
    prefetch_lines(a.slices, a.num_slices * sizeof(Slice), threadIdx.x);
    wait_for_earlier_kernels();  // the slices may be one's result, the workspace another's
    let_later_kernels_start();   // that much is then known to them, too: backward_prepare needs no more
    const TileTable& t = a.table;
    const int lane = threadIdx.x % 32, n = a.num_slices;
    static_assert(kMostSmallTiles == kMostSmallSlices && kMostSmallSlices == kMaxCuts + 1);
    if (threadIdx.x < kMostSmallSlices) {
        const int i = threadIdx.x;
        const Slice c = i < n ? slice_at(a, i) : Slice{};
        s.slice[i] = c;
        s.rows[i] = make_int2(c.q0, c.q1);
        s.weight[i] = -1;
        if (t.cut) set_cut(a, s.cuts, i, c);
    }
    __syncthreads();

    // Some lanes share a tile, each with some slices: first those that have rows of it, then their steps.
    const int bits = lane_bits(t.num_tiles), group = 1 << bits, member = threadIdx.x & (group - 1);
    const int i = threadIdx.x >> bits, share = slices_of_lane(n, bits), first_slice = member * share;
    int num_tiles = t.num_tiles;
    Range rows;
    if (!t.cut || n > 32 || !ordered_range(a, s.cuts, i, group, rows, num_tiles)) {
        if (t.cut) num_tiles = cut_rows(a, s.cuts);
        rows = tile_range(a, s.cuts, num_tiles, i, group);
    }
    if (threadIdx.x == 0) *t.header = {0, 0, 0, num_tiles};
    u32 hits = 0;
#pragma unroll 2
    for (int j = 0; j < share && i < num_tiles; j += 2) {
        const int4 two = *reinterpret_cast<const int4*>(&s.rows[first_slice + j]);
        hits |= static_cast<u32>(max(two.x, rows.begin) < min(two.y, rows.end)) << j |
                static_cast<u32>(max(two.z, rows.begin) < min(two.w, rows.end)) << (j + 1);
    }
    auto steps_of = [&](int slice) { return num_steps(tile_columns(s.slice[slice], rows.begin, rows.end), t.step); };
    int steps = 0;
#pragma unroll 1
    for (u32 left = hits; left; left &= left - 1) {
        const int mine = steps_of(first_slice + __ffs(left) - 1);
        if (mine == 0) hits &= ~(left & -left);
        steps += mine;
    }
    const int own = __popc(hits), upto = sum_upto(own), warp = threadIdx.x / 32;
    if (lane == 31) s.warp_count[warp] = upto;
    __syncthreads();
    int at = __reduce_add_sync(~0u, lane < warp ? s.warp_count[lane] : 0) + upto - own;
    const int first = __shfl_sync(~0u, at, lane & -group), count = group_sum(own, group);
    const bool fits = first <= t.capacity - count;
#pragma unroll 1
    for (u32 left = fits ? hits : 0; left; left &= left - 1) {
        const int slice = first_slice + __ffs(left) - 1;
        t.pool[at++] = {s.slice[slice], slice, own == 1 ? steps : steps_of(slice)};
    }
    steps = group_sum(steps, group);
    if (member == 0 && i < num_tiles) {
        s.tile[i] = t.unsorted[i] = tile_of(a, rows, fits ? first : -1, count, steps);
        s.weight[i] = min(steps, (1 << 23) - 1) * kMostSmallTiles + kMostSmallTiles - 1 - i;
    }
    __syncthreads();
    // A tile's place is how many are heavier. Four lanes a tile.
#pragma unroll 1
    for (int base = 0; base < num_tiles; base += kSmallThreads / 4) {
        const int tile = base + threadIdx.x / 4, own = tile < num_tiles ? s.weight[tile] : 0;
        int before = 0;
#pragma unroll 4
        for (int j = threadIdx.x % 4 * 4; j < num_tiles; j += 16) {
            const int4 other = *reinterpret_cast<const int4*>(&s.weight[j]);
            before += (other.x > own) + (other.y > own) + (other.z > own) + (other.w > own);
        }
        before += __shfl_xor_sync(~0u, before, 1);
        before += __shfl_xor_sync(~0u, before, 2);
        if (threadIdx.x % 4 == 0 && tile < num_tiles) t.tiles[before] = s.tile[tile];
    }
}

// ---- many blocks ----
struct Smem {
    Cuts cuts;
    int warp_count[kWarps], warp_steps[kWarps];
    int first, last_block;
    int bucket[kBuckets];
};

// Sum over the block, the same in every thread.
__device__ int block_sum(int x, int (&scratch)[kWarps]) {
    x = __reduce_add_sync(~0u, x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += scratch[w];
    __syncthreads();
    return sum;
}

// Returns the number of tiles.
__device__ int list_slices(const TilesArgs& a, Smem& s) {
    const TileTable& t = a.table;
    int num_tiles = t.num_tiles;
    if (t.cut) {
        static_assert(kThreads == kMaxCuts + 1);
        const int i = threadIdx.x;
        set_cut(a, s.cuts, i, i < a.num_slices ? slice_at(a, i) : Slice{});
        __syncthreads();
        num_tiles = cut_rows(a, s.cuts);
        if (blockIdx.x == 0 && threadIdx.x == 0) t.header->num_tiles = num_tiles;
    }
    const Range rows = tile_range(a, s.cuts, num_tiles, blockIdx.x, 1);
    if (rows.begin == rows.end) return num_tiles;
    int count = 0, steps = 0;
    for (int i = threadIdx.x; i < a.num_slices; i += kThreads) {
        const int mine = num_steps(tile_columns(slice_at(a, i), rows.begin, rows.end), t.step);
        count += mine > 0;
        steps += mine;
    }
    count = block_sum(count, s.warp_count);
    steps = block_sum(steps, s.warp_steps);
    if (threadIdx.x == 0) {
        const int first = count ? atomicAdd(&t.header->pool_used, count) : 0;
        const bool fits = first <= t.capacity - count;
        s.first = fits ? first : -1;
        t.unsorted[blockIdx.x] = tile_of(a, rows, s.first, count, steps);
    }
    __syncthreads();
    int at = s.first;
    if (at < 0 || count == 0) return num_tiles;
    for (int base = 0; base < a.num_slices; base += kThreads) {  // ascending, so that every build gives the same lists
        const int i = base + threadIdx.x;
        Slice slice{};
        int mine = 0;
        if (i < a.num_slices) {
            slice = slice_at(a, i);
            mine = num_steps(tile_columns(slice, rows.begin, rows.end), t.step);
        }
        const u32 hits = __ballot_sync(~0u, mine > 0);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) s.warp_count[warp] = __popc(hits);
        __syncthreads();
        int before = 0, all = 0;
        for (int w = 0; w < kWarps; ++w) {
            before += w < warp ? s.warp_count[w] : 0;
            all += s.warp_count[w];
        }
        if (mine > 0) t.pool[at + before + __popc(hits & ((1u << lane) - 1))] = {slice, i, mine};
        at += all;
        __syncthreads();
    }
    return num_tiles;
}

// Counting sort by num_steps, descending; tiles of one bucket in any order.
__device__ void sort_tiles(const TileTable& t, int num_tiles, Smem& s) {
    int most = 1;
    for (int i = threadIdx.x; i < num_tiles; i += kThreads) most = max(most, __ldcg(&t.unsorted[i].num_steps));
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) s.warp_count[threadIdx.x / 32] = most;
    for (int b = threadIdx.x; b < kBuckets; b += kThreads) s.bucket[b] = 0;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) most = max(most, s.warp_count[w]);
    const float scale = float(kBuckets - 1) / float(most);
    auto bucket_of = [&](int steps) { return kBuckets - 1 - min(kBuckets - 1, int(float(steps) * scale)); };
    for (int i = threadIdx.x; i < num_tiles; i += kThreads)
        atomicAdd(&s.bucket[bucket_of(__ldcg(&t.unsorted[i].num_steps))], 1);
    __syncthreads();
    // Running sum: bucket[b] = tiles in the buckets before b. Each thread owns a run of buckets.
    constexpr int kOwn = kBuckets / kThreads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int own[kOwn], sum = 0;
    for (int j = 0; j < kOwn; ++j) own[j] = s.bucket[threadIdx.x * kOwn + j], sum += own[j];
    int before = sum_upto(sum);
    if (lane == 31) s.warp_steps[warp] = before;
    __syncthreads();
    before -= sum;
    for (int w = 0; w < warp; ++w) before += s.warp_steps[w];
    for (int j = 0; j < kOwn; ++j) {
        s.bucket[threadIdx.x * kOwn + j] = before;
        before += own[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_tiles; i += kThreads) {
        const int4 tile = __ldcg(reinterpret_cast<const int4*>(t.unsorted) + i);
        t.tiles[atomicAdd(&s.bucket[bucket_of(tile.w)], 1)] = {tile.x, tile.y, tile.z, tile.w};
    }
}

extern "C" __global__ __launch_bounds__(kThreads) void tiles(const __grid_constant__ TilesArgs a) {
    __shared__ Smem s;
    let_later_kernels_start();
    const int num_tiles = list_slices(a, s);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        s.last_block = atomicAdd(&a.table.header->tiles_done, 1) == a.table.num_tiles - 1;
        __threadfence();
    }
    __syncthreads();
    if (s.last_block) sort_tiles(a.table, num_tiles, s);
}

}  // namespace magi
