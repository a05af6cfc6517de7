// What the backward's main kernel needs before it: statistics by head, zeros to add dq to and, where it is
// deterministic, the order of visits. All memory-bound.
#include "ffa_bwd.cuh"
#include "ptx.cuh"

namespace magi {

constexpr int kThreads = 256, kWarps = kThreads / 32, kZeros = 1024;

struct Smem {
    float lse[32][33], delta[32][33];
    int warp_sum[kWarps];
    alignas(16) float zeros[kZeros];
};

// 32 rows of 32 heads of lse and delta from [rows, heads] to [heads, rows_pad]. Rows without keys get lse = +inf, so
// that every exp2(s - lse) is 0, never NaN.
__device__ void transpose_stats(const BackwardPrepareArgs& a, Smem& s, int row0, int head0) {
    const int x = threadIdx.x % 32, y = threadIdx.x / 32;
    for (int i = y; i < 32; i += kWarps) {
        const int row = row0 + i, head = head0 + x;
        const bool valid = row < a.num_q && head < a.num_heads;
        const long long at = static_cast<long long>(row) * a.num_heads + head;
        const float l = valid ? a.lse[at] : -infinity();
        s.lse[i][x] = l == -infinity() ? infinity() : l * kLog2e;
        s.delta[i][x] = valid && l != -infinity() ? a.delta[at] : 0.f;
    }
    __syncthreads();
    for (int i = y; i < 32 && head0 + i < a.num_heads; i += kWarps) {
        const long long at = static_cast<long long>(head0 + i) * a.rows_pad + row0 + x;
        a.lse_log2[at] = s.lse[x][i];
        a.delta_out[at] = s.delta[x][i];
    }
    __syncthreads();
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
        int sum = own;
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += below;
        }
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

// One block of threads for kPrepareRows rows of 32 heads.
extern "C" __global__ __launch_bounds__(kThreads) void backward_prepare(const __grid_constant__ BackwardPrepareArgs a) {
    __shared__ Smem s;
    let_later_kernels_start();
    const long long blocks = static_cast<long long>(gridDim.x) * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x; i < kZeros; i += kThreads) s.zeros[i] = 0;
    fence_async_shared();
    wait_for_earlier_kernels();
    const bool tall = a.middle && long_walk(*a.middle);
    __syncthreads();
    if (threadIdx.x < 32) {
        const long long num_zeros = tall ? a.num_zeros_tall : a.num_zeros;
        for (long long i = block * 32 + threadIdx.x; i * kZeros < num_zeros; i += blocks * 32) {
            const long long left = num_zeros - i * kZeros;
            bulk_store(a.zeros + i * kZeros, s.zeros, static_cast<u32>(left < kZeros ? left : kZeros) * sizeof(float));
        }
    }
    for (int i = 0; i < kPrepareRows; i += 32) transpose_stats(a, s, blockIdx.x * kPrepareRows + i, blockIdx.y * 32);
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
