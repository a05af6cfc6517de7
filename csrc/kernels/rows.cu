// Row movement on the device: gather and its adjoint, the merge of partial results, the backward's row sums, band
// slices. All are bound by memory. Rows of whole 16 bytes are moved by bulk copies, every warp through a ring of its
// own in shared memory; other rows by ordinary loads and stores.
#include "ptx.cuh"

namespace magi {

constexpr int kThreads = 256;  // of kernels that use no rings

// ---- ranges ----
// The sum of x over the threads before this one; all: over the whole block.
__device__ long long sum_before(long long x, long long& all) {
    __shared__ long long warp_sum[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const long long sum = sum_upto(x);
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    long long before = sum - x;
    all = 0;
    for (int w = 0; w < warps; ++w) {
        if (w < warp) before += warp_sum[w];
        all += warp_sum[w];
    }
    __syncthreads();
    return before;
}

// Calls visit(base, own, ranges) until the block has seen all ranges: own * 32 consecutive ones for each warp, from
// base on, lane by lane; what a lane holds is base + warp * 32 * own + 32 * i + lane in ranges[i], or empty.
constexpr int kOwnRanges = 12;
template <class Visit>
__device__ __forceinline__ void share_ranges(const RowRange* ranges, int num_ranges, Visit visit) {
    const int threads = blockDim.x, own = min(kOwnRanges, (num_ranges + threads - 1) / threads);
    for (int base = 0; base < num_ranges; base += own * threads) {
        const int first = base + threadIdx.x / 32 * 32 * own + threadIdx.x % 32;
        RowRange mine[kOwnRanges];
#pragma unroll
        for (int i = 0; i < kOwnRanges; ++i)
            mine[i] = i < own && first + 32 * i < num_ranges ? ranges[first + 32 * i] : RowRange{0, 0};
        visit(first, own, mine);
    }
}

// Exclusive running sum of the range lengths, by one block; first has room for num_ranges + 1.
__device__ void scan_ranges(const RowRange* ranges, int num_ranges, long long* first) {
    long long carry = 0;
    int base = 0;
    share_ranges(ranges, num_ranges, [&](int lane_first, int own, const RowRange(&mine)[kOwnRanges]) {
#pragma unroll
        for (int i = 0; i < kOwnRanges; ++i)
            if (i < own && lane_first + 32 * i < num_ranges)
                first[lane_first + 32 * i] = max(0, mine[i].end - mine[i].begin);
        __syncthreads();
        const int begin = base + own * threadIdx.x,
                  count = min(own, num_ranges - begin);  // now in a row for each thread
        long long sum = 0, all;
        for (int i = 0; i < count; ++i) sum += first[begin + i];
        long long at = carry + sum_before(sum, all);
        for (int i = 0; i < count; ++i) {
            const long long length = first[begin + i];
            first[begin + i] = at;
            at += length;
        }
        carry += all;
        base += own * blockDim.x;
    });
    if (threadIdx.x == 0) first[num_ranges] = carry;
    __syncthreads();
}

extern "C" __global__ __launch_bounds__(1024) void scan(const __grid_constant__ ScanArgs a) {
    scan_ranges(a.ranges, a.num_ranges, a.first);
}

// The range that holds a position of the concatenation, in units of which a row has `unit`.
__device__ int range_of(const long long* first, int num_ranges, long long unit, long long position) {
    int low = 0, high = num_ranges;  // first[low] * unit <= position < first[high] * unit
    while (high - low > 1) {
        const int mid = (low + high) / 2;
        if (first[mid] * unit <= position)
            low = mid;
        else
            high = mid;
    }
    return low;
}

// ---- up to kFewRanges ranges, by every block for itself ----
// Kernels of microseconds wait for their own instructions and for each other's warps: 32 ranges at a time are a group,
// whose sum is one instruction, and who looks for a row looks through a group as a warp. Rows are less than 2^31.
constexpr int kGroups = kFewRanges / 32;

__device__ __forceinline__ u32 length_of(RowRange r) { return max(0, r.end - r.begin); }

struct Groups {     // what comes before groups, and all of them
    u32 before[4];  // groups 4 * lane and three more
    u32 all;
    // By whole warps.
    __device__ __forceinline__ u32 before_group(int group) const {
        const u32 even = group & 2 ? before[2] : before[0], odd = group & 2 ? before[3] : before[1];
        return __shfl_sync(~0u, group & 1 ? odd : even, group / 4);
    }
};
__device__ __forceinline__ Groups groups_of(const u32* sums) {  // [kGroups] in shared memory
    const uint4 own = reinterpret_cast<const uint4*>(sums)[threadIdx.x % 32];
    const u32 sum = own.x + own.y + own.z + own.w, upto = sum_upto(sum), before = upto - sum;
    return {{before, before + own.x, before + own.x + own.y, before + own.x + own.y + own.z},
            __shfl_sync(~0u, upto, 31)};
}

// The block's warps take groups in turns: visit(i, group, ranges) with one of each lane, or an empty one. Sums of
// groups after those must be zero.
template <int kWarps>
constexpr int kOwnGroups = (kGroups + kWarps - 1) / kWarps;
template <int kWarps, class Visit>
__device__ __forceinline__ void share_groups(const RowRange* ranges, int num_ranges, Visit visit) {
    constexpr int kOwn = kOwnGroups<kWarps>;
    const int warp = threadIdx.x / 32, first = 32 * warp + threadIdx.x % 32;
    RowRange mine[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        constexpr int kApart = 32 * kWarps;
        mine[i] = first + kApart * i < num_ranges ? ranges[first + kApart * i] : RowRange{0, 0};
    }
    __syncwarp();  // ptxas must not wait for one before it asks for another
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
        if (32 * kWarps * i < num_ranges) visit(i, warp + kWarps * i, mine[i]);
}
// Whether a group's sum is not written by share_groups.
template <int kWarps>
__device__ __forceinline__ bool past_groups(int group, int num_ranges) {
    return group < kGroups && group / kWarps * kWarps * 32 >= num_ranges;
}

// ---- rings: bulk copies arrive in a warp's own stages ----
// A warp's barriers made ready; ranges on their way to L2, where later writes to them would be seen.
template <int kStages>
__device__ __forceinline__ void start_ring(u64 (&full)[kStages], const RowRange* ranges, int num_ranges) {
    if (threadIdx.x % 32 < kStages) barrier_init(full[threadIdx.x % 32], 1);
    prefetch_lines(ranges, num_ranges * sizeof(RowRange), threadIdx.x * gridDim.x + blockIdx.x);
    barrier_init_fence();
    __syncwarp();
    let_later_kernels_start();
    wait_for_earlier_kernels();
}

// ---- gather: pieces of ranges, cut into stages of the output ----
struct GatherSmem {
    char stage[kGatherWarps][kGatherStages][kRowStageBytes];
    u64 full[kGatherWarps][kGatherStages];
    alignas(16) u32 group_sum[kOwnGroups<kGatherWarps> * kGatherWarps];
    RowRange ranges[kOwnGroups<kGatherWarps> * kGatherWarps *
                    32];  // up to 32: a copy for each warp, which then waits for no other
};
static_assert(sizeof(GatherSmem) <= kGatherSmem && kGatherSmem <= 226 * 1024);

extern "C" __global__ __launch_bounds__(32 * kGatherWarps, 1) void gather16(const __grid_constant__ GatherArgs a) {
    extern __shared__ __align__(128) char raw[];
    GatherSmem& s = *reinterpret_cast<GatherSmem*>(raw);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 row_bytes = a.row_bytes;
    start_ring(s.full[warp], a.ranges, a.num_ranges);
    const RowRange* ranges = s.ranges;
    Groups groups{};
    if (!a.first && a.num_ranges <= 32) {
        const RowRange mine = lane < a.num_ranges ? a.ranges[lane] : RowRange{0, 0};
        s.ranges[threadIdx.x] = mine;
        ranges = s.ranges + 32 * warp;
        const u32 all = __reduce_add_sync(~0u, length_of(mine));
        groups = {{lane ? all : 0, all, all, all}, all};
        __syncwarp();
    } else if (!a.first) {
        if (past_groups<kGatherWarps>(threadIdx.x, a.num_ranges)) s.group_sum[threadIdx.x] = 0;
        share_groups<kGatherWarps>(a.ranges, a.num_ranges, [&](int, int group, RowRange mine) {
            s.ranges[32 * group + lane] = mine;
            const u32 sum = __reduce_add_sync(~0u, length_of(mine));
            if (lane == 0) s.group_sum[group] = sum;
        });
        __syncthreads();
        groups = groups_of(s.group_sum);
    }
    const long long rows = a.first ? a.first[a.num_ranges] : groups.all, bytes = min(a.total, rows) * row_bytes;
    // Bytes of dst; neighbours in time are neighbours in memory.
    auto begin_of = [&](int n) {
        return ((static_cast<long long>(n) * kGatherWarps + warp) * gridDim.x + blockIdx.x) * kRowStageBytes;
    };
    auto load = [&](int n) {
        const long long begin = begin_of(n), end = min(begin + kRowStageBytes, bytes);
        if (begin >= end) return;
        u64& full = s.full[warp][n % kGatherStages];
        char* to = s.stage[warp][n % kGatherStages];
        if (lane == 0) barrier_arrive_expect(full, end - begin);
        auto load_piece = [&](int range_begin, long long at, long long upto) {  // of a range in [at, upto)
            const long long from = max(begin, at), piece = min(end, upto) - from;
            if (piece > 0)
                bulk_load(to + (from - begin), a.src + static_cast<u64>(row_bytes) * range_begin + (from - at), piece,
                          full);
        };
        if (a.first) {
            long long upto = begin;
            for (int i = range_of(a.first, a.num_ranges, row_bytes, begin) + lane; upto < end; i += 32) {
                const bool valid = i < a.num_ranges;
                upto = valid ? a.first[i + 1] * row_bytes : end;
                if (valid) load_piece(a.ranges[i].begin, a.first[i] * row_bytes, upto);
                upto = __shfl_sync(~0u, upto, 31);
            }
        } else {
            int group = 0;  // the last that begins here or before
#pragma unroll
            for (int i = 0; i < 4; ++i) group += static_cast<u64>(groups.before[i]) * row_bytes <= begin;
            group = __reduce_add_sync(~0u, group) - 1;
            u32 row = groups.before_group(group);
            for (;; ++group) {
                const RowRange r = ranges[32 * group + lane];
                const u32 upto = row + sum_upto(length_of(r));
                load_piece(r.begin, static_cast<u64>(upto - length_of(r)) * row_bytes,
                           static_cast<u64>(upto) * row_bytes);
                row = __shfl_sync(~0u, upto, 31);
                if (static_cast<u64>(row) * row_bytes >= end) break;
            }
        }
    };
    for (int n = 0; n < kGatherStages; ++n) load(n);
    for (int n = 0; begin_of(n) < bytes; ++n) {
        const int stage = n % kGatherStages;
        barrier_wait(s.full[warp][stage], n / kGatherStages % 2);
        const long long begin = begin_of(n);
        if (lane == 0) {
            bulk_store(a.dst + begin, s.stage[warp][stage], min(bytes - begin, static_cast<long long>(kRowStageBytes)));
            bulk_wait_read<1>();  // all but this store have read their stage
        }
        __syncwarp();
        if (n > 0) load(n - 1 + kGatherStages);
    }
    if (lane == 0) bulk_wait_read<0>();
}

// The same for rows of any size, by ordinary accesses.
template <class Vec>
__device__ void gather_rows(const GatherArgs& a) {
    __shared__ long long source[kThreads];  // byte offsets of the rows of this tile
    const long long* first = a.first;
    const long long total = min(a.total, first[a.num_ranges]);
    const int vecs = a.row_bytes / sizeof(Vec);
    const int tile_rows = max(1, min(kThreads, int(32768 / max(1LL, a.row_bytes))));
    for (long long row0 = (long long)blockIdx.x * tile_rows; row0 < total; row0 += (long long)gridDim.x * tile_rows) {
        const int rows = min((long long)tile_rows, total - row0);
        if (threadIdx.x < rows) {
            const int i = range_of(first, a.num_ranges, 1, row0 + threadIdx.x);
            source[threadIdx.x] = (a.ranges[i].begin + row0 + threadIdx.x - first[i]) * a.row_bytes;
        }
        __syncthreads();
        Vec* dst = reinterpret_cast<Vec*>(a.dst + row0 * a.row_bytes);
#pragma unroll 4
        for (int i = threadIdx.x; i < rows * vecs; i += kThreads)
            dst[i] = __ldg(reinterpret_cast<const Vec*>(a.src + source[i / vecs]) + i % vecs);
        __syncthreads();
    }
}

extern "C" __global__ __launch_bounds__(kThreads) void gather4(const __grid_constant__ GatherArgs a) {
    gather_rows<u32>(a);
}
extern "C" __global__ __launch_bounds__(kThreads) void gather1(const __grid_constant__ GatherArgs a) {
    gather_rows<unsigned char>(a);
}

// ---- elements ----
__device__ float load_one(const void* data, int type, long long i) {
    if (type == kElementF32) return static_cast<const float*>(data)[i];
    if (type == kElementBF16) return to_float(static_cast<const bf16*>(data)[i]);
    return to_float(static_cast<const f16*>(data)[i]);
}
__device__ void store_one(void* data, int type, long long i, float x) {
    if (type == kElementF32)
        static_cast<float*>(data)[i] = x;
    else
        static_cast<u16*>(data)[i] = type == kElementBF16 ? pack<bf16>(x, 0) : pack<f16>(x, 0);
}
// Sixteen bytes of elements of T.
template <class T>
constexpr int kPerVec = sizeof(T) == 2 ? 8 : 4;
template <class T>
__device__ __forceinline__ void unpack(const uint4& words, float (&x)[kPerVec<T>]) {
    const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int e = 0; e < kPerVec<T>; ++e) {
        if constexpr (sizeof(T) == 4)
            x[e] = __uint_as_float(w[e]);
        else
            x[e] = to_float(T{static_cast<u16>(w[e / 2] >> 16 * (e % 2))});
    }
}
template <class T>
__device__ __forceinline__ uint4 pack_vec(const float (&x)[kPerVec<T>]) {
    if constexpr (sizeof(T) == 4)
        return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
    else
        return make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
}
// Eight elements from i on, i a multiple of 8.
__device__ void load_eight(const void* data, int type, long long i, float (&x)[8]) {
    if (type == kElementF32) {
        const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
        const float4 lo = __ldg(p), hi = __ldg(p + 1);
        x[0] = lo.x, x[1] = lo.y, x[2] = lo.z, x[3] = lo.w, x[4] = hi.x, x[5] = hi.y, x[6] = hi.z, x[7] = hi.w;
    } else {
        const uint4 words = __ldg(reinterpret_cast<const uint4*>(static_cast<const u16*>(data) + i));
        const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const u16 bits = w[e / 2] >> 16 * (e % 2);
            x[e] = type == kElementBF16 ? to_float(bf16{bits}) : to_float(f16{bits});
        }
    }
}
// ---- scatter-reduce: each row is summed once, in fp32, over its positions in ascending order ----
// Calls keep(place, range) for the ranges that touch rows [row0, row1), ascending; returns how many.
template <class Keep>
__device__ long long find_hits(const RowRange* ranges, int num_ranges, int row0, int row1, Keep keep) {
    long long carry = 0;
    share_ranges(ranges, num_ranges, [&](int lane_first, int own, const RowRange(&mine)[kOwnRanges]) {
        const int lane = threadIdx.x % 32;
        u32 hit[kOwnRanges];  // of the warp, a bit for each lane
        int of_warp = 0;
#pragma unroll
        for (int i = 0; i < kOwnRanges; ++i) {
            hit[i] = __ballot_sync(~0u, max(row0, mine[i].begin) < min(row1, mine[i].end));
            of_warp += __popc(hit[i]);
        }
        long long all, before = carry + sum_before(lane == 0 ? of_warp : 0, all);
        long long at = __shfl_sync(~0u, before, 0);
#pragma unroll
        for (int i = 0; i < kOwnRanges; ++i) {
            if (hit[i] >> lane & 1) keep(at + __popc(hit[i] & ((1u << lane) - 1)), lane_first + 32 * i);
            at += __popc(hit[i]);
        }
        carry += all;
    });
    __syncthreads();
    return carry;
}

struct alignas(16) Hit {  // a range that touches a block's rows
    int begin, end;
    long long first;  // its rows come from there on
};
struct Layer {  // rows of one tile that arrive together, none of them twice
    int tile;   // < 0: no more work
    u32 rows;   // a bit each
    int last;   // of its tile
};
struct ScatterSmem {
    char stage[kScatterWarps][kScatterStages][kRowStageBytes];
    u64 full[kScatterWarps][kScatterStages];
    Layer layer[kScatterWarps][kScatterStages];
    alignas(16) u32 group_sum[kOwnGroups<kScatterWarps> * kScatterWarps];
    alignas(16) u32 group_hits[kOwnGroups<kScatterWarps> * kScatterWarps];
    Hit hits[kHits];  // up to 32 ranges: all, for each warp
};
static_assert(sizeof(ScatterSmem) <= kScatterSmem && kScatterSmem <= 226 * 1024 && kHits >= 32 * kScatterWarps);

// Lists the ranges that touch rows [row0, row1), ascending, and points to the list; returns how many, or -1 where it
// does not hold them.
__device__ __forceinline__ int list_hits(const ScatterArgs& a, ScatterSmem& s, int row0, int row1, const Hit*& hits) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    hits = s.hits;
    if (a.first) {
        const long long found = find_hits(a.ranges, a.num_ranges, row0, row1, [&](long long place, int i) {
            if (place < kHits) s.hits[place] = {a.ranges[i].begin, a.ranges[i].end, a.first[i]};
        });
        return found <= kHits ? found : -1;
    }
    if (a.num_ranges <= 32) {  // all are looked at
        const RowRange r = lane < a.num_ranges ? a.ranges[lane] : RowRange{0, 0};
        s.hits[threadIdx.x] = {r.begin, r.end, sum_upto(length_of(r)) - length_of(r)};
        hits = s.hits + threadIdx.x / 32 * 32;
        __syncwarp();
        return a.num_ranges;
    }
    RowRange mine[kOwnGroups<kScatterWarps>];
    u32 hit[kOwnGroups<kScatterWarps>] = {};  // a bit for each lane
    if (past_groups<kScatterWarps>(threadIdx.x, a.num_ranges)) s.group_sum[threadIdx.x] = s.group_hits[threadIdx.x] = 0;
    share_groups<kScatterWarps>(a.ranges, a.num_ranges, [&](int i, int group, RowRange r) {
        mine[i] = r;
        hit[i] = __ballot_sync(~0u, max(row0, r.begin) < min(row1, r.end));
        const u32 sum = __reduce_add_sync(~0u, length_of(r));
        if (lane == 0) s.group_sum[group] = sum, s.group_hits[group] = __popc(hit[i]);
    });
    __syncthreads();
    const Groups sums = groups_of(s.group_sum), places = groups_of(s.group_hits);
    const bool fits = places.all <= kHits;
#pragma unroll
    for (int i = 0; i < kOwnGroups<kScatterWarps>; ++i) {
        if (fits && hit[i] == 0) continue;
        const int group = warp + kScatterWarps * i;
        const u32 length = length_of(mine[i]), first = sums.before_group(group) + sum_upto(length) - length;
        const u32 place = places.before_group(group) + __popc(hit[i] & ((1u << lane) - 1));
        if (fits && (hit[i] >> lane & 1)) s.hits[place] = {mine[i].begin, mine[i].end, first};
        // Sums of all ranges: the same from every block that needs them.
        if (!fits && 32 * group + lane < a.num_ranges) a.scratch[32 * group + lane] = first;
    }
    __syncthreads();
    return fits ? places.all : -1;
}

// A block owns neighbouring tiles, at most 32 rows or a part of one row each; its warps take them in turns. What a tile
// gets arrives in layers, so that one stage holds one value at most for each element; a tile of one layer leaves as it
// came.
template <class T>
__device__ void scatter_tiles(const ScatterArgs& a) {
    extern __shared__ __align__(128) char raw[];
    ScatterSmem& s = *reinterpret_cast<ScatterSmem*>(raw);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_rows = a.num_rows;
    const u32 row_bytes = a.row_elements * sizeof(T);
    const u32 piece = min(row_bytes, kRowStageBytes);  // of a row, in a tile
    const u32 tile_rows = min(32u, kRowStageBytes / piece);
    const u32 parts = (row_bytes - 1) / kRowStageBytes + 1;  // of a row; more than one: tile_rows is 1
    const u32 tiles = ((num_rows - 1) / tile_rows + 1) * parts, each = (tiles - 1) / gridDim.x + 1;
    // Where a block looks at all ranges anyway, its tiles are apart: neighbours in time are neighbours in memory.
    const bool few = !a.first && a.num_ranges <= 32;
    const u32 apart = few ? gridDim.x : 1, tile0 = few ? blockIdx.x : each * blockIdx.x;
    const u32 tile1 = few ? tiles : min(tile0 + each, tiles);
    struct Place {
        int row0, row1;
        u32 offset, width;  // of each row, in bytes
    };
    auto place_of = [&](u32 tile) -> Place {
        const u32 group = parts == 1 ? tile : tile / parts, offset = (tile - group * parts) * kRowStageBytes;
        const int row0 = group * tile_rows;
        return {row0, min(row0 + static_cast<int>(tile_rows), num_rows), offset, min(piece, row_bytes - offset)};
    };
    start_ring(s.full[warp], a.ranges, a.num_ranges);
    if (tile0 >= tile1) return;
    const Hit* hits;
    const int found = list_hits(a, s, place_of(tile0).row0, place_of(tile1 - 1).row1, hits);
    const int count = found < 0 ? a.num_ranges : found;
    const long long* first = a.first ? a.first : a.scratch;

    // The next layer of this warp's tiles, on its way into the stage.
    u32 next = tile0 + warp * apart;
    int at = 0;         // in the hits, of the 32 that are looked at
    u32 waiting = ~0u;  // those of them that are not on their way yet
    auto load = [&](int stage) {
        Layer layer{-1, 0, 0};
        if (next < tile1) {
            const Place place = place_of(next);
            layer.tile = next;
            while (!layer.last) {
                u32 own = 0;
                const char* from = nullptr;
                if (at + lane < count && (waiting >> lane & 1)) {
                    const Hit h = found < 0 ? Hit{a.ranges[at + lane].begin, a.ranges[at + lane].end, first[at + lane]}
                                            : hits[at + lane];
                    const int begin = max(place.row0, h.begin), end = min(place.row1, h.end);
                    if (begin < end) {
                        own = ~0u >> (32 - (end - begin)) << (begin - place.row0);
                        from = static_cast<const char*>(a.src) + (h.first + begin - h.begin) * row_bytes + place.offset;
                    }
                }
                waiting = __ballot_sync(~0u, own);
                u32 taken = waiting;
                const u32 rows = __reduce_or_sync(~0u, own);
                if ((rows & layer.rows) || __reduce_add_sync(~0u, __popc(own)) != __popc(rows)) {
                    // Some rows come twice: as many pieces as there are before the first that does.
                    u32 seen = layer.rows;
                    taken = 0;
                    for (u32 left = waiting; left; left &= left - 1) {
                        const u32 one = __shfl_sync(~0u, own, __ffs(left) - 1);
                        if (one & seen) break;
                        seen |= one;
                        taken |= left & -left;
                    }
                    layer.rows = seen;
                } else {
                    layer.rows |= rows;
                }
                if (taken >> lane & 1)
                    bulk_load(s.stage[warp][stage] + (__ffs(own) - 1) * piece, from, __popc(own) * place.width,
                              s.full[warp][stage]);
                waiting &= ~taken;
                if (waiting) break;
                at += 32;
                waiting = ~0u;
                if (at >= count) {
                    layer.last = 1;
                    at = 0;
                    next += kScatterWarps * apart;
                }
            }
            if (lane == 0) barrier_arrive_expect(s.full[warp][stage], __popc(layer.rows) * place.width);
        }
        if (lane == 0) s.layer[warp][stage] = layer;
        __syncwarp();
    };

    constexpr int kVecs = kRowStageBytes / 16 / 32;  // of a lane
    int row_of[kVecs], times[kVecs] = {};
    float sum[kVecs][kPerVec<T>] = {};
#pragma unroll
    for (int i = 0; i < kVecs; ++i) row_of[i] = min(31, (lane + 32 * i) * 16 / piece);
    bool fresh = true;  // no layer of this tile yet
    int loaded = 0;
    while (loaded < kScatterStages) load(loaded++);
    for (int n = 0;; ++n) {
        const int stage = n % kScatterStages;
        const Layer layer = s.layer[warp][stage];
        if (layer.tile < 0) break;
        const Place place = place_of(layer.tile);
        const int rows = place.row1 - place.row0;
        char* dst = static_cast<char*>(a.dst) + static_cast<long long>(place.row0) * row_bytes + place.offset;
        barrier_wait(s.full[warp][stage], n / kScatterStages % 2);
        const bool as_it_is = fresh && layer.last && layer.rows == ~0u >> (32 - rows);
        if (!as_it_is) {
            uint4* arrived = reinterpret_cast<uint4*>(s.stage[warp][stage]);
#pragma unroll
            for (int i = 0; i < kVecs; ++i) {
                if (layer.rows >> row_of[i] & 1) {
                    float x[kPerVec<T>];
                    unpack<T>(arrived[lane + 32 * i], x);
#pragma unroll
                    for (int e = 0; e < kPerVec<T>; ++e) sum[i][e] += x[e];
                    ++times[i];
                }
            }
            fresh = layer.last;
            if (layer.last) {
#pragma unroll
                for (int i = 0; i < kVecs; ++i) {
                    const float factor = a.mean && times[i] > 1 ? __frcp_rn(static_cast<float>(times[i])) : 1.f;
#pragma unroll
                    for (int e = 0; e < kPerVec<T>; ++e) sum[i][e] *= factor;
                    arrived[lane + 32 * i] = pack_vec<T>(sum[i]);
#pragma unroll
                    for (int e = 0; e < kPerVec<T>; ++e) sum[i][e] = 0;
                    times[i] = 0;
                }
                fence_async_shared();
                __syncwarp();
            }
        }
        // A stage is free once it is read: by the warp now, by its store while the next one is looked at.
        if (lane == 0) {
            if (layer.last) {
                bulk_store(dst, s.stage[warp][stage], rows * place.width);
                bulk_wait_read<1>();
            } else {
                bulk_wait_read<0>();
            }
        }
        __syncwarp();
        for (; loaded < n + kScatterStages + !layer.last; ++loaded) load(loaded % kScatterStages);
    }
    if (lane == 0) bulk_wait_read<0>();
}

extern "C" __global__ __launch_bounds__(32 * kScatterWarps, 1) void scatter_f32(const __grid_constant__ ScatterArgs a) {
    scatter_tiles<float>(a);
}
extern "C" __global__ __launch_bounds__(32 * kScatterWarps,
                                        1) void scatter_bf16(const __grid_constant__ ScatterArgs a) {
    scatter_tiles<bf16>(a);
}
extern "C" __global__ __launch_bounds__(32 * kScatterWarps, 1) void scatter_f16(const __grid_constant__ ScatterArgs a) {
    scatter_tiles<f16>(a);
}

// The same for rows of any size, an element a thread.
extern "C" __global__ __launch_bounds__(kThreads) void scatter1(const __grid_constant__ ScatterArgs a) {
    __shared__ int hits[kHits];
    const long long each = (a.num_rows + gridDim.x - 1) / gridDim.x;
    const long long row0 = each * blockIdx.x, row1 = min(row0 + each, a.num_rows);
    if (row0 >= row1) return;
    const long long found = find_hits(a.ranges, a.num_ranges, row0, row1, [&](long long place, int i) {
        if (place < kHits) hits[place] = i;
    });
    const bool listed = found <= kHits;
    const int count = listed ? found : a.num_ranges;
    for (long long at = row0 * a.row_elements + threadIdx.x; at < row1 * a.row_elements; at += kThreads) {
        const long long row = at / a.row_elements;
        float sum = 0;
        int times = 0;
        for (int h = 0; h < count; ++h) {
            const int i = listed ? hits[h] : h;
            const RowRange r = a.ranges[i];
            if (row < r.begin || row >= r.end) continue;
            sum += load_one(a.src, a.type, at + (a.first[i] - r.begin) * a.row_elements);
            ++times;
        }
        store_one(a.dst, a.type, at, a.mean && times > 1 ? sum * __frcp_rn(static_cast<float>(times)) : sum);
    }
}

// ---- merge of two partials ----
struct Weights {
    float a, b, lse;
};
__device__ __forceinline__ Weights merge_weights(float x, float y) {
    const float most = fmaxf(x, y);
    if (most == -infinity()) return {0, 0, most};  // two empty rows: -inf - (-inf) would be NaN
    const float a = expf(x - most), b = expf(y - most), inverse = 1 / (a + b);
    return {a * inverse, b * inverse, most + logf(a + b)};
}

// Eight elements, in kWords times 16 bytes: fp32 in two, others in one.
template <int kWords>
__device__ __forceinline__ void unpack_eight(const uint4 (&words)[kWords], int type, float (&x)[8]) {
    const u32* w = &words[0].x;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        if constexpr (kWords == 2) {
            x[e] = __uint_as_float(w[e]);
        } else {
            const u16 bits = w[e / 2] >> 16 * (e % 2);
            x[e] = type == kElementBF16 ? to_float(bf16{bits}) : to_float(f16{bits});
        }
    }
}

template <int kWordsA, int kWordsB>
__device__ __forceinline__ void merge_eights(const MergeArgs& a) {
    constexpr int kAtOnce = kWordsA + kWordsB == 2 ? 4 : 2;  // of a thread
    const u32 per_row = a.dim / 8, work = a.num_rows * per_row, at = blockIdx.x * kMergeEights + threadIdx.x;
    for (u32 v0 = 0; v0 < kMergeEights; v0 += kAtOnce * kThreads) {
        uint4 p[kAtOnce][kWordsA], q[kAtOnce][kWordsB];
        float x[kAtOnce], y[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const u32 v = at + v0 + i * kThreads;
            if (v >= work) continue;
#pragma unroll
            for (int w = 0; w < kWordsA; ++w)
                p[i][w] = __ldg(static_cast<const uint4*>(a.out_a) + static_cast<u64>(v) * kWordsA + w);
#pragma unroll
            for (int w = 0; w < kWordsB; ++w)
                q[i][w] = __ldg(static_cast<const uint4*>(a.out_b) + static_cast<u64>(v) * kWordsB + w);
            x[i] = __ldg(a.lse_a + v / per_row);
            y[i] = __ldg(a.lse_b + v / per_row);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const u32 v = at + v0 + i * kThreads;
            if (v >= work) continue;
            const Weights weights = merge_weights(x[i], y[i]);
            if (v % per_row == 0) a.lse[v / per_row] = weights.lse;
            float m[8], n[8];
            unpack_eight(p[i], a.type_a, m);
            unpack_eight(q[i], a.type_b, n);
#pragma unroll
            for (int e = 0; e < 8; ++e) m[e] = m[e] * weights.a + n[e] * weights.b;
            uint4* out = static_cast<uint4*>(a.out) + static_cast<u64>(v) * kWordsA;
            if constexpr (kWordsA == 2) {
                out[0] = make_uint4(__float_as_uint(m[0]), __float_as_uint(m[1]), __float_as_uint(m[2]),
                                    __float_as_uint(m[3]));
                out[1] = make_uint4(__float_as_uint(m[4]), __float_as_uint(m[5]), __float_as_uint(m[6]),
                                    __float_as_uint(m[7]));
            } else {
                out[0] = a.type_a == kElementBF16 ? pack_vec<bf16>(m) : pack_vec<f16>(m);
            }
        }
    }
}

extern "C" __global__ __launch_bounds__(kThreads) void merge8(const __grid_constant__ MergeArgs a) {
    const bool wide_a = a.type_a == kElementF32, wide_b = a.type_b == kElementF32;
    if (wide_a && wide_b)
        merge_eights<2, 2>(a);
    else if (wide_a)
        merge_eights<2, 1>(a);
    else if (wide_b)
        merge_eights<1, 2>(a);
    else
        merge_eights<1, 1>(a);
}
extern "C" __global__ __launch_bounds__(kThreads) void merge1(const __grid_constant__ MergeArgs a) {
    for (long long at = (long long)blockIdx.x * kThreads + threadIdx.x; at < a.num_rows * a.dim;
         at += (long long)gridDim.x * kThreads) {
        const long long row = at / a.dim;
        const Weights weights = merge_weights(__ldg(a.lse_a + row), __ldg(a.lse_b + row));
        if (at % a.dim == 0) a.lse[row] = weights.lse;
        store_one(a.out, a.type_a, at,
                  load_one(a.out_a, a.type_a, at) * weights.a + load_one(a.out_b, a.type_b, at) * weights.b);
    }
}

// ---- delta = rowsum(dout * out) - dlse ----
// A group of kLanes lanes sums one row.
template <int kWidth, int kLanes>
__device__ void delta_rows(const DeltaArgs& a) {
    const long long groups = (long long)gridDim.x * (kThreads / kLanes);
    const int lane = threadIdx.x % kLanes;
    const long long begin = (long long)blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
    const long long rounds = (a.num_rows + groups - 1) / groups;
    for (long long i = 0; i < rounds; ++i) {  // the same number in every lane, for the shuffles
        const long long n = begin + i * groups;
        const bool valid = n < a.num_rows;
        const long long row = n / a.num_heads, head = n % a.num_heads;
        const long long x0 = row * a.dout_row_stride + head * a.dout_head_stride,
                        y0 = row * a.out_row_stride + head * a.out_head_stride;
        float sum = 0;
        for (int e = lane * kWidth; valid && e < a.dim; e += kLanes * kWidth) {
            if constexpr (kWidth == 8) {
                float x[8], y[8];
                load_eight(a.dout, a.type, x0 + e, x);
                load_eight(a.out, a.type, y0 + e, y);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum += x[j] * y[j];
            } else {
                sum += load_one(a.dout, a.type, x0 + e) * load_one(a.out, a.type, y0 + e);
            }
        }
#pragma unroll
        for (int step = kLanes / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (valid && lane == 0) a.delta[n] = sum - (a.dlse ? a.dlse[n] : 0.f);
    }
}

// The usual case, 2-byte elements and at most 128 of them: 16 lanes a row, four rows in flight.
extern "C" __global__ __launch_bounds__(kThreads) void delta_short(const __grid_constant__ DeltaArgs a) {
    constexpr int kAtOnce = 4, kGroups = kThreads / 16;
    const int lane = threadIdx.x % 16;
    const u32 first = blockIdx.x * (kGroups * kAtOnce) + threadIdx.x / 16;
    uint4 x[kAtOnce], y[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const u32 n = first + i * kGroups, row = n / a.num_heads, head = n % a.num_heads;
        const bool valid = n < a.num_rows && lane * 8 < a.dim;
        const u16 *from_x = static_cast<const u16*>(a.dout) + row * a.dout_row_stride + head * a.dout_head_stride,
                  *from_y = static_cast<const u16*>(a.out) + row * a.out_row_stride + head * a.out_head_stride;
        x[i] = valid ? __ldg(reinterpret_cast<const uint4*>(from_x) + lane) : uint4{};
        y[i] = valid ? __ldg(reinterpret_cast<const uint4*>(from_y) + lane) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const u32 n = first + i * kGroups, u[4] = {x[i].x, x[i].y, x[i].z, x[i].w},
                  v[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
        float sum = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const u16 p = u[e / 2] >> 16 * (e % 2), q = v[e / 2] >> 16 * (e % 2);
            sum += a.type == kElementBF16 ? to_float(bf16{p}) * to_float(bf16{q}) : to_float(f16{p}) * to_float(f16{q});
        }
#pragma unroll
        for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (n < a.num_rows && lane == 0) a.delta[n] = sum - (a.dlse ? a.dlse[n] : 0.f);
    }
}
extern "C" __global__ __launch_bounds__(kThreads) void delta8(const __grid_constant__ DeltaArgs a) {
    delta_rows<8, 16>(a);
}
extern "C" __global__ __launch_bounds__(kThreads) void delta1(const __grid_constant__ DeltaArgs a) {
    delta_rows<1, 32>(a);
}

// ---- typed ranges to band slices ----
extern "C" __global__ __launch_bounds__(kThreads) void bands(const __grid_constant__ BandArgs a) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < a.num_slices)
        a.slices[i] =
            slice_of(a.q_ranges[i].begin, a.q_ranges[i].end, a.k_ranges[i].begin, a.k_ranges[i].end, a.types[i]);
}

}  // namespace magi
