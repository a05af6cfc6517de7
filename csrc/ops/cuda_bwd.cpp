// The attention backward on CUDA: same checks as on the CPU, then launches on torch's current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/cuda.h"
#include "cuda/ffa_bwd.h"
#include "ops/cuda_tensors.h"
#include "ops/ffa.h"

namespace magi {
namespace {

std::tuple<Tensor, Tensor, Tensor> ffa_bwd(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                           const Tensor& lse, const std::optional<Tensor>& delta, const Tensor& slices,
                                           const std::optional<Tensor>& dq_prev, const std::optional<Tensor>& out,
                                           const std::optional<Tensor>& dlse, double softmax_scale, double softcap,
                                           bool deterministic, int64_t sm_margin, std::optional<ScalarType> grad_dtype,
                                           const std::optional<std::vector<Tensor>>& /*after*/) {
    const int device = q.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    BackwardCall call = check_backward(mappable(dout), mappable(q), mappable(k), mappable(v), lse, delta, slices,
                                       dq_prev, out ? std::optional(mappable(*out)) : out, dlse, softmax_scale, softcap,
                                       deterministic, sm_margin, grad_dtype);
    cuda::check_support(call.params.dtype, call.params.shape);
    const Tensor workspace = scratch(q, cuda::backward_workspace(call.params, device));
    cuda::ffa_backward(call.params, workspace.data_ptr(), device);
    return {call.dq, call.dk, call.dv};
}

}  // namespace
}  // namespace magi

STABLE_TORCH_LIBRARY_IMPL(magi, CUDA, m) { m.impl("ffa_bwd", TORCH_BOX(&magi::ffa_bwd)); }
