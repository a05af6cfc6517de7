// Builds the tile table on the device. A table of some hundreds of tiles is built by one block, which needs no other's
// results and no cleared header (`tiles_small`). Otherwise one block a tile lists its slices, and the last block to
// finish sorts the tiles (`tiles`).
#include "tiles.cuh"

#include "ptx.cuh"

namespace magi {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBuckets = 1024;

struct Smem {
    int warp_count[kWarps], warp_steps[kWarps];
    int first, last_block;
    int start[kThreads], sorted[kThreads + 1];
    Range rows;
    int bucket[kBuckets];
};

__device__ Slice slice_at(const TilesArgs& a, int i) {
    return table_slice(a.slices[i], a.num_q, a.num_k, a.transposed);
}

// ---- one block ----
constexpr int kSmallThreads = 1024, kSmallWarps = kSmallThreads / 32;

struct SmallSmem {
    Slice slice[kMostSmallSlices];
    int start[kMostSmallSlices], sorted[kMostSmallSlices + 1];  // first rows of the slices where tiles begin there
    int last_tile[kMostSmallSlices + 1];                        // past the tiles of the rows from sorted[i] on
    Tile tile[kMostSmallTiles];
    int pool_used;
};

// Orders the rows where tiles begin and counts the tiles up to each; returns their number.
__device__ int count_cut_tiles(const TilesArgs& a, SmallSmem& s) {
    constexpr int kShare = kSmallThreads / kMostSmallSlices;  // threads that rank one slice
    const int num_rows = a.transposed ? a.num_k : a.num_q, n = a.num_slices;
    const int i = threadIdx.x / kShare, lane = threadIdx.x % 32;
    if (i < n && threadIdx.x % kShare == 0) s.start[i] = s.slice[i].q0 < s.slice[i].q1 ? s.slice[i].q0 : num_rows;
    if (threadIdx.x == 0) s.sorted[0] = 0;
    __syncthreads();
    const int start = i < n ? s.start[i] : 0;
    int rank = 0;
    for (int j = threadIdx.x % kShare; j < n; j += kShare) rank += s.start[j] < start || (s.start[j] == start && j < i);
    for (int step = 1; step < kShare; step *= 2) rank += __shfl_xor_sync(~0u, rank, step);
    if (i < n && threadIdx.x % kShare == 0) s.sorted[rank + 1] = start;
    __syncthreads();
    if (threadIdx.x < 32) {
        int total = 0;
        for (int base = 0; base <= n; base += 32) {
            const int at = base + lane, begin = at <= n ? s.sorted[at] : num_rows;
            int last = ceil_div((at < n ? s.sorted[at + 1] : num_rows) - begin, a.table.tile_rows);  // running sum
            for (int step = 1; step < 32; step *= 2) {
                const int below = __shfl_up_sync(~0u, last, step);
                if (lane >= step) last += below;
            }
            if (at <= n) s.last_tile[at] = total + last;
            total += __shfl_sync(~0u, last, 31);
        }
    }
    __syncthreads();
    return s.last_tile[n];
}

// Rows of a tile of a cut table.
__device__ Range cut_tile(const TilesArgs& a, const SmallSmem& s, int tile) {
    int low = 0, high = a.num_slices;  // the first interval that ends past the tile
    while (low < high) {
        const int middle = (low + high) / 2;
        if (s.last_tile[middle] > tile)
            high = middle;
        else
            low = middle + 1;
    }
    const int end = low < a.num_slices ? s.sorted[low + 1] : a.transposed ? a.num_k : a.num_q;
    const int row0 = s.sorted[low] + (tile - (low ? s.last_tile[low - 1] : 0)) * a.table.tile_rows;
    return {row0, min(row0 + a.table.tile_rows, end)};
}

extern "C" __global__ __launch_bounds__(kSmallThreads) void tiles_small(const __grid_constant__ TilesArgs a) {
    __shared__ SmallSmem s;
    let_later_kernels_start();
    wait_for_earlier_kernels();  // the slices may be one's result, the workspace another's
    const TileTable& t = a.table;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x < a.num_slices) s.slice[threadIdx.x] = slice_at(a, threadIdx.x);
    if (threadIdx.x == 0) s.pool_used = 0;
    __syncthreads();
    const int num_tiles = t.cut ? count_cut_tiles(a, s) : t.num_tiles;
    // Some lanes share a tile's slices: `group` of them, from lane `leader` on.
    const int group = a.num_slices > 64 ? 32 : a.num_slices > 8 ? 8 : a.num_slices > 1 ? 4 : 1;
    const int leader = lane / group * group, member = lane - leader;
    auto group_bits = [&](bool mine) {
        return __ballot_sync(~0u, mine) >> leader & (group == 32 ? ~0u : (1u << group) - 1);
    };
    for (int base = 0; base < num_tiles; base += kSmallThreads / group) {
        const int i = base + threadIdx.x / group;
        Range rows{0, 0};  // of no tile
        if (i < num_tiles) {
            const int row0 = i * t.tile_rows;
            rows = t.cut ? cut_tile(a, s, i) : Range{row0, min(row0 + t.tile_rows, a.transposed ? a.num_k : a.num_q)};
        }
        auto columns_of = [&](int slice) {
            return slice < a.num_slices ? tile_columns(s.slice[slice], rows.begin, rows.end) : Range{0, 0};
        };
        int count = 0;
        for (int first = 0; first < a.num_slices; first += group) {
            const Range columns = columns_of(first + member);
            count += __popc(group_bits(columns.begin < columns.end));
        }
        int at = 0;
        if (member == 0 && count) at = atomicAdd(&s.pool_used, count);
        at = __shfl_sync(~0u, at, leader);
        const bool fits = at <= t.capacity - count;
        const int pool = fits ? at : -1;
        int steps = 0;
        for (int first = 0; first < a.num_slices; first += group) {  // ascending
            const int slice = first + member, mine = num_steps(columns_of(slice), t.step);
            const u32 hits = group_bits(mine > 0);
            if (mine > 0 && fits) t.pool[at + __popc(hits & ((1u << member) - 1))] = {s.slice[slice], slice, mine};
            at += __popc(hits);
            steps += mine;
        }
        for (int step = 1; step < group; step *= 2) steps += __shfl_xor_sync(~0u, steps, step);
        if (member == 0 && i < num_tiles)
            s.tile[i] = t.unsorted[i] = {rows.begin, t.cut ? pool | (rows.end - rows.begin - 1) << kRowsShift : pool,
                                         fits ? count : a.num_slices, steps};
    }
    __syncthreads();
    // A tile's place is how many go before it: heavier ones, and equals above it.
    for (int i = warp; i < num_tiles; i += kSmallWarps) {
        const int steps = s.tile[i].num_steps;
        int before = 0;
        for (int j = lane; j < num_tiles; j += 32) {
            const int other = s.tile[j].num_steps;
            before += other > steps || (other == steps && j < i);
        }
        before = __reduce_add_sync(~0u, before);
        if (lane == 0) t.tiles[before] = s.tile[i];
    }
    if (threadIdx.x == 0) *t.header = {s.pool_used, num_tiles, 0, num_tiles};
}

// ---- many blocks ----
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

// Rows of the block's tile where tiles begin with slices, none for blocks beyond them; returns the number of tiles.
__device__ int cut_rows(const TilesArgs& a, Smem& s) {
    const int num_rows = a.transposed ? a.num_k : a.num_q, i = threadIdx.x, n = a.num_slices;
    int start = num_rows;
    if (i < n) {
        const Slice c = slice_at(a, i);
        if (c.q0 < c.q1) start = c.q0;
    }
    s.start[i] = start;
    if (i == 0) {
        s.sorted[0] = 0;
        s.rows = {0, 0};
    }
    __syncthreads();
    if (i < n) {
        int rank = 0;
        for (int j = 0; j < n; ++j) rank += s.start[j] < start || (s.start[j] == start && j < i);
        s.sorted[rank + 1] = start;
    }
    __syncthreads();
    const int begin = i <= n ? s.sorted[i] : num_rows, end = i < n ? s.sorted[i + 1] : num_rows;
    const int tiles = ceil_div(end - begin, a.table.tile_rows);
    int last = tiles;  // running sum
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, last, step);
        if (i % 32 >= step) last += below;
    }
    if (i % 32 == 31) s.warp_count[i / 32] = last;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w < i / 32) last += s.warp_count[w];
        total += s.warp_count[w];
    }
    const int at = static_cast<int>(blockIdx.x) - (last - tiles);
    if (at >= 0 && at < tiles) {
        const int row0 = begin + at * a.table.tile_rows;
        s.rows = {row0, min(row0 + a.table.tile_rows, end)};
    }
    __syncthreads();
    return total;
}

// Returns the number of tiles.
__device__ int list_slices(const TilesArgs& a, Smem& s) {
    const TileTable& t = a.table;
    int num_tiles = t.num_tiles, row0 = blockIdx.x * t.tile_rows;
    int row1 = min(row0 + t.tile_rows, a.transposed ? a.num_k : a.num_q);
    if (t.cut) {
        num_tiles = cut_rows(a, s);
        if (blockIdx.x == 0 && threadIdx.x == 0) t.header->num_tiles = num_tiles;
        row0 = s.rows.begin, row1 = s.rows.end;
        if (row0 == row1) return num_tiles;
    }
    int count = 0, steps = 0;
    for (int i = threadIdx.x; i < a.num_slices; i += kThreads) {
        const int mine = num_steps(tile_columns(slice_at(a, i), row0, row1), t.step);
        count += mine > 0;
        steps += mine;
    }
    count = block_sum(count, s.warp_count);
    steps = block_sum(steps, s.warp_steps);
    if (threadIdx.x == 0) {
        const int first = count ? atomicAdd(&t.header->pool_used, count) : 0;
        const bool fits = first <= t.capacity - count;
        s.first = fits ? first : -1;
        const int with_rows = t.cut ? s.first | (row1 - row0 - 1) << kRowsShift : s.first;
        t.unsorted[blockIdx.x] = {row0, with_rows, fits ? count : a.num_slices, steps};
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
            mine = num_steps(tile_columns(slice, row0, row1), t.step);
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
    int before = sum;
    for (int step = 1; step < 32; step *= 2) {
        const int below = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += below;
    }
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
