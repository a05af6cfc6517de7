// Attention on the CPU, row by row: the plainest form of the formula.
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/element.h"

namespace magi::cpu {
namespace {

template <class Acc>
Acc capped(Acc score, Acc softcap) {
    return softcap > 0 ? softcap * std::tanh(score / softcap) : score;
}

template <class T, class Out>
void forward(const ForwardParams& p) {
    using Acc = acc_t<T>;
    constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
    const AttentionShape& sh = p.shape;
    const int group = sh.num_q_heads / sh.num_kv_heads;
    parallel_for(0, (int64_t)sh.num_q * sh.num_q_heads, 8, [&](int64_t begin, int64_t end) {
        std::vector<Acc> acc(sh.v_dim);
        for (int64_t i = begin; i < end; ++i) {
            const int row = i / sh.num_q_heads, head = i % sh.num_q_heads;
            const T* q = (const T*)p.q.data + row * p.q.row_stride + head * p.q.head_stride;
            Acc most = kNone, sum = 0;
            std::fill(acc.begin(), acc.end(), Acc(0));
            auto add = [&](Acc score, auto value) {
                if (score == kNone) return;
                const Acc next = std::max(most, score), keep = std::exp(most - next), weight = std::exp(score - next);
                sum = sum * keep + weight;
                for (int e = 0; e < sh.v_dim; ++e) acc[e] = acc[e] * keep + weight * value(e);
                most = next;
            };
            for (int n = 0; n < p.num_slices; ++n) {
                const Slice& s = p.slices[n];
                if (row < s.q0 || row >= s.q1) continue;
                const Range keys = keys_of_rows(s, row, row + 1);
                for (int key = keys.begin; key < std::min(keys.end, s.k1); ++key) {
                    const T* k = (const T*)p.k.data + key * p.k.row_stride + head / group * p.k.head_stride;
                    const T* v = (const T*)p.v.data + key * p.v.row_stride + head / group * p.v.head_stride;
                    Acc score = 0;
                    for (int e = 0; e < sh.head_dim; ++e) score += to_acc(q[e]) * to_acc(k[e]);
                    add(capped(score * Acc(p.softmax_scale), Acc(p.softcap)), [&](int e) { return to_acc(v[e]); });
                }
            }
            for (int n = 0; n < p.num_sinks; ++n) add(((const Acc*)p.sink)[n * sh.num_q_heads + head], [](int) { return Acc(0); });
            if (p.lse_prev) {
                const Acc* prev = (const Acc*)p.out_prev + i * sh.v_dim;
                add(((const Acc*)p.lse_prev)[i], [&](int e) { return prev[e]; });
            }
            ((Acc*)p.lse)[i] = sum > 0 ? most + std::log(sum) : kNone;
            Out* out = (Out*)p.out.data + row * p.out.row_stride + head * p.out.head_stride;
            for (int e = 0; e < sh.v_dim; ++e) out[e] = from_acc<Out>(sum > 0 ? acc[e] / sum : Acc(0));
        }
    });
}

template <class T, class Grad>
void backward(const BackwardParams& p) {
    using Acc = acc_t<T>;
    constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
    const AttentionShape& sh = p.shape;
    const int group = sh.num_q_heads / sh.num_kv_heads;
    parallel_for(0, sh.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t kv_head = begin; kv_head < end; ++kv_head) {
            std::vector<Acc> dk((size_t)sh.num_k * sh.head_dim), dv((size_t)sh.num_k * sh.v_dim), dq(sh.head_dim);
            for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
                for (int row = 0; row < sh.num_q; ++row) {
                    const int64_t i = (int64_t)row * sh.num_q_heads + head;
                    const T* q = (const T*)p.q.data + row * p.q.row_stride + head * p.q.head_stride;
                    const T* dout = (const T*)p.dout.data + row * p.dout.row_stride + head * p.dout.head_stride;
                    const Acc lse = ((const Acc*)p.lse)[i], delta = ((const Acc*)p.delta)[i];
                    for (int e = 0; e < sh.head_dim; ++e)
                        dq[e] = p.dq_prev ? to_acc(((const Grad*)p.dq_prev)[i * sh.head_dim + e]) : Acc(0);
                    for (int n = 0; n < p.num_slices && lse != kNone; ++n) {
                        const Slice& s = p.slices[n];
                        if (row < s.q0 || row >= s.q1) continue;
                        const Range keys = keys_of_rows(s, row, row + 1);
                        for (int key = keys.begin; key < std::min(keys.end, s.k1); ++key) {
                            const T* k = (const T*)p.k.data + key * p.k.row_stride + kv_head * p.k.head_stride;
                            const T* v = (const T*)p.v.data + key * p.v.row_stride + kv_head * p.v.head_stride;
                            Acc score = 0, dp = 0;
                            for (int e = 0; e < sh.head_dim; ++e) score += to_acc(q[e]) * to_acc(k[e]);
                            for (int e = 0; e < sh.v_dim; ++e) dp += to_acc(dout[e]) * to_acc(v[e]);
                            score = capped(score * Acc(p.softmax_scale), Acc(p.softcap));
                            const Acc prob = std::exp(score - lse);
                            Acc ds = prob * (dp - delta) * Acc(p.softmax_scale);
                            if (p.softcap > 0) ds *= 1 - (score / Acc(p.softcap)) * (score / Acc(p.softcap));
                            for (int e = 0; e < sh.head_dim; ++e) dq[e] += ds * to_acc(k[e]);
                            for (int e = 0; e < sh.head_dim; ++e) dk[(size_t)key * sh.head_dim + e] += ds * to_acc(q[e]);
                            for (int e = 0; e < sh.v_dim; ++e) dv[(size_t)key * sh.v_dim + e] += prob * to_acc(dout[e]);
                        }
                    }
                    Grad* out = (Grad*)p.dq.data + row * p.dq.row_stride + head * p.dq.head_stride;
                    for (int e = 0; e < sh.head_dim; ++e) out[e] = from_acc<Grad>(dq[e]);
                }
            }
            for (int key = 0; key < sh.num_k; ++key) {
                Grad* out_k = (Grad*)p.dk.data + key * p.dk.row_stride + kv_head * p.dk.head_stride;
                Grad* out_v = (Grad*)p.dv.data + key * p.dv.row_stride + kv_head * p.dv.head_stride;
                for (int e = 0; e < sh.head_dim; ++e) out_k[e] = from_acc<Grad>(dk[(size_t)key * sh.head_dim + e]);
                for (int e = 0; e < sh.v_dim; ++e) out_v[e] = from_acc<Grad>(dv[(size_t)key * sh.v_dim + e]);
            }
        }
    });
}

// The output type is the storage type or the accumulator.
template <class Body>
void dispatch2(Dtype dtype, Dtype out_dtype, const Body& body) {
    dispatch(dtype, [&]<class T>(T t) { out_dtype == dtype ? body(t, t) : body(t, acc_t<T>{}); });
}

}  // namespace

void ffa_forward(const ForwardParams& params) {
    dispatch2(params.dtype, params.out_dtype, [&]<class T, class Out>(T, Out) { forward<T, Out>(params); });
}
void ffa_backward(const BackwardParams& params) {
    dispatch2(params.dtype, params.grad_dtype, [&]<class T, class Grad>(T, Grad) { backward<T, Grad>(params); });
}

}  // namespace magi::cpu
