// Which ops exist? Every schema of torch.ops.magi that C++ implements (group_cast and group_reduce, which need a
// process group, are defined beside their Python implementation).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(magi, m) {
    m.def(
        "ffa(Tensor q, Tensor k, Tensor v, Tensor q_ranges, Tensor k_ranges, Tensor attn_type_map, *, Tensor? "
        "sink=None, "
        "float? softmax_scale=None, float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor out, "
        "Tensor lse)");
    m.def(
        "ffa.slices(Tensor q, Tensor k, Tensor v, Tensor slices, Tensor? sink=None, *, float? softmax_scale=None, "
        "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor out, Tensor lse)");
    m.def(
        "ffa_fwd(Tensor q, Tensor k, Tensor v, Tensor slices, *, Tensor? sink=None, Tensor? out_prev=None, Tensor? "
        "lse_prev=None, "
        "float softmax_scale, float softcap=0.0, int sm_margin=0, ScalarType? out_dtype=None, Tensor[]? after=None) "
        "-> (Tensor out, Tensor lse)");
    m.def(
        "ffa_max_logits(Tensor q, Tensor k, Tensor v, Tensor slices, Tensor? sink=None, *, float? softmax_scale=None, "
        "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor out, Tensor lse, Tensor max_logits)");
    m.def(
        "ffa_fwd_max_logits(Tensor q, Tensor k, Tensor v, Tensor slices, *, Tensor? sink=None, Tensor? out_prev=None, "
        "Tensor? lse_prev=None, float softmax_scale, float softcap=0.0, int sm_margin=0, ScalarType? out_dtype=None, "
        "Tensor[]? after=None) -> (Tensor out, Tensor lse, Tensor max_logits)");
    m.def(
        "ffa_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? delta, Tensor slices, *, Tensor? "
        "dq_prev=None, Tensor? out=None, Tensor? dlse=None, "
        "float softmax_scale, float softcap=0.0, bool deterministic=False, int sm_margin=0, ScalarType? "
        "grad_dtype=None, "
        "Tensor[]? after=None) -> (Tensor dq, Tensor dk, Tensor dv)");
    m.def("ffa_delta(Tensor dout, Tensor out, Tensor? dlse=None) -> Tensor");
    m.def("band_slices(Tensor q_ranges, Tensor k_ranges, Tensor attn_type_map) -> Tensor");
    m.def("range_gather(Tensor x, Tensor ranges, SymInt total) -> Tensor");
    m.def("range_scatter_reduce(Tensor y, Tensor ranges, SymInt rows, str op=\"sum\") -> Tensor");
    m.def("merge_partials(Tensor out, Tensor lse, Tensor out_i, Tensor lse_i) -> (Tensor out, Tensor lse)");
}
