// The forward's ops, the same on every backend but for who runs a checked call: `run` takes the arguments of
// check_forward.
#pragma once

#include "ops/ffa.h"

namespace magi {

template <auto run>
struct ForwardOps {
    using Outputs = std::tuple<Tensor, Tensor>;
    using OutputsAndMax = std::tuple<Tensor, Tensor, Tensor>;

    static Outputs ffa_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slices,
                           const std::optional<Tensor>& sink, const std::optional<Tensor>& out_prev,
                           const std::optional<Tensor>& lse_prev, double softmax_scale, double softcap,
                           int64_t sm_margin, std::optional<ScalarType> out_dtype,
                           const std::optional<std::vector<Tensor>>& /*after*/) {
        ForwardCall call =
            run(q, k, v, slices, sink, out_prev, lse_prev, softmax_scale, softcap, sm_margin, out_dtype, false);
        return {call.out, call.lse};
    }

    static OutputsAndMax ffa_fwd_max(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slices,
                                     const std::optional<Tensor>& sink, const std::optional<Tensor>& out_prev,
                                     const std::optional<Tensor>& lse_prev, double softmax_scale, double softcap,
                                     int64_t sm_margin, std::optional<ScalarType> out_dtype,
                                     const std::optional<std::vector<Tensor>>& /*after*/) {
        ForwardCall call =
            run(q, k, v, slices, sink, out_prev, lse_prev, softmax_scale, softcap, sm_margin, out_dtype, true);
        return {call.out, call.lse, call.max_logits};
    }

    static Outputs ffa_slices(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slices,
                              const std::optional<Tensor>& sink, std::optional<double> softmax_scale, double softcap,
                              bool /*deterministic: a forward always is*/, int64_t sm_margin) {
        return ffa_fwd(q, k, v, slices, sink, std::nullopt, std::nullopt, scale_or_default(softmax_scale, q), softcap,
                       sm_margin, std::nullopt, std::nullopt);
    }

    static OutputsAndMax ffa_max(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slices,
                                 const std::optional<Tensor>& sink, std::optional<double> softmax_scale, double softcap,
                                 bool /*deterministic*/, int64_t sm_margin) {
        return ffa_fwd_max(q, k, v, slices, sink, std::nullopt, std::nullopt, scale_or_default(softmax_scale, q),
                           softcap, sm_margin, std::nullopt, std::nullopt);
    }
};

}  // namespace magi
