// What does a consumer of the forward do with the scores and the outputs that it holds in registers? Included by
// ffa_fwd.cu after its constants, Step and Work.
#pragma once

namespace magi {

struct Ring {
    int stage = 0;
    u32 parity = 0;
    __device__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

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

__device__ __forceinline__ void mask_scores(const Step& step, int row, int column, float (&d)[kScores]) {
    int first[2], last[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int q = row + 8 * e;
        first[e] = q + step.lo - step.key0 - column;
        last[e] = min(step.end, q + step.hi + 1) - step.key0 - column;
        if (q < step.row0 || q >= step.row1) last[e] = -1;
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
        const int at = i / 4 * 8 + i % 2, e = i / 2 % 2;
        if (at < first[e] || at >= last[e]) d[i] = -infinity();
    }
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

// Joins sinks and the previous partial, divides, writes out and lse.
__device__ __forceinline__ void write_rows(const ForwardArgs& a, const Work& work, int row, int column, float scale,
                                           const Rows& rows, float (&o)[kOuts]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        float sum = rows.sum[e];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int q = row + 8 * e;
        const bool valid = q < work.row1;
        const long long at = static_cast<long long>(q) * a.num_heads + work.head;
        const float own = sum == 0 ? -infinity() : rows.most[e] * scale * kLn2 + __logf(sum);
        const float prev = a.lse_prev && valid ? __ldg(a.lse_prev + at) : -infinity();
        float lse = log_add_exp(own, prev);
        for (int n = 0; n < a.num_sinks; ++n) lse = log_add_exp(lse, __ldg(a.sink + n * a.num_heads + work.head));
        const float keep = prev > -infinity() ? __expf(prev - lse) : 0.f;
        const float weight = sum == 0 ? 0.f : __expf(own - lse) / sum;
#pragma unroll
        for (int i = 2 * e; i < kOuts; i += 4) {
            o[i] *= weight;
            o[i + 1] *= weight;
        }
        if (a.lse_prev && valid) {
            const float* before = a.out_prev + at * a.v_dim + column;
#pragma unroll
            for (int i = 2 * e; i < kOuts; i += 4) {
                if (i / 4 * 8 < a.v_dim) {
                    const float2 x = *reinterpret_cast<const float2*>(before + i / 4 * 8);
                    o[i] += keep * x.x;
                    o[i + 1] += keep * x.y;
                }
            }
        }
        if (valid && lane % 4 == 0) a.lse[at] = lse;
        const long long to = q * a.out_row_stride + work.head * a.out_head_stride;
        if (a.out_is_float) {
            float* out = static_cast<float*>(a.out) + to + column;
#pragma unroll
            for (int i = 2 * e; i < kOuts; i += 4)
                if (valid && i / 4 * 8 < a.v_dim)
                    *reinterpret_cast<float2*>(out + i / 4 * 8) = make_float2(o[i], o[i + 1]);
        } else {
            u16* out = static_cast<u16*>(a.out) + to;
#pragma unroll
            for (int b = 0; b < kOuts; b += 16) {  // four blocks of eight columns: 16 bytes a lane
                u32 x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) x[i] = pack<T>(o[b + 4 * i + 2 * e], o[b + 4 * i + 2 * e + 1]);
                transpose_quad(x, lane);
                const int c = b * 2 + lane % 4 * 8;
                if (valid && c < a.v_dim) *reinterpret_cast<uint4*>(out + c) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }
}

}  // namespace magi
