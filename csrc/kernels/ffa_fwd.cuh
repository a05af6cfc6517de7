// What does a consumer of the forward do with the scores and the outputs that it holds in registers? Included by
// ffa_fwd.cu after its constants, Step and Work.
#pragma once

namespace magi {

constexpr float kLimit =
    1 << 15;  // of the sum of a thread's weights: more than 2^kForwardSlack times them all, less than f16 holds

enum Mode { kPlain, kCareful, kMasked };  // of a consumer's step

struct Rows {       // softmax state of a thread's two rows, r and r + 8
    float most[2];  // the maximum in use: at most kForwardSlack below the true one
    float sum[2], rescale[2];
    float found[2];  // the largest scores that the last search saw
};

// Scores in log2 units where they are transformed one by one; otherwise they stay raw and the scale is folded into the
// exponent.
__device__ __forceinline__ void transform_scores(const ForwardArgs& a, float (&d)[kScores]) {
    if (a.softcap > 0) {
        const float inner = 2 * kLog2e * a.scale / a.softcap, outer = a.softcap * kLog2e;
#pragma unroll
        for (int i = 0; i < kScores; ++i) d[i] = outer - __fdividef(2 * outer, exp2_fast(d[i] * inner) + 1);  // tanh
    } else {
#pragma unroll
        for (int i = 0; i < kScores; ++i) d[i] *= a.scale_log2;
    }
}

// Of the columns 8j and 8j + 1, j from 0 on, those below `end`, as bits 2j and 2j + 1.
__device__ __forceinline__ u32 columns_below(int end) {
    const int at = max(end, 0), count = at / 8 * 2 + min(at % 8, 2);
    return count >= 32 ? ~0u : (1u << count) - 1;
}

__device__ __forceinline__ void mask_scores(const Step& step, int row, int column, float (&d)[kScores]) {
    static_assert(kScores <= 64, "32 columns of each of two rows");
    u32 allowed[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int q = row + 8 * e, first = q + step.lo - step.key0 - column;
        const int end = min(step.end, q + step.hi + 1) - step.key0 - column;
        allowed[e] = q < step.row0 || q >= step.row1 ? 0 : columns_below(end) & ~columns_below(first);
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i)
        if (!(allowed[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) d[i] = -infinity();
}

// Moves the rows' maximum and says whether outputs of this warp have to be rescaled for it.
__device__ __forceinline__ bool move_maximum(float scale, float slack, const float (&d)[kScores], Rows& rows) {
    float most[2], odd_most[2];  // two chains a row keep the arithmetic units busy
#pragma unroll
    for (int e = 0; e < 2; ++e) most[e] = d[2 * e], odd_most[e] = d[2 * e + 1];
#pragma unroll
    for (int i = 4; i < kScores; i += 2) {
        most[i / 2 % 2] = fmaxf(most[i / 2 % 2], d[i]);
        odd_most[i / 2 % 2] = fmaxf(odd_most[i / 2 % 2], d[i + 1]);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        most[e] = fmaxf(most[e], odd_most[e]);
        most[e] = fmaxf(most[e], __shfl_xor_sync(~0u, most[e], 1));
        most[e] = fmaxf(most[e], __shfl_xor_sync(~0u, most[e], 2));
        rows.found[e] = most[e];
    }
    const bool grew = __any_sync(~0u, most[0] > rows.most[0] + slack || most[1] > rows.most[1] + slack);
    if (grew) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            most[e] = fmaxf(most[e], rows.most[e]);
            rows.rescale[e] = most[e] == -infinity() ? 1.f : exp2_fast((rows.most[e] - most[e]) * scale);
            rows.most[e] = most[e];
            rows.sum[e] *= rows.rescale[e];
        }
    }
    return grew;
}

__device__ __forceinline__ float log_add_exp(float x, float y) {
    const float most = fmaxf(x, y), least = fminf(x, y);
    return most == -infinity() ? most : most + __logf(1 + __expf(least - most));
}

// Joins a row's lse with the previous partial, whose share of the outputs is `keep` then, and with the sinks.
__device__ __forceinline__ float join_lse(const ForwardArgs& a, float own, long long at, int head, bool valid,
                                          float& keep) {
    const float prev = a.lse_prev && valid ? __ldg(a.lse_prev + at) : -infinity();
    float lse = log_add_exp(own, prev);
#pragma unroll 1
    for (int n = 0; n < a.num_sinks; ++n) lse = log_add_exp(lse, __ldg(a.sink + n * a.num_heads + head));
    keep = prev > -infinity() ? __expf(prev - lse) : 0.f;
    return lse;
}

// The rows' lse, written, and what their outputs are to be multiplied by.
__device__ __forceinline__ void finish_rows(const ForwardArgs& a, const Work& work, int row, float scale,
                                            const Rows& rows, float (&weight)[2], float (&keep)[2]) {
    float lse[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        float sum = rows.sum[e];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        lse[e] = sum == 0 ? -infinity() : rows.most[e] * scale * kLn2 + __logf(sum);
        weight[e] = sum == 0 ? 0.f : __fdividef(1.f, sum);
        keep[e] = 0;
    }
    if (a.lse_prev || a.num_sinks > 0) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int q = row + 8 * e;
            const float own = lse[e];
            lse[e] = join_lse(a, own, static_cast<long long>(q) * a.num_heads + work.head, work.head, q < work.row1,
                              keep[e]);
            if (weight[e] > 0) weight[e] *= __expf(own - lse[e]);
        }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e)
        if (row + 8 * e < work.row1 && threadIdx.x % 4 == 0)
            a.lse[static_cast<long long>(row + 8 * e) * a.num_heads + work.head] = lse[e];
}

// Joins sinks and the previous partial, divides, writes out and lse.
__device__ __forceinline__ void write_rows(const ForwardArgs& a, const Work& work, int row, int column, float scale,
                                           const Rows& rows, const float (&o)[kOuts]) {
    float weight[2], keep[2];
    finish_rows(a, work, row, scale, rows, weight, keep);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int q = row + 8 * e;
        const bool valid = q < work.row1;
        const long long at = static_cast<long long>(q) * a.num_heads + work.head;
        float x[kOuts / 2];
#pragma unroll
        for (int i = 0; i < kOuts / 2; ++i) x[i] = o[i / 2 * 4 + 2 * e + i % 2] * weight[e];
        if (a.lse_prev && valid) {
            const float* before = a.out_prev + at * a.v_dim + column;
#pragma unroll
            for (int i = 0; i < kOuts / 2; i += 2) {
                if (i * 4 < a.v_dim) {
                    const float2 y = *reinterpret_cast<const float2*>(before + i * 4);
                    x[i] += keep[e] * y.x;
                    x[i + 1] += keep[e] * y.y;
                }
            }
        }
        const long long to = q * a.out_row_stride + work.head * a.out_head_stride;
        if (a.out_is_float) {
            float* out = static_cast<float*>(a.out) + to + column;
#pragma unroll
            for (int i = 0; i < kOuts / 2; i += 2)
                if (valid && i * 4 < a.v_dim) *reinterpret_cast<float2*>(out + i * 4) = make_float2(x[i], x[i + 1]);
        } else {
            // Two blocks of eight columns: neighbours swap words, and a quad of lanes writes 32 bytes side by side.
            const bool odd = column & 2;
            u16* out = static_cast<u16*>(a.out) + to + (odd ? 8 : 0) + (column & 4);
#pragma unroll
            for (int i = 0; i < kOuts / 2; i += 4) {
                const u32 even_block = pack<T>(x[i], x[i + 1]), odd_block = pack<T>(x[i + 2], x[i + 3]);
                const u32 own = odd ? odd_block : even_block;
                const u32 got = __shfl_xor_sync(~0u, odd ? even_block : odd_block, 1);
                if (valid && i * 4 + (odd ? 8 : 0) < a.v_dim)
                    *reinterpret_cast<uint2*>(out + i * 4) = odd ? make_uint2(got, own) : make_uint2(own, got);
            }
        }
    }
}

}  // namespace magi
