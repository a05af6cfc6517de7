// What the backward's main kernel needs before it: statistics by head (delta, too, where it is not given), zeros to add
// dq to and, where it is deterministic, the order of visits. All memory-bound, so it is one kernel, most of it beside
// the one that builds the table.
#include "ffa_bwd.cuh"
#include "ptx.cuh"

namespace magi {

constexpr int kThreads = 256, kWarps = kThreads / 32, kZeros = 1024;

struct Smem {
    float lse[kPrepareRows][kPrepareHeads + 1], delta[kPrepareRows][kPrepareHeads + 1];
    int warp_sum[kWarps];
    alignas(16) float zeros[kZeros];
};

// rowsum(dout * out) of kPrepareRows rows of up to kPrepareHeads heads. 16 lanes sum one row, several rows in flight.
template <class T>
__device__ void sum_rows(const BackwardPrepareArgs& a, Smem& s, int row0, int head0) {
    constexpr int kLanes = 16, kGroups = kThreads / kLanes, kAtOnce = 2;
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
    const u32 heads = min(kPrepareHeads, a.num_heads - head0);
    const int sums = min(kPrepareRows, a.num_q - row0) * static_cast<int>(heads);
    const u16 *dout = static_cast<const u16*>(a.dout) + row0 * a.dout_row_stride + head0 * a.dout_head_stride,
              *out = static_cast<const u16*>(a.out) + row0 * a.out_row_stride + head0 * a.out_head_stride;
    for (int base = 0; base < sums; base += kGroups * kAtOnce) {
        float sum[kAtOnce] = {};
        for (int column = 0; column < a.v_dim; column += 8 * kLanes) {
            uint4 x[kAtOnce], y[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const u32 n = base + i * kGroups + group, row = n / heads, head = n % heads;
                const int at = column + 8 * lane;
                const bool valid = n < static_cast<u32>(sums) && at < a.v_dim;
                // From L2: nothing of an earlier kernel is in the way.
                const auto load = [&](const u16* from) {
                    return valid ? __ldcg(reinterpret_cast<const uint4*>(from + at)) : uint4{};
                };
                x[i] = load(dout + row * a.dout_row_stride + head * a.dout_head_stride);
                y[i] = load(out + row * a.out_row_stride + head * a.out_head_stride);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const u32 u[4] = {x[i].x, x[i].y, x[i].z, x[i].w}, v[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    sum[i] += to_float(T{static_cast<u16>(u[e / 2] >> 16 * (e % 2))}) *
                              to_float(T{static_cast<u16>(v[e / 2] >> 16 * (e % 2))});
            }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
            for (int step = kLanes / 2; step; step /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], step);
            const u32 n = base + i * kGroups + group;
            if (lane == 0 && n < static_cast<u32>(sums)) s.delta[n / heads][n % heads] = sum[i];
        }
    }
}

// lse and delta of kPrepareRows rows of kPrepareHeads heads go from [rows, heads] to [heads, rows_pad]. Rows without
// keys get lse = +inf, so that every exp2(s - lse) is 0, never NaN.
__device__ void transpose_stats(const BackwardPrepareArgs& a, Smem& s, int row0, int head0) {
    static_assert(kPrepareRows == 32 && kPrepareRows * kPrepareHeads == kThreads);
    {
        const int i = threadIdx.x / kPrepareHeads, x = threadIdx.x % kPrepareHeads, row = row0 + i, head = head0 + x;
        const bool valid = row < a.num_q && head < a.num_heads;
        const long long at = static_cast<long long>(row) * a.num_heads + head;
        const float l = valid ? __ldcg(a.lse + at) : -infinity();
        float delta = 0;
        if (l != -infinity())
            delta = a.delta ? __ldcg(a.delta + at) : s.delta[i][x] - (a.dlse ? __ldcg(a.dlse + at) : 0.f);
        s.lse[i][x] = l == -infinity() ? infinity() : l * kLog2e;
        s.delta[i][x] = delta;
    }
    __syncthreads();
    const int i = threadIdx.x / 32, x = threadIdx.x % 32;
    if (head0 + i < a.num_heads) {
        const long long at = static_cast<long long>(head0 + i) * a.rows_pad + row0 + x;
        a.lse_log2[at] = s.lse[x][i];
        a.delta_out[at] = s.delta[x][i];
    }
}

// Zeros from word `begin` on up to `end`, by the first warp of every block.
__device__ void write_zeros(const BackwardPrepareArgs& a, Smem& s, long long begin, long long end) {
    const long long blocks = static_cast<long long>(gridDim.x) * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
    for (long long at = begin + (block * 32 + threadIdx.x) * kZeros; at < end; at += blocks * 32 * kZeros)
        bulk_store(a.zeros + at, s.zeros, static_cast<u32>(min(end - at, (long long)kZeros)) * sizeof(float));
}

// Visits of each block of rows by all key tiles before each tile, in ascending key order. One block of rows.
__device__ void order_visits(const BackwardPrepareArgs& a, Smem& s, int block, int num_blocks, int block_rows) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int before = 0;
    for (int first = 0; first < a.table.num_tiles; first += kThreads) {
        const int t = first + threadIdx.x;
        int own = 0;
        if (t < a.table.num_tiles) {
            const Tile tile = a.table.unsorted[t];
            const int key1 = min(tile.row0 + a.table.tile_rows, a.num_k);
            for (int e = 0; e < tile.num_slices; ++e) {
                const Slice x = tile.first >= 0 ? a.table.pool[tile.first + e].slice
                                                : table_slice(a.slices[e], a.num_q, a.num_k, true);
                own += visits_block(tile_columns(x, tile.row0, key1), block, block_rows);
            }
        }
        int sum = sum_upto(own);
        if (lane == 31) s.warp_sum[warp] = sum;
        __syncthreads();
        int all = 0;
        for (int w = 0; w < kWarps; ++w) {
            if (w < warp) sum += s.warp_sum[w];
            all += s.warp_sum[w];
        }
        if (t < a.table.num_tiles) a.order[static_cast<long long>(t) * num_blocks + block] = before + sum - own;
        before += all;
        __syncthreads();
    }
}

// One block of threads for kPrepareRows rows of kPrepareHeads heads. What builds the table lets this kernel start when
// all before it has ended (ffa_bwd.cpp), so only what needs the table waits.
extern "C" __global__ __launch_bounds__(kThreads) void backward_prepare(const __grid_constant__ BackwardPrepareArgs a) {
    __shared__ Smem s;
    const int row0 = blockIdx.x * kPrepareRows, head0 = blockIdx.y * kPrepareHeads;
    let_later_kernels_start();
    for (int i = threadIdx.x; i < kZeros; i += kThreads) s.zeros[i] = 0;
    fence_async_shared();
    __syncthreads();
    if (!a.delta) {
        if (a.type == kElementBF16)
            sum_rows<bf16>(a, s, row0, head0);
        else
            sum_rows<f16>(a, s, row0, head0);
        __syncthreads();
    }
    if (threadIdx.x < 32) write_zeros(a, s, 0, a.num_zeros);  // second, so that they are in L2 when dq is added to them
    transpose_stats(a, s, row0, head0);
    wait_for_earlier_kernels();
    const bool tall = a.middle && long_walk(*a.middle);
    if (tall && threadIdx.x < 32) write_zeros(a, s, a.num_zeros, a.num_zeros_tall);
    const int block_rows = tall ? backward_rows(128, true) : a.block_rows;
    const int num_blocks = ceil_div(a.rows_pad, block_rows);
    if (a.order && blockIdx.y == 0 && blockIdx.x < num_blocks) order_visits(a, s, blockIdx.x, num_blocks, block_rows);
    if (threadIdx.x < 32) bulk_wait();
}

// dq = scale * workspace (+ dq_prev). A thread takes 16 columns of two rows.
template <class T>
__device__ void finish(const BackwardFinishArgs& a) {
    const int blocks = a.padded_dim / 64;
    const long long item = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int head = blockIdx.y, pair = static_cast<int>(item % 2), warp = static_cast<int>(item / 2 % 4);
    const int block = static_cast<int>(item / 8 % blocks), row4 = static_cast<int>(item / (8 * blocks));
    const int column = block * 64 + warp * 16;
    if (row4 * 4 >= a.num_q || column >= a.head_dim) return;
    const float* from = a.dq + ((static_cast<long long>(head) * blocks + block) * a.rows_pad + row4 * 4) * 64;
    float x[2][16];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int at = (warp * 64 + i * 8 + pair * 4) ^ (row4 % 2 * 16);
        const float4 f = __ldcs(reinterpret_cast<const float4*>(from + at));
        x[0][i] = f.x * a.scale;
        x[1][i] = f.y * a.scale;
        x[0][8 + i] = f.z * a.scale;
        x[1][8 + i] = f.w * a.scale;
    }
    const int count = min(16, a.head_dim - column);  // head_dim is a multiple of 8
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int row = row4 * 4 + pair * 2 + e;
        if (row >= a.num_q) continue;
        if (a.dq_prev) {
            const T* prev = static_cast<const T*>(a.dq_prev) +
                            (static_cast<long long>(row) * gridDim.y + head) * a.head_dim + column;
#pragma unroll
            for (int i = 0; i < 16; ++i)
                if (i < count) x[e][i] += to_float(prev[i]);
        }
        T* out = static_cast<T*>(a.out) + row * a.out_row_stride + head * a.out_head_stride + column;
#pragma unroll
        for (int i = 0; i < 16; i += 8) {
            if (i >= count) continue;
            const float* y = x[e] + i;
            if constexpr (sizeof(T) == 4) {
                *reinterpret_cast<float4*>(out + i) = make_float4(y[0], y[1], y[2], y[3]);
                *reinterpret_cast<float4*>(out + i + 4) = make_float4(y[4], y[5], y[6], y[7]);
            } else {
                *reinterpret_cast<uint4*>(out + i) =
                    make_uint4(pack<T>(y[0], y[1]), pack<T>(y[2], y[3]), pack<T>(y[4], y[5]), pack<T>(y[6], y[7]));
            }
        }
    }
}

extern "C" __global__ __launch_bounds__(kThreads) void backward_finish(const __grid_constant__ BackwardFinishArgs a) {
    if (a.middle && !long_walk(*a.middle)) return;
    if (a.is_float)
        finish<float>(a);
    else if (a.type == kElementBF16)
        finish<bf16>(a);
    else
        finish<f16>(a);
}

}  // namespace magi
