// Border of the attention ops: from tensors to parameter structs. Built into both libraries.
#include <cmath>
#include <limits>

#include "ops/ffa.h"

namespace magi {
namespace {

AttentionShape check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
    MAGI_CHECK(q.dim() == 3, "q must have shape [tokens, heads, head_dim], got ", shape_string(q));
    MAGI_CHECK(k.dim() == 3, "k must have shape [tokens, kv_heads, head_dim], got ", shape_string(k));
    MAGI_CHECK(v.dim() == 3, "v must have shape [tokens, kv_heads, v_dim], got ", shape_string(v));
    float_dtype(q.scalar_type(), "q");
    check_dtype(k, q.scalar_type(), "k");
    check_dtype(v, q.scalar_type(), "v");
    check_device(k, q, "k", "q");
    check_device(v, q, "v", "q");
    MAGI_CHECK(q.size(2) > 0 && k.size(2) == q.size(2), "k must have the head_dim of q, ", q.size(2),
               " (at least 1), got ", k.size(2));
    MAGI_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1), "v must have the tokens and heads of k, ",
               shape_string(k), ", got ", shape_string(v));
    MAGI_CHECK(v.size(2) > 0, "v must have a head dimension of at least 1, got ", shape_string(v));
    MAGI_CHECK(k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0,
               "q must have a positive multiple of the kv heads, got ", q.size(1), " query heads and ", k.size(1),
               " kv heads");
    return {row_count(q, "q"), row_count(k, "k"), (int)q.size(1), (int)k.size(1), (int)q.size(2), (int)v.size(2)};
}

Tensor check_slices(const Tensor& slices, const Tensor& q, const AttentionShape& shape) {
    Tensor table = check_table(slices, 6, "slices");
    check_device(slices, q, "slices", "q");
    MAGI_CHECK(table.size(0) < kMaxRows, "slices must have fewer than 2**29 rows, got ", table.size(0));
    if (table.is_cpu()) check_slice_values((const Slice*)table.data_ptr(), table.size(0), shape.num_q, shape.num_k);
    return table;
}

void check_scalars(double softmax_scale, double softcap, int64_t sm_margin) {
    MAGI_CHECK(std::isfinite(softmax_scale), "softmax_scale must be finite, got ", softmax_scale);
    MAGI_CHECK(std::isfinite(softcap) && softcap >= 0, "softcap must be 0 (off) or positive, got ", softcap);
    MAGI_CHECK(sm_margin >= 0 && sm_margin < 1024, "sm_margin must be a number of multiprocessors in [0, 1024), got ",
               sm_margin);
}

}  // namespace

double scale_or_default(std::optional<double> softmax_scale, const Tensor& q) {
    MAGI_CHECK(q.dim() == 3 && q.size(2) > 0, "q must have shape [tokens, heads, head_dim], got ", shape_string(q));
    return softmax_scale.value_or(1.0 / std::sqrt((double)q.size(2)));
}

void check_slice_values(const Slice* slices, int64_t num_slices, int64_t num_q, int64_t num_k) {
    for (int64_t i = 0; i < num_slices; ++i) {
        const Slice& s = slices[i];
        MAGI_CHECK(0 <= s.q0 && s.q0 <= s.q1 && s.q1 <= num_q, "slices[", i, "] must have a q range within [0, ", num_q,
                   "), got [", s.q0, ", ", s.q1, ")");
        MAGI_CHECK(0 <= s.k0 && s.k0 <= s.k1 && s.k1 <= num_k, "slices[", i, "] must have a k range within [0, ", num_k,
                   "), got [", s.k0, ", ", s.k1, ")");
    }
}

ForwardCall check_forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& slices_in,
                          const std::optional<Tensor>& sink, const std::optional<Tensor>& out_prev,
                          const std::optional<Tensor>& lse_prev, double softmax_scale, double softcap,
                          int64_t sm_margin, std::optional<ScalarType> out_dtype, bool max_logits) {
    ForwardCall call;
    const AttentionShape shape = check_qkv(q_in, k_in, v_in);
    const ScalarType type = q_in.scalar_type(), acc = accumulation_dtype(type);
    const Tensor slices = check_slices(slices_in, q_in, shape);
    check_scalars(softmax_scale, softcap, sm_margin);
    const ScalarType out_type = out_dtype.value_or(type);
    MAGI_CHECK(out_type == type || out_type == acc, "out_dtype must be ", dtype_string(type), " or ", dtype_string(acc),
               ", got ", dtype_string(out_type));

    const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in);
    call.inputs = {q, k, v, slices};
    const void *sink_data = nullptr, *out_prev_data = nullptr, *lse_prev_data = nullptr;
    int num_sinks = 0;
    if (sink) {
        MAGI_CHECK(sink->dim() == 2 && sink->size(1) == shape.num_q_heads, "sink must have shape [s_sink, ",
                   shape.num_q_heads, "] (query heads), got ", shape_string(*sink));
        check_dtype(*sink, acc, "sink");
        check_device(*sink, q, "sink", "q");
        call.inputs.push_back(as_contiguous(*sink));
        sink_data = call.inputs.back().data_ptr();
        num_sinks = (int)sink->size(0);
    }
    MAGI_CHECK(out_prev.has_value() == lse_prev.has_value(), "out_prev and lse_prev must be given together, got only ",
               out_prev ? "out_prev" : "lse_prev");
    if (out_prev) {
        check_shape(*out_prev, {shape.num_q, shape.num_q_heads, shape.v_dim}, "out_prev", "[tokens, heads, v_dim]");
        check_shape(*lse_prev, {shape.num_q, shape.num_q_heads}, "lse_prev", "[tokens, heads]");
        check_dtype(*out_prev, acc, "out_prev");
        check_dtype(*lse_prev, acc, "lse_prev");
        check_device(*out_prev, q, "out_prev", "q");
        check_device(*lse_prev, q, "lse_prev", "q");
        call.inputs.push_back(as_contiguous(*out_prev));
        out_prev_data = call.inputs.back().data_ptr();
        call.inputs.push_back(as_contiguous(*lse_prev));
        lse_prev_data = call.inputs.back().data_ptr();
    }

    call.out = make_empty(q, {shape.num_q, shape.num_q_heads, shape.v_dim}, out_type);
    call.lse = make_empty(q, {shape.num_q, shape.num_q_heads}, acc);
    if (max_logits) {
        call.max_logits = make_empty(q, {shape.num_q_heads}, acc);
        torch::stable::fill_(call.max_logits, -std::numeric_limits<double>::infinity());
    }
    call.params = {shape,
                   float_dtype(type, "q"),
                   float_dtype(out_type, "out_dtype"),
                   heads_of(q),
                   heads_of(k),
                   heads_of(v),
                   heads_of(call.out),
                   (const Slice*)slices.data_ptr(),
                   (int)slices.size(0),
                   sink_data,
                   num_sinks,
                   out_prev_data,
                   lse_prev_data,
                   call.lse.data_ptr(),
                   softmax_scale,
                   softcap,
                   (int)sm_margin,
                   max_logits ? call.max_logits.data_ptr() : nullptr};
    return call;
}

BackwardCall check_backward(const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                            const Tensor& lse_in, const std::optional<Tensor>& delta_in, const Tensor& slices_in,
                            const std::optional<Tensor>& dq_prev, const std::optional<Tensor>& out_in,
                            const std::optional<Tensor>& dlse_in, double softmax_scale, double softcap,
                            bool deterministic, int64_t sm_margin, std::optional<ScalarType> grad_dtype) {
    BackwardCall call;
    const AttentionShape shape = check_qkv(q_in, k_in, v_in);
    const ScalarType type = q_in.scalar_type(), acc = accumulation_dtype(type);
    const Tensor slices = check_slices(slices_in, q_in, shape);
    check_scalars(softmax_scale, softcap, sm_margin);
    const ScalarType grad_type = grad_dtype.value_or(type);
    MAGI_CHECK(grad_type == type || grad_type == acc, "grad_dtype must be ", dtype_string(type), " or ",
               dtype_string(acc), ", got ", dtype_string(grad_type));
    check_shape(dout_in, {shape.num_q, shape.num_q_heads, shape.v_dim}, "dout", "[tokens, heads, v_dim]");
    check_dtype(dout_in, type, "dout");
    check_device(dout_in, q_in, "dout", "q");
    check_shape(lse_in, {shape.num_q, shape.num_q_heads}, "lse", "[tokens, heads]");
    check_dtype(lse_in, acc, "lse");
    check_device(lse_in, q_in, "lse", "q");
    MAGI_CHECK(delta_in.has_value() != out_in.has_value(), "delta or out must be given, and not both, got ",
               delta_in ? "both" : "neither");
    MAGI_CHECK(!dlse_in || out_in, "dlse must be given with out only: delta, where it is given, includes it");
    const auto check_like_lse = [&](const std::optional<Tensor>& t, const char* name) {
        if (!t) return;
        check_same_shape(*t, lse_in, name, "lse");
        check_dtype(*t, acc, name);
        check_device(*t, q_in, name, "q");
    };
    check_like_lse(delta_in, "delta");
    check_like_lse(dlse_in, "dlse");
    if (out_in) {
        check_same_shape(*out_in, dout_in, "out", "dout");
        check_dtype(*out_in, type, "out");
        check_device(*out_in, q_in, "out", "q");
    }

    const Tensor q = last_contiguous(q_in), k = last_contiguous(k_in), v = last_contiguous(v_in),
                 dout = last_contiguous(dout_in), lse = as_contiguous(lse_in);
    call.inputs = {q, k, v, dout, lse, slices};
    const auto kept = [&](const std::optional<Tensor>& t) -> const void* {
        return t ? call.inputs.emplace_back(as_contiguous(*t)).data_ptr() : nullptr;
    };
    const void *delta = kept(delta_in), *dlse = kept(dlse_in);
    const Heads out = out_in ? heads_of(call.inputs.emplace_back(last_contiguous(*out_in))) : Heads{};
    const void* dq_prev_data = nullptr;
    if (dq_prev) {
        check_same_shape(*dq_prev, q, "dq_prev", "q");
        check_dtype(*dq_prev, grad_type, "dq_prev");
        check_device(*dq_prev, q, "dq_prev", "q");
        call.inputs.push_back(as_contiguous(*dq_prev));
        dq_prev_data = call.inputs.back().data_ptr();
    }
    call.dq = make_empty(q, {shape.num_q, shape.num_q_heads, shape.head_dim}, grad_type);
    call.dk = make_empty(k, {shape.num_k, shape.num_kv_heads, shape.head_dim}, grad_type);
    call.dv = make_empty(v, {shape.num_k, shape.num_kv_heads, shape.v_dim}, grad_type);
    call.params = {shape,
                   float_dtype(type, "q"),
                   float_dtype(grad_type, "grad_dtype"),
                   heads_of(q),
                   heads_of(k),
                   heads_of(v),
                   heads_of(dout),
                   heads_of(call.dq),
                   heads_of(call.dk),
                   heads_of(call.dv),
                   (const Slice*)slices.data_ptr(),
                   (int)slices.size(0),
                   lse.data_ptr(),
                   delta,
                   out,
                   dlse,
                   dq_prev_data,
                   softmax_scale,
                   softcap,
                   deterministic,
                   (int)sm_margin};
    return call;
}

BandCall check_bands(const Tensor& q_ranges, const Tensor& k_ranges, const Tensor& attn_type_map) {
    const Tensor q = check_table(q_ranges, 2, "q_ranges"), k = check_table(k_ranges, 2, "k_ranges");
    const int64_t n = q.size(0);
    check_shape(k, {n, 2}, "k_ranges", "[n, 2] like q_ranges");
    check_shape(attn_type_map, {n}, "attn_type_map", "[n] like q_ranges");
    check_dtype(attn_type_map, ScalarType::Int, "attn_type_map");
    check_device(k, q, "k_ranges", "q_ranges");
    check_device(attn_type_map, q, "attn_type_map", "q_ranges");
    return {q, k, as_contiguous(attn_type_map), make_empty(q, {n, 6})};
}

DeltaCall check_delta(const Tensor& dout, const Tensor& out, const std::optional<Tensor>& dlse) {
    MAGI_CHECK(out.dim() == 3 && out.size(2) > 0, "out must have shape [tokens, heads, v_dim], got ",
               shape_string(out));
    float_dtype(out.scalar_type(), "out");
    check_same_shape(dout, out, "dout", "out");
    check_dtype(dout, out.scalar_type(), "dout");
    check_device(dout, out, "dout", "out");
    const ScalarType acc = accumulation_dtype(out.scalar_type());
    DeltaCall call{last_contiguous(dout), last_contiguous(out), {}, make_empty(out, {out.size(0), out.size(1)}, acc)};
    if (dlse) {
        check_shape(*dlse, {out.size(0), out.size(1)}, "dlse", "[tokens, heads]");
        check_dtype(*dlse, acc, "dlse");
        check_device(*dlse, out, "dlse", "out");
        call.dlse = as_contiguous(*dlse);
    }
    return call;
}

}  // namespace magi
