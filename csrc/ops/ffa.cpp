// The attention ops on the CPU, and the direct calls' way to them.
#include <torch/csrc/stable/library.h>

#include "cpu/cpu.h"
#include "ops/forward_ops.h"

namespace magi {
namespace {

ForwardCall forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slices,
                    const std::optional<Tensor>& sink, const std::optional<Tensor>& out_prev,
                    const std::optional<Tensor>& lse_prev, double softmax_scale, double softcap, int64_t sm_margin,
                    std::optional<ScalarType> out_dtype, bool max_logits) {
    ForwardCall call = check_forward(q, k, v, slices, sink, out_prev, lse_prev, softmax_scale, softcap, sm_margin,
                                     out_dtype, max_logits);
    cpu::ffa_forward(call.params);
    return call;
}

Tensor ffa_delta(const Tensor& dout, const Tensor& out, const std::optional<Tensor>& dlse) {
    DeltaCall call = check_delta(dout, out, dlse);
    cpu::ffa_delta(float_dtype(out.scalar_type(), "out"), row_count(out, "out"), (int)out.size(1), (int)out.size(2),
                   heads_of(call.dout), heads_of(call.out), dlse ? call.dlse.data_ptr() : nullptr,
                   call.delta.data_ptr());
    return call.delta;
}

std::tuple<Tensor, Tensor, Tensor> ffa_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& lse, const std::optional<Tensor>& delta_in,
                                           const Tensor& slices, const std::optional<Tensor>& dq_prev,
                                           const std::optional<Tensor>& out, const std::optional<Tensor>& dlse,
                                           double softmax_scale, double softcap, bool deterministic, int64_t sm_margin,
                                           std::optional<ScalarType> grad_dtype,
                                           const std::optional<std::vector<Tensor>>& /*after*/) {
    BackwardCall call = check_backward(dout, q, k, v, lse, delta_in, slices, dq_prev, out, dlse, softmax_scale, softcap,
                                       deterministic, sm_margin, grad_dtype);
    Tensor delta;
    if (out) {
        delta = ffa_delta(dout, *out, dlse);
        call.params.delta = delta.data_ptr();
    }
    cpu::ffa_backward(call.params);
    return {call.dq, call.dk, call.dv};
}

Tensor band_slices(const Tensor& q_ranges, const Tensor& k_ranges, const Tensor& attn_type_map) {
    BandCall call = check_bands(q_ranges, k_ranges, attn_type_map);
    const int64_t n = call.slices.size(0);
    const int *q_data = (const int*)call.q_ranges.data_ptr(), *k_data = (const int*)call.k_ranges.data_ptr(),
              *type_data = (const int*)call.types.data_ptr();
    Slice* out = (Slice*)call.slices.data_ptr();
    for (int64_t i = 0; i < n; ++i) {
        const int *qr = q_data + 2 * i, *kr = k_data + 2 * i;
        MAGI_CHECK(0 <= qr[0] && qr[0] <= qr[1] && qr[1] < kMaxRows, "q_ranges[", i,
                   "] must be 0 <= begin <= end < 2**29, got [", qr[0], ", ", qr[1], ")");
        MAGI_CHECK(0 <= kr[0] && kr[0] <= kr[1] && kr[1] < kMaxRows, "k_ranges[", i,
                   "] must be 0 <= begin <= end < 2**29, got [", kr[0], ", ", kr[1], ")");
        MAGI_CHECK(kFull <= type_data[i] && type_data[i] <= kBiCausal, "attn_type_map[", i,
                   "] must be 0 (full), 1 (causal), 2 (inv_causal) or 3 (bi_causal), got ", type_data[i]);
        out[i] = slice_of(qr[0], qr[1], kr[0], kr[1], type_data[i]);
    }
    return call.slices;
}

}  // namespace
}  // namespace magi

STABLE_TORCH_LIBRARY_IMPL(magi, CPU, m) {
    using Forward = magi::ForwardOps<&magi::forward>;
    m.impl("ffa.slices", TORCH_BOX(&Forward::ffa_slices));
    m.impl("ffa_fwd", TORCH_BOX(&Forward::ffa_fwd));
    m.impl("ffa_max_logits", TORCH_BOX(&Forward::ffa_max));
    m.impl("ffa_fwd_max_logits", TORCH_BOX(&Forward::ffa_fwd_max));
    m.impl("ffa_bwd", TORCH_BOX(&magi::ffa_bwd));
    m.impl("ffa_delta", TORCH_BOX(&magi::ffa_delta));
    m.impl("band_slices", TORCH_BOX(&magi::band_slices));
}
