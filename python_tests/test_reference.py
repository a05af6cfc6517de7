"""The reference itself: against scaled_dot_product_attention, against finite differences, and at its edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from magi_attention.mask import Mask
from magi_attention.reference import assert_accurate, assert_attention, attention, attention_and_grads

# Rows 3 of 6 and key 6 of 7 are bare: an empty row and an unused key in the same small case.
GAPS = Mask.from_slices([[0, 3], [4, 6]], [[0, 3], [0, 6]], ["causal", "full"], total_q=6, total_k=7)


def inputs(num_q: int = 6, num_k: int = 7, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q [num_q, 4, 3], k [num_k, 2, 3], v [num_k, 2, 5], sink [2, 4]: grouped heads, a v_dim of its own."""
    gen = torch.Generator().manual_seed(0)
    shapes = (num_q, 4, 3), (num_k, 2, 3), (num_k, 2, 5)
    sink = torch.randn(2, 4, generator=gen, dtype=torch.float64)
    return [*(torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype) for shape in shapes), sink]


def test_agrees_with_sdpa():
    q, k, v, _ = inputs()
    mask = Mask.prefix_lm(6, 2)
    out, lse = attention(q, k[:6], v[:6], mask)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k[:6], v[:6])), attn_mask=mask.dense(), enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1))
    scores = torch.einsum("qhd,khd->qhk", q, k[:6].repeat_interleave(2, 1)) / math.sqrt(3)
    torch.testing.assert_close(lse, scores.masked_fill(~mask.dense()[:, None], -torch.inf).logsumexp(2))


def test_bool_mask_and_mask_agree():
    q, k, v, sink = inputs()
    for got, want in zip(attention(q, k, v, GAPS, sink=sink), attention(q, k, v, GAPS.dense(), sink=sink)):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"mask must be \[6, 7\]"):
        attention(q, k, v, Mask.causal(6))


def test_sink_is_a_key_without_a_value():
    q, k, v, sink = inputs()
    q, k, v = q[:, :1], k[:, :1], v[:, :1]
    mask = Mask.full(6, 7)
    out, lse = attention(q, k, v, mask, sink=sink[:, :1], softmax_scale=1.0)
    # The same through plain attention: scores of the two sinks appended by one more dimension, values zero.
    wide_q = torch.cat([q, torch.ones(6, 1, 1, dtype=q.dtype)], 2)
    wide_k = torch.cat([F.pad(k, (0, 1)), F.pad(sink[:, :1, None], (3, 0))])
    expected = attention(wide_q, wide_k, F.pad(v, (0, 0, 0, 0, 0, 2)), Mask.full(6, 9), softmax_scale=1.0)
    torch.testing.assert_close((out, lse), expected)


def test_softcap_bounds_scores():
    q, k, v, _ = inputs()
    _, lse = attention(q * 1e3, k, v, Mask.full(6, 7), softcap=2.0)
    assert (lse <= 2.0 + math.log(7)).all()
    plain = attention(q, k, v, Mask.full(6, 7))
    torch.testing.assert_close(attention(q, k, v, Mask.full(6, 7), softcap=1e6), plain)


@pytest.mark.parametrize("with_sink", [False, True])
def test_gradients_through_out_and_lse(with_sink):
    *qkv, sink = inputs()
    covered = GAPS.dense().any(1)

    def function(q, k, v, sink=None):
        out, lse = attention(q, k, v, GAPS, sink=sink, softmax_scale=0.7, softcap=1.5)
        return out, lse[covered]  # -inf has no finite difference

    leaves = [x.requires_grad_() for x in (qkv + [sink] if with_sink else qkv)]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("with_sink", [False, True])
def test_rows_and_keys_without_a_partner(with_sink):
    *qkv, sink = inputs()
    sink = sink if with_sink else None
    dout, dlse = torch.randn(6, 4, 5), torch.randn(6, 4)
    result = attention_and_grads(*qkv, GAPS, dout, dlse, sink=sink)
    bare_lse = torch.logsumexp(sink, 0) if with_sink else torch.full((4,), -torch.inf, dtype=torch.float64)
    assert (result.out[3] == 0).all()
    torch.testing.assert_close(result.lse[3], bare_lse)
    assert (result.dq[3] == 0).all() and (result.dk[6] == 0).all() and (result.dv[6] == 0).all()
    for gradient in result[2:5] + ((result.dsink,) if with_sink else ()):
        assert gradient.isfinite().all() and gradient.abs().max() > 0
    changed = torch.cat([dout[:3], dout[3:4] + 100, dout[4:]])
    for got, want in zip(attention_and_grads(*qkv, GAPS, changed, dlse, sink=sink)[2:], result[2:]):
        assert got is want is None or torch.equal(got, want), "the out of a bare row sends no gradient"


def test_nothing_to_attend():
    q, k, v, sink = inputs()
    out, lse = attention(q, k[:0], v[:0], Mask.full(6, 0), sink=sink)
    assert out.shape == (6, 4, 5) and (out == 0).all()
    torch.testing.assert_close(lse, torch.logsumexp(sink, 0).expand(6, 4))
    assert (attention(q, k[:0], v[:0], Mask.full(6, 0))[1] == -torch.inf).all()
    assert attention(q[:0], k, v, Mask.full(0, 7))[0].shape == (0, 4, 5)


def test_precisions():
    *qkv, sink = inputs(dtype=torch.bfloat16)
    out, lse = attention(*qkv, GAPS, sink=sink, dtype=None)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    out, lse = attention(*qkv, GAPS, sink=sink)
    assert out.dtype == torch.float64 and lse.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_error_contract_accepts_the_formula_and_refuses_a_wrong_mask(dtype):
    *qkv, sink = inputs(dtype=dtype)
    dout, dlse = torch.randn(6, 4, 5).to(dtype), torch.randn(6, 4)

    def function(mask):
        return lambda q, k, v, sink: attention(q, k, v, mask, sink=sink, dtype=None)

    assert_attention(function(GAPS), *qkv, GAPS, dout, dlse, sink=sink)
    one_cell_more = GAPS.dense().index_put((torch.tensor(0), torch.tensor(2)), torch.tensor(True))
    with pytest.raises(AssertionError, match="out: max error"):
        assert_attention(function(one_cell_more), *qkv, GAPS, dout, dlse, sink=sink)
    with pytest.raises(AssertionError, match="out: max error"):
        assert_attention(function(Mask.full(6, 7)), *qkv, GAPS, dout, dlse, sink=sink)


def test_error_contract_numbers():
    exact = torch.tensor([1.0, 2.0, -torch.inf], dtype=torch.float64)
    plain = exact + torch.tensor([0.0, 1e-3, 0.0])
    assert_accurate("x", exact + 1.9e-3, exact, plain)
    with pytest.raises(AssertionError, match=r"x: max error 2.100e-03 against fp64, allowed 2 \* 1.000e-03"):
        assert_accurate("x", exact + 2.1e-3, exact, plain)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_accurate("x", exact.nan_to_num(neginf=-1e30), exact, plain)
    with pytest.raises(AssertionError, match="not finite"):
        assert_accurate("x", torch.tensor([torch.nan, 2.0, -torch.inf]), exact, plain)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate("x", exact[:2], exact, plain)
    # One rounding to the dtype passes where the plain formula is exact; two do not.
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert_accurate("x", third.bfloat16(), third, third)
    with pytest.raises(AssertionError, match="max error"):
        assert_accurate("x", third.bfloat16() + 2**-8, third, third)


class StoredOut(torch.autograd.Function):
    """Exact attention of one row over two keys, but for a backward that reads the out it returned, as every kernel that
    stores it does; `wrong` multiplies what it makes of it."""

    @staticmethod
    def forward(ctx, q, k, v, wrong):
        probability = torch.softmax((q.double().transpose(0, 1) @ k.double().permute(1, 2, 0)) * q.shape[2] ** -0.5, 2)
        out = (probability @ v.double().transpose(0, 1)).transpose(0, 1).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, probability)
        ctx.wrong = wrong
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, probability = (x.double() for x in ctx.saved_tensors)
        dout = dout.double().transpose(0, 1)
        delta = (dout * out.transpose(0, 1)).sum(-1, keepdim=True) * ctx.wrong
        dscores = probability * (dout @ v.permute(1, 2, 0) - delta) * q.shape[2] ** -0.5
        dk = (dscores.mT @ q.transpose(0, 1)).sum(0)[:, None]
        dv = (probability.mT @ dout).sum(0)[:, None]
        dq = (dscores @ k.transpose(0, 1)).transpose(0, 1)
        return dq.bfloat16(), dk.bfloat16(), dv.bfloat16(), None


@pytest.mark.parametrize("seed", range(20))
def test_error_contract_knows_that_a_backward_reads_a_rounded_out(seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(n, h, 64, generator=g).bfloat16() for n, h in ((1, 4), (2, 1), (2, 1), (1, 4)))

    def function(wrong):
        def run(q, k, v):
            out = StoredOut.apply(q, k, v, wrong)
            return out, attention(q, k, v, Mask.full(1, 2), dtype=None)[1]

        return run

    assert_attention(function(1.0), q, k, v, Mask.full(1, 2), dout)
    with pytest.raises(AssertionError, match="max error"):
        assert_attention(function(1.1), q, k, v, Mask.full(1, 2), dout)
