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
                rows.begin < rows.end && rows.begin / kBackwardRows <= block && block <= (rows.end - 1) / kBackwardRows;
        }
    }
}

// dq = scale * workspace (+ dq_prev). A thread takes 16 columns of a row: consecutive threads share 4-row blocks.
template <class T>
__device__ void finish(const BackwardFinishArgs& a) {
    const int blocks = a.padded_dim / 32;  // of 16 columns in a half
    const long long item = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int head = blockIdx.y, in4 = static_cast<int>(item % 4), y = static_cast<int>(item / 4 % blocks);
    const int half = static_cast<int>(item / (4 * blocks) % 2);
    const int row = static_cast<int>(item / (8 * blocks)) * 4 + in4;
    const int column = half * (a.padded_dim / 2) + y * 16;
    if (row >= a.num_q || column >= a.head_dim) return;
    const int width = a.padded_dim / 2;
    const float* from =
        a.dq + ((static_cast<long long>(head) * 2 + half) * a.rows_pad + row - in4) * width + y * 64 + in4 * 16;
    float x[16];
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
        const float4 f = __ldcs(reinterpret_cast<const float4*>(from) + lane);
        x[2 * lane] = f.x * a.scale;
        x[2 * lane + 1] = f.y * a.scale;
        x[8 + 2 * lane] = f.z * a.scale;
        x[9 + 2 * lane] = f.w * a.scale;
    }
    const int count = min(16, a.head_dim - column);  // head_dim is a multiple of 8
    const T* prev = static_cast<const T*>(a.dq_prev);
    T* out = static_cast<T*>(a.out) + row * a.out_row_stride + head * a.out_head_stride + column;
    if (prev) {
        prev += (static_cast<long long>(row) * gridDim.y + head) * a.head_dim + column;
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (i < count) x[i] += to_float(prev[i]);
    }
#pragma unroll
    for (int i = 0; i < 16; i += 8) {
        if (i >= count) continue;
        if constexpr (sizeof(T) == 4) {
            *reinterpret_cast<float4*>(out + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
            *reinterpret_cast<float4*>(out + i + 4) = make_float4(x[i + 4], x[i + 5], x[i + 6], x[i + 7]);
        } else {
            *reinterpret_cast<uint4*>(out + i) = make_uint4(pack<T>(x[i], x[i + 1]), pack<T>(x[i + 2], x[i + 3]),
                                                            pack<T>(x[i + 4], x[i + 5]), pack<T>(x[i + 6], x[i + 7]));
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
