"""The CUDA forward against the fp64 reference: any slices, any layout, the same bits every time."""

import itertools

import pytest
import torch

import magi_attention  # noqa: F401
from magi_attention.reference import assert_accurate, attention

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU"),
]
ops = torch.ops.magi
NONE = 2**30


def pieces(rng, total, most):
    """`total` cut at up to `most` - 1 random places: consecutive ranges, some of them empty."""
    cuts = torch.randint(0, total + 1, (int(torch.randint(0, most, (), generator=rng)),), generator=rng).tolist()
    edges = [0, *sorted(cuts), total]
    return list(itertools.pairwise(edges))


def random_slices(rng, num_q, num_k):
    """Slices without a common cell: each piece of keys has its own cut of the rows, so row ranges overlap freely."""
    rows = []
    for k0, k1 in pieces(rng, num_k, 4):
        for q0, q1 in pieces(rng, num_q, 6):
            kind = int(torch.randint(0, 7, (), generator=rng))
            lo, hi = -NONE, NONE
            if kind in (1, 3):
                hi = k1 - q1
            if kind in (2, 3):
                lo = k0 - q0
            if kind == 4:  # a band of its own
                lo = int(torch.randint(-num_q, num_k + 1, (), generator=rng))
                hi = lo + int(torch.randint(0, 300, (), generator=rng))
            if kind == 5:
                continue  # rows of this piece do not see these keys
            if kind == 6 and k1 - k0 > 2:  # part of the keys, from an odd start
                k0 = k0 + 1
            rows.append([q0, q1, k0, k1, lo, hi])
    order = torch.randperm(len(rows), generator=rng).tolist()
    return torch.tensor([rows[i] for i in order], dtype=torch.int32).reshape(-1, 6)


def dense(slices, num_q, num_k):
    q, k = torch.arange(num_q, device="cuda")[:, None], torch.arange(num_k, device="cuda")[None]
    allowed = torch.zeros(num_q, num_k, dtype=torch.bool, device="cuda")
    for q0, q1, k0, k1, lo, hi in slices.tolist():
        allowed |= (q >= q0) & (q < q1) & (k >= k0) & (k < k1) & (k - q >= lo) & (k - q <= hi)
    return allowed


def poison(*shapes):
    """Freed NaN memory of these sizes: an output that is not written in full shows."""
    for shape, dtype in shapes:
        torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def tensors(rng, num_q, num_k, heads, kv_heads, dim, dtype, v_dim=None):
    make = lambda n, h, d: torch.randn(n, h, d, generator=rng, dtype=torch.float32).to("cuda", dtype)  # noqa: E731
    return make(num_q, heads, dim), make(num_k, kv_heads, dim), make(num_k, kv_heads, v_dim or dim)


def check(q, k, v, slices, **options):
    allowed = dense(slices, q.shape[0], k.shape[0])
    poison(((q.shape[0], q.shape[1], v.shape[2]), q.dtype), (q.shape[:2], torch.float32))
    out, lse = ops.ffa.slices(q, k, v, slices.cuda(), **options)
    options.pop("deterministic", None)
    options.pop("sm_margin", None)
    exact = attention(q, k, v, allowed, **options)
    plain = attention(q, k, v, allowed, dtype=None, **options)
    assert_accurate("out", out, exact[0], plain[0])
    assert_accurate("lse", lse, exact[1], plain[1])
    error = (out.double() - exact[0]).norm() / exact[0].norm().clamp_min(1e-30)
    assert error < 6e-3, f"relative error {error:.1e}"  # bf16 operands
    return out, lse


DIMS = [(64, 64), (128, 128), (128, 128), (40, 40), (96, 96), (192, 128), (192, 192), (256, 256), (24, 136), (176, 8)]
HEADS = [(1, 1), (2, 1), (4, 2), (3, 3), (8, 1), (64, 1)]


@pytest.mark.parametrize("seed", range(60))
def test_random_masks(seed):
    rng = torch.Generator().manual_seed(seed)
    pick = lambda options: options[int(torch.randint(0, len(options), (), generator=rng))]  # noqa: E731
    for _ in range(5):
        num_q, num_k = (int(pick([64, 300, 1000, 5000]) * torch.rand((), generator=rng)) + 1 for _ in range(2))
        heads, kv_heads = pick(HEADS if num_q * num_k < 1e6 else HEADS[:4])
        dim, v_dim = pick(DIMS)
        dtype = pick([torch.bfloat16, torch.float16])
        q, k, v = tensors(rng, num_q, num_k, heads, kv_heads, dim, dtype, v_dim)
        check(q, k, v, random_slices(rng, num_q, num_k))


def causal_documents(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return torch.tensor([[e - n, e, e - n, e, -NONE, 0] for n, e in zip(lengths, ends)], dtype=torch.int32).reshape(
        -1, 6
    )


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize(
    "options", [{"softcap": 15.0}, {"softmax_scale": 0.0}, {"softmax_scale": -0.1}, {"sm_margin": 100}]
)
def test_options(dim, options):
    rng = torch.Generator().manual_seed(1)
    check(*tensors(rng, 1500, 1500, 4, 2, dim, torch.bfloat16), causal_documents([700, 1, 130, 669]), **options)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", [[300, 1, 127, 129, 500, 3, 1200], [128] * 7, [1000, 24, 1000], [5] * 40 + [9000]])
def test_documents_that_start_anywhere(lengths, dim):
    """Tiles that begin with documents (few, long ones) and tiles that do not: rows between documents see nothing."""
    rng = torch.Generator().manual_seed(12)
    slices = causal_documents(lengths)
    total = sum(lengths) + 77
    slices[1::3, 1] = slices[1::3, 0]  # every third document is empty
    check(*tensors(rng, total, total, 2, 1, dim, torch.bfloat16), slices[torch.randperm(len(slices), generator=rng)])


def test_heads_by_sections():
    """So many heads that blocks take some after the others: one at a time, and the last nine together."""
    rng = torch.Generator().manual_seed(13)
    check(*tensors(rng, 1600, 1600, 48, 24, 128, torch.bfloat16), causal_documents([200] * 8))


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("growth", [1e-3, 1.0, 20.0])
def test_scores_that_jump(growth, dtype, dim):
    """Later keys score higher by many orders of magnitude, in some rows only: maxima move late, by more than 2^127."""
    rng = torch.Generator().manual_seed(11)
    q, k, v = tensors(rng, 1000, 2000, 2, 1, dim, dtype)
    k *= (1 + growth * torch.arange(2000, device="cuda")[:, None, None] / 100).to(dtype)
    q[::3] *= 0.01
    slices = torch.tensor([[0, 1000, 0, 2000, -NONE, NONE]], dtype=torch.int32)
    check(q, k, v, slices)


@pytest.mark.parametrize("num_sinks", [1, 3])
def test_sink(num_sinks):
    rng = torch.Generator().manual_seed(2)
    slices = causal_documents([300, 200])[:1]  # the second document's rows see nothing
    sink = torch.randn(num_sinks, 4, generator=rng).cuda()
    check(*tensors(rng, 500, 500, 4, 2, 128, torch.bfloat16), slices, sink=sink)


def test_values_narrower_than_keys():
    rng = torch.Generator().manual_seed(3)
    check(*tensors(rng, 300, 400, 2, 1, 128, torch.float16, v_dim=72), random_slices(rng, 300, 400))


def test_strided_inputs():
    rng = torch.Generator().manual_seed(4)
    slices = causal_documents([500, 524])
    packed = torch.randn(1024, 3, 4, 128, generator=rng).to("cuda", torch.bfloat16)
    check(*packed.unbind(1), slices)  # rows of one fused projection
    heads_first = torch.randn(3, 4, 1024, 128, generator=rng).to("cuda", torch.bfloat16).transpose(1, 2)
    check(*heads_first, slices)
    odd = torch.randn(3, 1024, 4, 131, generator=rng).to("cuda", torch.bfloat16)[..., 3:]  # TMA cannot read this one
    check(*odd, slices)


def test_previous_partial():
    rng = torch.Generator().manual_seed(5)
    q, k, v = tensors(rng, 700, 900, 4, 2, 128, torch.bfloat16)
    slices = random_slices(rng, 700, 900)
    first, second = slices[::2].cuda(), slices[1::2].cuda()
    scale = 128**-0.5
    out, lse = ops.ffa_fwd(q, k, v, first, softmax_scale=scale, out_dtype=torch.float32)
    poison((q.shape, torch.float32), (q.shape, q.dtype), (q.shape[:2], torch.float32))
    out, lse = ops.ffa_fwd(q, k, v, second, softmax_scale=scale, out_prev=out, lse_prev=lse)
    allowed = dense(slices, 700, 900)
    exact, plain = attention(q, k, v, allowed), attention(q, k, v, allowed, dtype=None)
    assert out.dtype == torch.bfloat16
    assert_accurate("out", out, exact[0], plain[0])
    assert_accurate("lse", lse, exact[1], plain[1])


def test_thousands_of_slices_in_one_tile():
    """More slices than the table's pool holds: every row range overlaps every other."""
    rng = torch.Generator().manual_seed(6)
    n, num_q, num_k = 3000, 1000, 3000
    slices = torch.tensor([[0, num_q, i, i + 1, -NONE, NONE] for i in range(n)], dtype=torch.int32)
    q, k, v = tensors(rng, num_q, num_k, 1, 1, 128, torch.bfloat16)
    check(q, k, v, slices)


def test_steps_that_half_of_a_tile_skips():
    """More of them in a row than the ring of keys and values holds, between steps and at the end of a tile."""
    rng = torch.Generator().manual_seed(11)
    pieces = [(0, 64, 0, 100), *((64, 128, 200 * i, 200 * i + 150) for i in range(1, 8)), (0, 64, 1700, 1900)]
    pieces += [(64, 128, 200 * i, 200 * i + 150) for i in range(10, 14)]
    slices = torch.tensor([[*piece, -NONE, NONE] for piece in pieces], dtype=torch.int32)
    check(*tensors(rng, 300, 3000, 4, 2, 128, torch.bfloat16), slices)


def test_no_slices_no_keys_no_rows():
    rng = torch.Generator().manual_seed(7)
    for num_q, num_k in ((100, 50), (100, 0), (0, 50)):
        q, k, v = tensors(rng, num_q, num_k, 2, 1, 128, torch.bfloat16)
        poison((q.shape, q.dtype), (q.shape[:2], torch.float32))
        out, lse = ops.ffa.slices(q, k, v, torch.zeros(0, 6, dtype=torch.int32, device="cuda"))
        assert out.shape == q.shape and not out.any()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)])
def test_bitwise_repeats(dim, v_dim):
    rng = torch.Generator().manual_seed(8)
    q, k, v = tensors(rng, 4096, 4096, 8, 2, dim, torch.bfloat16, v_dim)
    slices = random_slices(rng, 4096, 4096).cuda()
    first = ops.ffa.slices(q, k, v, slices)
    for _ in range(20):
        again = ops.ffa.slices(q, k, v, slices)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_streams_and_graph_replay():
    rng = torch.Generator().manual_seed(9)
    q, k, v = tensors(rng, 1000, 1000, 4, 2, 128, torch.bfloat16)
    slices = causal_documents([300, 700]).cuda()
    want = ops.ffa.slices(q, k, v, slices)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = ops.ffa.slices(q, k, v, slices)
    side.synchronize()
    assert torch.equal(got[0], want[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.ffa.slices(q, k, v, slices)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(got[0], ops.ffa.slices(q, k, v, slices)[0])


def test_typed_ranges():
    rng = torch.Generator().manual_seed(10)
    q, k, v = tensors(rng, 600, 600, 2, 2, 128, torch.bfloat16)
    q_ranges, k_ranges = (
        torch.tensor([[0, 200], [200, 600], [200, 600]]),
        torch.tensor([[0, 150], [0, 100], [100, 600]]),
    )
    types = torch.tensor([0, 3, 1])
    args = [t.to("cuda", torch.int32) for t in (q_ranges, k_ranges, types)]
    slices = ops.band_slices(*(t.cpu() for t in args))
    assert torch.equal(ops.band_slices(*args).cpu(), slices)
    out, lse = ops.ffa(q, k, v, *args)
    want = check(q, k, v, slices)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_unsupported_is_an_error():
    q = torch.randn(10, 1, 128, device="cuda")
    slices = torch.tensor([[0, 10, 0, 10, -NONE, NONE]], dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="q must be bfloat16 or float16 on CUDA, got float32: cast q, k and v"):
        ops.ffa.slices(q, q, q, slices)
    wide = torch.randn(10, 1, 264, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="at most 256"):
        ops.ffa.slices(wide, wide, wide, slices)
