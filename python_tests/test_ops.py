"""Do the ops keep torch's contracts? opcheck with dynamic shapes, fp64 gradients, FLOP counts, border errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import magi_attention  # noqa: F401
from magi_attention.mask import Mask

ops = torch.ops.magi
NO = 2**30


def int32(rows):
    return torch.tensor(rows, dtype=torch.int32)


def qkv(tokens_q=7, tokens_k=9, heads=4, kv_heads=2, dim=8, v_dim=None, dtype=torch.float64, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens_q, heads, dim), (tokens_k, kv_heads, dim), (tokens_k, kv_heads, v_dim or dim)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


# A causal part, a part that leaves row 6 without keys, an empty slice, a slice of one cell.
SLICES = int32([[0, 4, 0, 5, -NO, 1], [2, 6, 5, 9, 3, NO], [3, 3, 1, 1, -NO, NO], [0, 1, 8, 9, -NO, NO]])
ROWS = {
    "ranges": int32([[2, 5], [0, 1], [3, 3], [4, 6]]),
    "empty": torch.empty(0, 2, dtype=torch.int32),
    "one": int32([[5, 6]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [0, 2])
def test_opcheck_ffa(dtype, sinks):
    q, k, v = qkv(dtype=dtype, grad=True)
    sink = torch.zeros(sinks, 4, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True) if sinks else None
    opcheck(ops.ffa.slices, (q, k, v, SLICES, sink), {"softmax_scale": 0.3, "softcap": 2.0})
    opcheck(ops.ffa_max_logits, (q, k, v, SLICES, sink), {"softmax_scale": 0.3, "softcap": 2.0})
    opcheck(ops.ffa.default, (q, k, v, int32([[0, 7]]), int32([[0, 9]]), int32([1])), {"sink": sink})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_opcheck_raw_kernels(dtype):
    q, k, v = qkv(dtype=dtype)
    acc = torch.promote_types(dtype, torch.float32)
    out, lse = ops.ffa_fwd(q, k, v, SLICES, softmax_scale=0.3, out_dtype=acc)
    previous = {"out_prev": out, "lse_prev": lse, "out_dtype": acc, "after": [q, k]}
    for op in (ops.ffa_fwd.default, ops.ffa_fwd_max_logits.default):
        opcheck(op, (q, k, v, SLICES), {"softmax_scale": 0.3, **previous})
    delta = ops.ffa_delta(out, out, lse)
    opcheck(ops.ffa_delta.default, (out, out, None))
    grads = {"dq_prev": torch.ones_like(q, dtype=acc), "grad_dtype": acc, "after": [k]}
    opcheck(ops.ffa_bwd.default, (out.to(dtype), q, k, v, lse, delta, SLICES), {"softmax_scale": 0.3, **grads})
    made = {"out": out.to(dtype), "dlse": lse, **grads}
    opcheck(ops.ffa_bwd.default, (out.to(dtype), q, k, v, lse, None, SLICES), {"softmax_scale": 0.3, **made})


def test_backward_takes_delta_or_makes_it():
    q, k, v = qkv()
    out, lse = ops.ffa_fwd(q, k, v, SLICES, softmax_scale=0.3)
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    delta = ops.ffa_delta(dout, out, dlse)

    def backward(delta, **options):
        return ops.ffa_bwd(dout, q, k, v, lse, delta, SLICES, softmax_scale=0.3, **options)

    for made, given in zip(backward(None, out=out, dlse=dlse), backward(delta)):
        assert_close(made, given, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="delta or out must be given, and not both, got neither"):
        backward(None)
    with pytest.raises(RuntimeError, match="delta or out must be given, and not both, got both"):
        backward(delta, out=out)
    with pytest.raises(RuntimeError, match="dlse must be given with out only"):
        backward(delta, dlse=dlse)
    with pytest.raises(RuntimeError, match="out"):
        backward(None, out=out[1:])


@pytest.mark.parametrize("ranges", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_rows(ranges, dtype):
    total = int((ranges[:, 1] - ranges[:, 0]).sum())
    x = torch.randn(3, 6, 2).to(dtype).transpose(0, 1).requires_grad_()  # not contiguous
    y = torch.randn(total, 3, dtype=torch.float32).to(dtype).requires_grad_()
    opcheck(ops.range_gather.default, (x, ranges, total))
    for op in ("sum", "mean"):
        opcheck(ops.range_scatter_reduce.default, (y, ranges, 6, op))
    opcheck(ops.band_slices.default, (ranges, ranges, torch.ones(len(ranges), dtype=torch.int32)))


def test_opcheck_merge():
    out, lse = torch.randn(5, 2, 4), torch.randn(5, 2)
    out_i, lse_i = torch.randn(5, 2, 4), torch.randn(5, 2)
    lse[0], lse_i[1], lse[2], lse_i[2] = [float("-inf")] * 4
    opcheck(ops.merge_partials.default, tuple(t.requires_grad_() for t in (out, lse, out_i, lse_i)))


@pytest.mark.parametrize(
    "options", [{}, {"softmax_scale": 0.7, "softcap": 1.5}, {"sink": True}, {"sink": True, "softcap": 3.0}]
)
def test_gradcheck_ffa(options):
    options = dict(options)
    q, k, v = qkv(grad=True, v_dim=5)
    inputs = [q, k, v] + (
        [torch.randn(3, 4, dtype=torch.float64, requires_grad=True)] if options.pop("sink", False) else []
    )

    def attention(q, k, v, sink=None):
        out, lse = ops.ffa.slices(q, k, v, SLICES, sink, **options)
        return out, torch.where(
            lse == float("-inf"), 0.0, lse
        )  # row 6 has no keys, and finite differences of -inf are NaN

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_gradcheck_rows(op):
    ranges = ROWS["ranges"]
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.range_gather(x, ranges, 6), (x,))
    assert torch.autograd.gradcheck(lambda y: ops.range_scatter_reduce(y, ranges, 6, op), (y,))
    assert torch.autograd.gradgradcheck(lambda x: ops.range_gather(x, ranges, 6) ** 2, (x,))


def test_gradcheck_merge():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(4, 2, 3), (4, 2), (4, 2, 3), (4, 2)]]
    assert torch.autograd.gradcheck(ops.merge_partials, inputs)


def test_merge_is_attention_over_both_halves():
    q, k, v = qkv()
    whole = ops.ffa.slices(q, k, v, int32([[0, 7, 0, 9, -NO, NO]]))
    halves = [ops.ffa.slices(q, k, v, int32([[0, 7, a, b, -NO, NO]])) for a, b in [(0, 4), (4, 9)]]
    assert_close(ops.merge_partials(*halves[0], *halves[1]), whole)
    nothing = (torch.zeros_like(whole[0]), torch.full_like(whole[1], float("-inf")))
    assert_close(ops.merge_partials(*nothing, *whole), whole)
    assert_close(ops.merge_partials(*nothing, *nothing), nothing)


def test_a_row_without_keys_is_zero_and_minus_infinity():
    q, k, v = qkv(grad=True)
    out, lse = ops.ffa.slices(q, k, v, SLICES)
    assert (out[6] == 0).all() and (lse[6] == float("-inf")).all()
    out.sum().backward()
    assert (q.grad[6] == 0).all() and q.grad[:6].abs().sum() > 0 and not any(t.grad.isnan().any() for t in (q, k, v))


def test_gradient_through_lse_alone_and_not_at_all():
    q, k, v = qkv(grad=True)
    _, lse = ops.ffa.slices(q, k, v, int32([[0, 7, 0, 9, -NO, NO]]))
    lse.sum().backward()
    scores = torch.einsum("qhd,khd->qhk", q.detach(), k.detach().repeat_interleave(2, 1)) * 8**-0.5
    expected = torch.einsum("qhk,khd->qhd", scores.softmax(-1), k.detach().repeat_interleave(2, 1)) * 8**-0.5
    assert_close(q.grad, expected)
    assert (v.grad == 0).all()


def test_rows_repeat_and_skip():
    x = torch.arange(12.0).reshape(6, 2)
    ranges = ROWS["ranges"]
    index = torch.tensor([2, 3, 4, 0, 4, 5])
    y = ops.range_gather(x, ranges, 6)
    assert torch.equal(y, x[index])
    assert torch.equal(ops.range_scatter_reduce(y, ranges, 6), torch.zeros(6, 2).index_add_(0, index, y))
    assert torch.equal(ops.range_scatter_reduce(y, ranges, 6, "mean"), x * torch.tensor([1, 0, 1, 1, 1, 1.0])[:, None])


def test_flop_counter_reads_the_slices():
    mask = Mask.causal(64)
    q, k, v = qkv(64, 64, 4, 2, 16, dtype=torch.float32, grad=True)
    with FlopCounterMode(display=False) as counter:
        out, _ = ops.ffa.slices(q, k, v, mask.slices)
        assert counter.get_total_flops() == 4 * mask.area() * 4 * 16
        out.sum().backward()
    assert counter.get_total_flops() == 3.5 * 4 * mask.area() * 4 * 16


def test_one_graph_for_every_number_of_slices():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, s: ops.ffa.slices(q, k, v, s),
        fullgraph=True,
        backend="aot_eager_decomp_partition",
        dynamic=False,
    )
    counter = torch._dynamo.utils.counters["stats"]
    before = counter["unique_graphs"]
    for n in (1, 0, 2, 4, 3):
        q, k, v = qkv(grad=True, seed=n)
        slices = SLICES[:n].clone()
        torch._dynamo.decorators.mark_unbacked(slices, 0)
        out, lse = compiled(q, k, v, slices)
        (out.sum() + lse.nan_to_num(neginf=0.0).sum()).backward()
        expected = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out_e, lse_e = ops.ffa.slices(*expected, slices)
        (out_e.sum() + lse_e.nan_to_num(neginf=0.0).sum()).backward()
        assert_close((out, lse), (out_e, lse_e))
        assert_close([t.grad for t in (q, k, v)], [t.grad for t in expected])
    assert counter["unique_graphs"] - before == 1


def bad_calls():
    q, k, v = qkv()
    one = int32([[0, 7, 0, 9, -NO, NO]])
    r = int32([[0, 7]]), int32([[0, 9]]), int32([0])
    yield "q must have shape", lambda: ops.ffa.slices(q[0], k, v, one)
    yield "k must have dtype float64, got float32", lambda: ops.ffa.slices(q, k.float(), v, one)
    yield "k must have the head_dim of q", lambda: ops.ffa.slices(q, k[..., :4], v, one)
    yield "v must have the tokens and heads of k", lambda: ops.ffa.slices(q, k, v[:3], one)
    yield "multiple of the kv heads", lambda: ops.ffa.slices(q[:, :3], k, v, one)
    yield "slices must have shape", lambda: ops.ffa.slices(q, k, v, one[:, :5])
    yield "slices must have dtype int32", lambda: ops.ffa.slices(q, k, v, one.long())
    yield (
        r"slices\[0\] must have a q range within \[0, 7\)",
        lambda: ops.ffa.slices(q, k, v, one + int32([0, 1, 0, 0, 0, 0])),
    )
    yield (
        r"slices\[0\] must have a k range within \[0, 9\)",
        lambda: ops.ffa.slices(q, k, v, one + int32([0, 0, 10, 0, 0, 0])),
    )
    yield "softcap must be", lambda: ops.ffa.slices(q, k, v, one, softcap=-1.0)
    yield "softmax_scale must be finite", lambda: ops.ffa.slices(q, k, v, one, softmax_scale=float("nan"))
    yield "sink must have shape", lambda: ops.ffa.slices(q, k, v, one, torch.zeros(1, 3, dtype=torch.float64))
    yield "sink must have dtype float64", lambda: ops.ffa.slices(q, k, v, one, torch.zeros(1, 4))
    yield "attn_type_map\\[0\\] must be 0", lambda: ops.ffa(q, k, v, r[0], r[1], int32([4]))
    yield "k_ranges must have shape", lambda: ops.ffa(q, k, v, r[0], r[1].repeat(2, 1), r[2])
    yield "q_ranges\\[0\\] must be", lambda: ops.ffa(q, k, v, int32([[3, 2]]), r[1], r[2])
    yield "out_prev and lse_prev", lambda: ops.ffa_fwd(q, k, v, one, softmax_scale=1.0, out_prev=q)
    yield "out_dtype must be", lambda: ops.ffa_fwd(q, k, v, one, softmax_scale=1.0, out_dtype=torch.float16)
    yield "total must be the rows in ranges, 7, got 6", lambda: ops.range_gather(q, r[0], 6)
    yield r"ranges\[0\] must lie within", lambda: ops.range_gather(q[:5], r[0], 7)
    yield "op must be 'sum' or 'mean'", lambda: ops.range_scatter_reduce(q, r[0], 7, "max")
    yield "out_i must have the shape of out", lambda: ops.merge_partials(q, q[..., 0], k, k[..., 0])


@pytest.mark.parametrize("message, call", list(bad_calls()))
def test_bad_input_is_refused_by_name(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_raw_kernels_refuse_to_lose_a_gradient():
    q, k, v = qkv(grad=True)
    with pytest.raises(RuntimeError, match="ffa_fwd is a raw kernel and not differentiable, but q requires a gradient"):
        ops.ffa_fwd(q, k, v, SLICES, softmax_scale=1.0)
    with torch.no_grad():
        ops.ffa_fwd(q, k, v, SLICES, softmax_scale=1.0)


@pytest.mark.parametrize("op", [ops.ffa.slices, ops.ffa_max_logits])
@pytest.mark.parametrize("head_dim, v_dim", [(192, 128), (64, 256)])
def test_heads_of_two_widths_have_gradients_on_cuda(op, head_dim, v_dim):
    """Their shapes, on a fake device. (Autograd needs a real one.)"""
    with FakeTensorMode():
        q, k, v = inputs = [
            torch.empty(9, heads, dim, device="cuda", dtype=torch.bfloat16)
            for heads, dim in ((4, head_dim), (2, head_dim), (2, v_dim))
        ]
        slices = torch.empty(3, 6, device="cuda", dtype=torch.int32)
        out, lse, *_ = op(q, k, v, slices)
        assert out.shape == (9, 4, v_dim)
        grads = ops.ffa_bwd(out, q, k, v, lse, ops.ffa_delta(out, out, None), slices, softmax_scale=1.0)
        for grad, x in zip(grads, inputs):
            assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)
