// Row movement on the device: gather and its adjoint, the merge of partial results, the backward's row sums, band
// slices. All are bound by memory: 16-byte accesses, several in flight, a grid that fills the chip and loops.
#include "ptx.cuh"

namespace magi {

constexpr int kThreads = 256;

// ---- ranges ----
// Exclusive running sum of the range lengths, by one block; first has room for num_ranges + 1.
__device__ void scan_ranges(const RowRange* ranges, int num_ranges, long long* first) {
    __shared__ long long warp_sum[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    long long carry = 0;
    for (int base = 0; base < num_ranges; base += blockDim.x) {
        const int i = base + threadIdx.x;
        const long long own = i < num_ranges ? max(0, ranges[i].end - ranges[i].begin) : 0;
        long long x = own;
        for (int step = 1; step < 32; step *= 2) {
            const long long below = __shfl_up_sync(~0u, x, step);
            if (lane >= step) x += below;
        }
        if (lane == 31) warp_sum[warp] = x;
        __syncthreads();
        long long before = carry;
        for (int w = 0; w < warps; ++w) {
            if (w < warp) before += warp_sum[w];
            carry += warp_sum[w];
        }
        if (i < num_ranges) first[i] = before + x - own;
        __syncthreads();
    }
    if (threadIdx.x == 0) first[num_ranges] = carry;
    __syncthreads();
}

extern "C" __global__ __launch_bounds__(1024) void scan(const __grid_constant__ ScanArgs a) {
    scan_ranges(a.ranges, a.num_ranges, a.first);
}

// The range that holds position row of the concatenation.
__device__ int range_of(const long long* first, int num_ranges, long long row) {
    int low = 0, high = num_ranges;  // first[low] <= row < first[high]
    while (high - low > 1) {
        const int mid = (low + high) / 2;
        if (first[mid] <= row)
            low = mid;
        else
            high = mid;
    }
    return low;
}

// ---- gather ----
template <class Vec>
__device__ void gather_rows(const GatherArgs& a) {
    __shared__ long long few[kFewRanges + 1];
    __shared__ long long source[kThreads];  // byte offsets of the rows of this tile
    const long long* first = a.first;
    if (!first) {
        scan_ranges(a.ranges, a.num_ranges, few);
        first = few;
    }
    const long long total = min(a.total, first[a.num_ranges]);
    const int vecs = a.row_bytes / sizeof(Vec);
    const int tile_rows = max(1, min(kThreads, int(32768 / max(1LL, a.row_bytes))));
    for (long long row0 = (long long)blockIdx.x * tile_rows; row0 < total; row0 += (long long)gridDim.x * tile_rows) {
        const int rows = min((long long)tile_rows, total - row0);
        if (threadIdx.x < rows) {
            const int i = range_of(first, a.num_ranges, row0 + threadIdx.x);
            source[threadIdx.x] = (a.ranges[i].begin + row0 + threadIdx.x - first[i]) * a.row_bytes;
        }
        __syncthreads();
        const int work = rows * vecs;
        Vec* dst = reinterpret_cast<Vec*>(a.dst + row0 * a.row_bytes);
        auto load = [&](int i) { return __ldg(reinterpret_cast<const Vec*>(a.src + source[i / vecs]) + i % vecs); };
        int i = threadIdx.x;
        for (; i + 3 * kThreads < work; i += 4 * kThreads) {
            const Vec x0 = load(i), x1 = load(i + kThreads), x2 = load(i + 2 * kThreads), x3 = load(i + 3 * kThreads);
            dst[i] = x0;
            dst[i + kThreads] = x1;
            dst[i + 2 * kThreads] = x2;
            dst[i + 3 * kThreads] = x3;
        }
        for (; i < work; i += kThreads) dst[i] = load(i);
        __syncthreads();
    }
}

extern "C" __global__ __launch_bounds__(kThreads) void gather16(const __grid_constant__ GatherArgs a) {
    gather_rows<uint4>(a);
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
__device__ void store_eight(void* data, int type, long long i, const float (&x)[8]) {
    if (type == kElementF32) {
        float4* p = reinterpret_cast<float4*>(static_cast<float*>(data) + i);
        p[0] = make_float4(x[0], x[1], x[2], x[3]);
        p[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
        u32 w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e)
            w[e] = type == kElementBF16 ? pack<bf16>(x[2 * e], x[2 * e + 1]) : pack<f16>(x[2 * e], x[2 * e + 1]);
        *reinterpret_cast<uint4*>(static_cast<u16*>(data) + i) = make_uint4(w[0], w[1], w[2], w[3]);
    }
}

// ---- scatter-reduce: each row is summed once, in fp32, over its positions in ascending order ----
constexpr int kScatterRows = 8, kHits = 512;

template <int kWidth>
__device__ void scatter_rows(const ScatterArgs& a) {
    __shared__ long long few[kFewRanges + 1];
    __shared__ int hits[kHits], warp_count[kThreads / 32];
    const long long* first = a.first;
    if (!first) {
        scan_ranges(a.ranges, a.num_ranges, few);
        first = few;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (long long row0 = (long long)blockIdx.x * kScatterRows; row0 < a.num_rows;
         row0 += (long long)gridDim.x * kScatterRows) {
        const long long row1 = min(row0 + kScatterRows, a.num_rows);
        int count = 0;  // ranges that touch these rows, ascending; beyond kHits all ranges are walked instead
        for (int base = 0; base < a.num_ranges; base += kThreads) {
            const int i = base + threadIdx.x;
            const bool hit = i < a.num_ranges && a.ranges[i].begin < row1 && a.ranges[i].end > row0 &&
                             a.ranges[i].begin < a.ranges[i].end;
            const u32 mask = __ballot_sync(~0u, hit);
            if (lane == 0) warp_count[warp] = __popc(mask);
            __syncthreads();
            int before = count;
            for (int w = 0; w < kThreads / 32; ++w) {
                if (w < warp) before += warp_count[w];
                count += warp_count[w];
            }
            const int at = before + __popc(mask & ((1u << lane) - 1));
            if (hit && at < kHits) hits[at] = i;
            __syncthreads();
        }
        const bool all = count > kHits;
        const int walk = all ? a.num_ranges : count;
        const long long vecs = a.row_elements / kWidth;
        for (long long v = threadIdx.x; v < (row1 - row0) * vecs; v += kThreads) {
            const long long row = row0 + v / vecs, element = v % vecs * kWidth;
            float sum[kWidth] = {};
            int times = 0;
            for (int h = 0; h < walk; ++h) {
                const int i = all ? h : hits[h];
                const RowRange r = a.ranges[i];
                if (row < r.begin || row >= r.end) continue;
                const long long from = (first[i] + row - r.begin) * a.row_elements + element;
                ++times;
                if constexpr (kWidth == 8) {
                    float x[8];
                    load_eight(a.src, a.type, from, x);
#pragma unroll
                    for (int e = 0; e < 8; ++e) sum[e] += x[e];
                } else {
                    sum[0] += load_one(a.src, a.type, from);
                }
            }
            if (a.mean && times > 1) {
                const float factor = __frcp_rn(float(times));
#pragma unroll
                for (int e = 0; e < kWidth; ++e) sum[e] *= factor;
            }
            if constexpr (kWidth == 8)
                store_eight(a.dst, a.type, row * a.row_elements + element, sum);
            else
                store_one(a.dst, a.type, row * a.row_elements + element, sum[0]);
        }
        __syncthreads();
    }
}

extern "C" __global__ __launch_bounds__(kThreads) void scatter8(const __grid_constant__ ScatterArgs a) {
    scatter_rows<8>(a);
}
extern "C" __global__ __launch_bounds__(kThreads) void scatter1(const __grid_constant__ ScatterArgs a) {
    scatter_rows<1>(a);
}

// ---- merge of two partials ----
template <int kWidth>
__device__ void merge_rows(const MergeArgs& a) {
    const int vecs = a.dim / kWidth;
    const long long work = a.num_rows * vecs;
    for (long long v = (long long)blockIdx.x * kThreads + threadIdx.x; v < work; v += (long long)gridDim.x * kThreads) {
        const long long row = v / vecs, at = row * a.dim + v % vecs * kWidth;
        const float x = __ldg(a.lse_a + row), y = __ldg(a.lse_b + row), most = fmaxf(x, y);
        const bool none = most == -infinity();  // two empty rows: -inf - (-inf) would be NaN
        const float weight_x = none ? 0.f : expf(x - most), weight_y = none ? 0.f : expf(y - most),
                    sum = weight_x + weight_y;
        const float inverse = none ? 0.f : 1 / sum;
        if (v % vecs == 0) a.lse[row] = none ? most : most + logf(sum);
        if constexpr (kWidth == 8) {
            float p[8], q[8];
            load_eight(a.out_a, a.type_a, at, p);
            load_eight(a.out_b, a.type_b, at, q);
#pragma unroll
            for (int e = 0; e < 8; ++e) p[e] = p[e] * (weight_x * inverse) + q[e] * (weight_y * inverse);
            store_eight(a.out, a.type_a, at, p);
        } else {
            store_one(a.out, a.type_a, at,
                      load_one(a.out_a, a.type_a, at) * (weight_x * inverse) +
                          load_one(a.out_b, a.type_b, at) * (weight_y * inverse));
        }
    }
}

extern "C" __global__ __launch_bounds__(kThreads) void merge8(const __grid_constant__ MergeArgs a) { merge_rows<8>(a); }
extern "C" __global__ __launch_bounds__(kThreads) void merge1(const __grid_constant__ MergeArgs a) { merge_rows<1>(a); }

// ---- delta = rowsum(dout * out) - dlse
// ------------------------------------------------------------------------------------------------ A group of kLanes
// lanes sums one row.
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
