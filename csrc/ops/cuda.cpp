// The ops on CUDA, all but the backward: same checks as on the CPU, then launches on torch's current stream. Values in
// device tensors (slices, ranges, types) are not read on the host: that would wait for the device.
#include "cuda/cuda.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "ops/cuda_tensors.h"
#include "ops/forward_ops.h"
#include "ops/rows.h"

namespace magi {
namespace {

using torch::stable::accelerator::DeviceGuard;
ForwardCall forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slices,
                    const std::optional<Tensor>& sink, const std::optional<Tensor>& out_prev,
                    const std::optional<Tensor>& lse_prev, double softmax_scale, double softcap, int64_t sm_margin,
                    std::optional<ScalarType> out_dtype, bool max_logits) {
    const int device = q.get_device_index();
    const DeviceGuard guard(device);
    ForwardCall call = check_forward(mappable(q), mappable(k), mappable(v), slices, sink, out_prev, lse_prev,
                                     softmax_scale, softcap, sm_margin, out_dtype, max_logits);
    cuda::check_support(call.params.dtype, call.params.shape);
    const Tensor workspace = scratch(q, cuda::forward_workspace(call.params));
    cuda::ffa_forward(call.params, workspace.data_ptr(), device);
    return call;
}

Tensor ffa_delta(const Tensor& dout, const Tensor& out, const std::optional<Tensor>& dlse) {
    const int device = out.get_device_index();
    const DeviceGuard guard(device);
    DeltaCall call = check_delta(dout, out, dlse);
    cuda::ffa_delta(float_dtype(out.scalar_type(), "out"), row_count(out, "out"), (int)out.size(1), (int)out.size(2),
                    heads_of(call.dout), heads_of(call.out), dlse ? (const float*)call.dlse.data_ptr() : nullptr,
                    (float*)call.delta.data_ptr(), device);
    return call.delta;
}

Tensor band_slices(const Tensor& q_ranges, const Tensor& k_ranges, const Tensor& attn_type_map) {
    const int device = q_ranges.get_device_index();
    const DeviceGuard guard(device);
    BandCall call = check_bands(q_ranges, k_ranges, attn_type_map);
    cuda::band_slices((const RowRange*)call.q_ranges.data_ptr(), (const RowRange*)call.k_ranges.data_ptr(),
                      (const int*)call.types.data_ptr(), (Slice*)call.slices.data_ptr(),
                      row_count(call.q_ranges, "q_ranges"), device);
    return call.slices;
}

Tensor range_gather(const Tensor& x, const Tensor& ranges, int64_t total) {
    const int device = x.get_device_index();
    const DeviceGuard guard(device);
    GatherCall call = check_gather(x, ranges, total);
    const int64_t n = row_count(call.ranges, "ranges");
    const Tensor workspace = scratch(x, cuda::ranges_workspace(n));
    cuda::range_gather(call.x.data_ptr(), call.out.data_ptr(), call.row_elements * (int64_t)x.element_size(), total,
                       (const RowRange*)call.ranges.data_ptr(), n, workspace.data_ptr(), device);
    return call.out;
}

Tensor range_scatter_reduce(const Tensor& y, const Tensor& ranges, int64_t rows, const std::string& op) {
    const int device = y.get_device_index();
    const DeviceGuard guard(device);
    ScatterCall call = check_scatter(y, ranges, rows, op);
    const int64_t n = row_count(call.ranges, "ranges");
    const Tensor workspace = scratch(y, cuda::ranges_workspace(n));
    cuda::range_scatter_reduce(float_dtype(y.scalar_type(), "y"), call.y.data_ptr(), call.out.data_ptr(), y.size(0),
                               rows, call.row_elements, (const RowRange*)call.ranges.data_ptr(), n, call.mean,
                               workspace.data_ptr(), device);
    return call.out;
}

std::tuple<Tensor, Tensor> merge_partials(const Tensor& out, const Tensor& lse, const Tensor& out_i,
                                          const Tensor& lse_i) {
    const int device = out.get_device_index();
    const DeviceGuard guard(device);
    MergeCall call = check_merge(out, lse, out_i, lse_i);
    cuda::merge_partials(float_dtype(out.scalar_type(), "out"), call.out_a.data_ptr(),
                         (const float*)call.lse_a.data_ptr(), float_dtype(out_i.scalar_type(), "out_i"),
                         call.out_b.data_ptr(), (const float*)call.lse_b.data_ptr(), call.out.data_ptr(),
                         (float*)call.lse.data_ptr(), out.size(0) * out.size(1), (int)out.size(2), device);
    return {call.out, call.lse};
}

}  // namespace
}  // namespace magi

STABLE_TORCH_LIBRARY_IMPL(magi, CUDA, m) {
    using Forward = magi::ForwardOps<&magi::forward>;
    m.impl("ffa.slices", TORCH_BOX(&Forward::ffa_slices));
    m.impl("ffa_fwd", TORCH_BOX(&Forward::ffa_fwd));
    m.impl("ffa_max_logits", TORCH_BOX(&Forward::ffa_max));
    m.impl("ffa_fwd_max_logits", TORCH_BOX(&Forward::ffa_fwd_max));
    m.impl("ffa_delta", TORCH_BOX(&magi::ffa_delta));
    m.impl("band_slices", TORCH_BOX(&magi::band_slices));
    m.impl("range_gather", TORCH_BOX(&magi::range_gather));
    m.impl("range_scatter_reduce", TORCH_BOX(&magi::range_scatter_reduce));
    m.impl("merge_partials", TORCH_BOX(&magi::merge_partials));
}
