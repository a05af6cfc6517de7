// What does an attention op accept? Checks and parameter structs of ffa_fwd, ffa_bwd and ffa_delta, shared by every
// backend.
#pragma once

#include <vector>

#include "ops/checks.h"

namespace magi {

struct ForwardCall {
    ForwardParams params;
    Tensor out, lse, max_logits;  // max_logits undefined where not asked for
    std::vector<Tensor> inputs;   // owners of what params points to
};

struct BackwardCall {
    BackwardParams params;
    Tensor dq, dk, dv;
    std::vector<Tensor> inputs;
};

struct BandCall {
    Tensor q_ranges, k_ranges, types, slices;  // contiguous; slices [n, 6] to be written
};

struct DeltaCall {
    Tensor dout, out, dlse, delta;  // dlse undefined where there is none
};

ForwardCall check_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slices,
                          const std::optional<Tensor>& sink, const std::optional<Tensor>& out_prev,
                          const std::optional<Tensor>& lse_prev, double softmax_scale, double softcap,
                          int64_t sm_margin, std::optional<ScalarType> out_dtype, bool max_logits = false);

// delta, or what it is made of: out and, where there is one, dlse.
BackwardCall check_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                            const std::optional<Tensor>& delta, const Tensor& slices,
                            const std::optional<Tensor>& dq_prev, const std::optional<Tensor>& out,
                            const std::optional<Tensor>& dlse, double softmax_scale, double softcap, bool deterministic,
                            int64_t sm_margin, std::optional<ScalarType> grad_dtype);

BandCall check_bands(const Tensor& q_ranges, const Tensor& k_ranges, const Tensor& attn_type_map);

DeltaCall check_delta(const Tensor& dout, const Tensor& out, const std::optional<Tensor>& dlse);

// softmax_scale of the direct calls: 1 / sqrt(head_dim) by default.
double scale_or_default(std::optional<double> softmax_scale, const Tensor& q);

// Values of slices that live on the host; those on a device are clamped by the kernels, since reading them would wait
// for the device.
void check_slice_values(const Slice* slices, int64_t num_slices, int64_t num_q, int64_t num_k);

}  // namespace magi
