// What surrounds the backward's main kernel: statistics by head before it, the order of visits where it is
// deterministic, and dq from its workspace after it. All memory-bound.
#include "ffa_bwd.cuh"
#include "ptx.cuh"

namespace magi {

// lse and delta from [rows, heads] to [heads, rows_pad]. Rows without keys get lse = +inf, so that every exp2(s - lse)
// is 0, never NaN. One block of 32 x 8 threads a 32 x 32 tile.
extern "C" __global__ __launch_bounds__(256) void backward_stats(const __grid_constant__ BackwardStatsArgs a) {
    __shared__ float lse[32][33], delta[32][33];
    const int x = threadIdx.x % 32, y = threadIdx.x / 32, row0 = blockIdx.x * 32, head0 = blockIdx.y * 32;
    for (int i = y; i < 32; i += 8) {
        const int row = row0 + i, head = head0 + x;
        const bool valid = row < a.num_q && head < a.num_heads;
        const long long at = static_cast<long long>(row) * a.num_heads + head;
        const float l = valid ? a.lse[at] : -infinity();
        lse[i][x] = l == -infinity() ? infinity() : l * kLog2e;
        delta[i][x] = valid && l != -infinity() ? a.delta[at] : 0.f;
    }
    __syncthreads();
    for (int i = y; i < 32; i += 8) {
        const int head = head0 + i, row = row0 + x;
        if (head >= a.num_heads || row >= a.rows_pad) continue;
        a.lse_log2[static_cast<long long>(head) * a.rows_pad + row] = lse[x][i];
        a.delta_out[static_cast<long long>(head) * a.rows_pad + row] = delta[x][i];
    }
}

// Visits of each block of rows by all key tiles before each tile, in ascending key order. One thread a block of rows.
extern "C" __global__ __launch_bounds__(64) void backward_order(const __grid_constant__ BackwardOrderArgs a) {
    const int block = blockIdx.x * 64 + threadIdx.x;
    int visits = 0;
    for (int t = 0; t < a.table.num_tiles; ++t) {
        const Tile tile = a.table.unsorted[t];
        if (block < a.num_blocks) a.order[static_cast<long long>(t) * a.num_blocks + block] = visits;
        const int key1 = min(tile.row0 + kBackwardKeys, a.num_k);
        for (int e = 0; e < tile.num_slices; ++e) {
            const Slice s =
                tile.first >= 0 ? a.table.pool[tile.first + e].slice : table_slice(a.slices[e], a.num_q, a.num_k, true);
            const Range rows = tile_columns(s, tile.row0, key1);
            visits +=
                rows.begin < rows.end && rows.begin / a.block_rows <= block && block <= (rows.end - 1) / a.block_rows;
        }
    }
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

extern "C" __global__ __launch_bounds__(256) void backward_finish(const __grid_constant__ BackwardFinishArgs a) {
    if (a.is_float)
        finish<float>(a);
    else if (a.type == kElementBF16)
        finish<bf16>(a);
    else
        finish<f16>(a);
}

}  // namespace magi
