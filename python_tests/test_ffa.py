"""Is ffa right? Out, lse and every gradient against fp64, on random masks; the same body on every device there is."""

import random
from itertools import pairwise

import pytest
import torch

from magi_attention import Mask, flex_attend
from magi_attention.reference import assert_attention, attention

ops = torch.ops.magi
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
DTYPES = {"cpu": ["float32", "float64", "bfloat16", "float16"], "cuda": ["bfloat16", "float16"]}
# Odd widths meet every padding, 64 and 128 are what models use, values may be wider or narrower than keys.
WIDTHS = {"cpu": [(1, 1), (17, 17), (64, 64), (80, 80), (24, 9), (9, 24), (128, 128)], "cuda": [(64, 64), (128, 128)]}
HEADS = [(1, 1), (2, 2), (4, 1), (6, 2), (8, 8), (64, 1)]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_mask(rng: random.Random, longest: int) -> Mask:
    """Bands of every kind on disjoint keys; empty slices, slices of one row or one key, rows and keys left out."""
    total_q, total_k = rng.randint(1, longest), rng.randint(1, longest)
    cuts = [0, *sorted(rng.randint(0, total_k) for _ in range(rng.randint(0, 6))), total_k]
    q_ranges, k_ranges, bands = [], [], []
    for k0, k1 in pairwise(cuts):
        q0 = rng.randint(0, total_q)
        q1 = rng.choice([q0, min(q0 + 1, total_q), total_q, rng.randint(q0, total_q)])
        q_ranges.append([q0, q1])
        k_ranges.append([rng.choice([k0, k0, min(k0 + 1, k1)]), k1])
        bands.append(tuple(None if rng.random() < 0.5 else rng.randint(-total_q, total_k) for _ in range(2)))
    return Mask.from_bands(q_ranges, k_ranges, bands, total_q=total_q, total_k=total_k)


def tensors(mask, heads, widths, dtype, device, seed=0, sinks=0):
    g = torch.Generator().manual_seed(seed)
    (hq, hk), (d, dv) = heads, widths
    shapes = [(mask.total_q, hq, d), (mask.total_k, hk, d), (mask.total_k, hk, dv), (mask.total_q, hq, dv)]
    q, k, v, dout = (torch.randn(s, generator=g).to(dtype).to(device) for s in shapes)
    dlse = torch.randn(mask.total_q, hq, generator=g).to(wide(dtype)).to(device)
    sink = torch.randn(sinks, hq, generator=g).to(wide(dtype)).to(device) if sinks else None
    return q, k, v, dout, dlse, sink


def ffa(mask, **options):
    return lambda q, k, v, sink=None: ops.ffa.slices(q, k, v, mask.slices.to(q.device), sink, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(60))
def test_random_masks(seed, device):
    rng = random.Random(seed)
    mask = random_mask(rng, longest=rng.choice([8, 70, 400]))
    dtype = getattr(torch, rng.choice(DTYPES[device]))
    softcap = rng.choice([0.0, 0.0, 2.0, 30.0])
    q, k, v, dout, dlse, sink = tensors(
        mask, rng.choice(HEADS), rng.choice(WIDTHS[device]), dtype, device, seed, rng.choice([0, 0, 1, 3])
    )
    assert_attention(ffa(mask, softcap=softcap), q, k, v, mask, dout, dlse, sink=sink, softcap=softcap)


NAMED = {
    "causal": Mask.causal(300),
    "full": Mask.full(130, 257),
    "documents": Mask.varlen([0, 1, 2, 65, 65, 200, 300]),
    "window": Mask.sliding_window(300, 31, 0),
    "window both sides": Mask.sliding_window(300, 7, 100),
    "blocks": Mask.block_causal(300, 96),
    "prefix": Mask.prefix_lm(300, 70),
    "inverse causal": Mask.from_slices([[0, 200]], [[50, 300]], "inv_causal", total_q=300, total_k=300),
    "bi causal": Mask.from_slices([[0, 200]], [[0, 300]], "bi_causal", total_q=300, total_k=300),
    "nested keys": Mask.from_slices(
        [[0, 50], [20, 100], [60, 61]], [[0, 90], [90, 130], [0, 90]], "full", total_q=100, total_k=130
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMED)
def test_named_masks(name, device):
    mask = NAMED[name]
    for dtype in DTYPES[device][-2:]:
        q, k, v, dout, dlse, _ = tensors(mask, (4, 2), (64, 64), getattr(torch, dtype), device)
        assert_attention(ffa(mask), q, k, v, mask, dout, dlse)


@pytest.mark.parametrize("heads", [(67, 1), (80, 1), (130, 2)])
def test_cpu_groups_wider_than_a_panel(heads):
    """A prime group, one that splits evenly, and two groups; a negative scale turns the softmax around."""
    mask = Mask.causal(37)
    q, k, v, dout, dlse, _ = tensors(mask, heads, (24, 17), torch.float32, "cpu")
    options = {"softmax_scale": -0.7, "softcap": 3.0}
    # dk and dv are one running sum over all heads of a group; plain PyTorch adds the heads pairwise.
    assert_attention(ffa(mask, **options), q, k, v, mask, dout, dlse, factor=4, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_are_read_in_place(device):
    """q, k and v as views of one projection, dout with its heads outermost and then expanded."""
    mask = NAMED["documents"]
    packed = torch.randn(300, 8, 64, device=device).to(torch.bfloat16)
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    dout = torch.randn(4, 300, 64, device=device).to(torch.bfloat16).transpose(0, 1)
    assert_attention(ffa(mask), q, k, v, mask, dout)
    dout = torch.ones(1, 1, 1, device=device, dtype=torch.bfloat16).expand(300, 4, 64)
    assert_attention(ffa(mask), q, k, v, mask, dout)


@pytest.mark.parametrize("device", DEVICES[:1])
def test_keys_that_nobody_attends_never_leak(device):
    """Poison in rows and keys outside every slice: no result may know of it, and their gradients are zeros.

    CPU only: tensor cores multiply whole tiles, where a masked 0 times NaN is NaN (docs/architecture.md).
    """
    mask = Mask.from_slices([[3, 90], [120, 200]], [[5, 70], [71, 160]], ["causal", "full"], total_q=210, total_k=190)
    q, k, v, dout, dlse, _ = tensors(mask, (4, 2), (64, 64), torch.bfloat16, device)
    rows, keys = mask.dense().any(1).to(device), mask.dense().any(0).to(device)

    def run(q, k, v, dout):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = ffa(mask)(*leaves)
        return (
            out.detach(),
            lse.detach(),
            *torch.autograd.grad([out, lse], leaves, [dout, torch.where(rows[:, None], dlse, 0)]),
        )

    clean = run(q, k, v, dout)
    for t, used in ((q, rows), (dout, rows), (k, keys), (v, keys)):
        t[~used] = torch.nan
    dout[~rows] = 0  # out is 0 there whatever comes; a NaN gradient of it would be the caller's
    poisoned = run(q, k, v, dout)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), clean, poisoned):
        assert torch.equal(a, b), name
    assert (clean[3][~keys] == 0).all() and (clean[4][~keys] == 0).all() and (clean[2][~rows] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(shape, device):
    mask = Mask.full(*shape)
    q, k, v, dout, _, _ = tensors(mask, (2, 1), (64, 64), torch.bfloat16, device)
    assert_attention(ffa(mask), q, k, v, mask, dout)


@pytest.mark.parametrize("device", DEVICES)
def test_a_previous_partial_is_merged(device):
    """Keys in two calls, the second given the first's result: the whole attention, also for rows of one part only."""
    mask = NAMED["nested keys"]
    q, k, v, *_ = tensors(mask, (4, 2), (64, 64), torch.bfloat16, device)
    slices, scale = mask.slices.to(device), 64**-0.5
    sink = torch.randn(2, 4, device=device)
    out, lse = ops.ffa_fwd(q, k, v, slices[:1], sink=sink, softmax_scale=scale, out_dtype=torch.float32)
    out, lse = ops.ffa_fwd(
        q, k, v, slices[1:], out_prev=out, lse_prev=lse, softmax_scale=scale, out_dtype=torch.float32
    )
    whole, whole_lse = ops.ffa_fwd(q, k, v, slices, sink=sink, softmax_scale=scale, out_dtype=torch.float32)
    tolerance = 1e-5 if device == "cpu" else 5e-3  # tensor cores take P in bf16
    torch.testing.assert_close(out, whole, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)
    exact = attention(q, k, v, mask, sink=sink)
    torch.testing.assert_close(lse, exact[1].float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_dq_adds_to_a_previous_one_in_the_accumulation_dtype(device):
    mask = NAMED["documents"]
    q, k, v, dout, dlse, _ = tensors(mask, (4, 2), (64, 64), torch.bfloat16, device)
    slices, scale = mask.slices.to(device), 0.125
    out, lse = ops.ffa_fwd(q, k, v, slices, softmax_scale=scale)
    delta = ops.ffa_delta(dout, out, dlse)
    previous = torch.randn(q.shape, device=device)
    options = {"softmax_scale": scale, "grad_dtype": torch.float32, "deterministic": True}
    plain = ops.ffa_bwd(dout, q, k, v, lse, delta, slices, **options)
    added = ops.ffa_bwd(dout, q, k, v, lse, delta, slices, dq_prev=previous, **options)
    assert all(t.dtype == torch.float32 for t in plain)
    torch.testing.assert_close(added[0], plain[0] + previous, atol=1e-5, rtol=1e-5)
    assert torch.equal(added[1], plain[1]) and torch.equal(added[2], plain[2])


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_repeatable(device):
    mask = NAMED["documents"]
    q, k, v, dout, dlse, _ = tensors(mask, (8, 2), (64, 64), torch.bfloat16, device)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def run():
        out, lse = ffa(mask, deterministic=True)(*leaves)
        return out, lse, *torch.autograd.grad([out, lse], leaves, [dout, torch.where(lse.isfinite(), dlse, 0)])

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def test_cpu_results_do_not_depend_on_the_number_of_threads_where_heads_suffice():
    mask = NAMED["causal"]
    q, k, v, dout, _, _ = tensors(mask, (4, 4), (64, 64), torch.float32, "cpu")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            out, lse = ffa(mask)(*leaves)
            results.append((out, lse, *torch.autograd.grad(out, leaves, dout)))
        torch.set_num_threads(16)  # more threads than kv heads: k tiles of one head are dealt out
        out, _ = ffa(mask)(*leaves)
        for a, b in zip(torch.autograd.grad(out, leaves, dout), results[0][2:]):
            torch.testing.assert_close(a, b)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("device", DEVICES)
def test_many_slices(device):
    """100,000 documents of one to three tokens: time follows the cells, not slices times tiles."""
    lengths = torch.randint(1, 4, (100_000,), generator=torch.Generator().manual_seed(0))
    mask = Mask.varlen(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
    q, k, v, *_ = tensors(mask, (1, 1), (64, 64), torch.bfloat16, device)
    out, _ = ffa(mask)(q, k, v)
    first_rows = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])[:-1]
    assert torch.equal(out[first_rows.to(device)], v[first_rows.to(device)])  # a document's first row sees itself alone
    tail = Mask.varlen(torch.cat([torch.zeros(1, dtype=torch.int64), lengths[-100:].cumsum(0)]))
    n = tail.total_q
    torch.testing.assert_close(out[-n:].double(), attention(q[-n:], k[-n:], v[-n:], tail)[0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"softmax_scale": -0.2}])
def test_max_logits(widths, options, device):
    """The largest allowed score of each head, not its stand-in by which an online softmax divides."""
    mask = random_mask(random.Random(sum(widths)), longest=400)
    q, k, v, _, _, sink = tensors(mask, (4, 2), widths, torch.bfloat16, device, sinks=1)
    q[:, 1] *= 20  # this head's scores are far larger
    out, lse, most = ops.ffa_max_logits(q, k, v, mask.slices.to(device), sink, **options)
    want = ops.ffa.slices(q, k, v, mask.slices.to(device), sink, **options)
    torch.testing.assert_close(out, want[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want[1], atol=1e-4, rtol=1e-5)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(2, 1))
    scores *= options.get("softmax_scale", widths[0] ** -0.5)
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    scores.masked_fill_(~mask.dense().to(device), -torch.inf)
    torch.testing.assert_close(most, scores.amax((1, 2)).float(), atol=1e-4, rtol=1e-5)


def test_max_logits_without_cells_and_without_gradient():
    mask = Mask.from_slices([[0, 0]], [[0, 3]], ["full"], total_q=5, total_k=3)
    q, k, v, *_ = tensors(mask, (2, 1), (16, 16), torch.float32, "cpu")
    out, lse, most = flex_attend(q.requires_grad_(), k, v, mask, return_max_logits=True)
    assert (most == -torch.inf).all() and not most.requires_grad and out.requires_grad and lse.requires_grad
