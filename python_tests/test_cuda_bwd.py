"""The CUDA backward against the fp64 reference: any slices, any layout, the same bits where it promises them."""

import pytest
import torch
from test_cuda_ffa import HEADS, NONE, causal_documents, dense, poison, random_slices, tensors
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.utils import counters
from torch.testing import assert_close

import magi_attention  # noqa: F401
from magi_attention.reference import assert_accurate, attention_and_grads

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU"),
]
ops = torch.ops.magi
WIDE = [(192, 128), (192, 192), (256, 256), (160, 160), (136, 136), (176, 8), (24, 136), (256, 64)]  # head_dim, v_dim


def backward(
    q, k, v, dout, dlse, slices, *, grad_dtype=None, dq_prev=None, deterministic=False, fused=True, **options
):  # fmt: skip
    """(dq, dk, dv) by the raw ops, with freed NaN memory where outputs and workspace will lie. fused: delta, too."""
    slices = slices.cuda()
    scale = options.pop("softmax_scale", q.shape[2] ** -0.5)
    out, lse = ops.ffa_fwd(q, k, v, slices, softmax_scale=scale, softcap=options.get("softcap", 0.0))
    given = {"delta": None, "out": out, "dlse": dlse} if fused else {"delta": ops.ffa_delta(dout, out, dlse)}
    padded = (q.shape[0] + 128) * q.shape[1] * (128 if max(q.shape[2], v.shape[2]) <= 128 else 256)
    poison(
        ((2 * padded + 4 * k.numel() + 1000000,), torch.float32),
        (q.shape, q.dtype),
        (k.shape, k.dtype),
        (v.shape, v.dtype),
    )
    return ops.ffa_bwd(
        dout, q, k, v, lse, slices=slices, dq_prev=dq_prev, softmax_scale=scale, grad_dtype=grad_dtype,
        deterministic=deterministic, **given, **options,
    )  # fmt: skip


def check(rng, q, k, v, slices, *, dout=None, dq_prev=None, grad_dtype=None, **options):
    allowed = dense(slices, q.shape[0], k.shape[0])
    if dout is None:
        dout = torch.randn(q.shape[0], q.shape[1], v.shape[2], generator=rng).to("cuda", q.dtype)
    dlse = torch.randn(q.shape[:2], generator=rng).cuda()
    grads = backward(q, k, v, dout, dlse, slices, dq_prev=dq_prev, grad_dtype=grad_dtype, **options)
    reference = {name: options[name] for name in ("softmax_scale", "softcap") if name in options}
    exact = attention_and_grads(q, k, v, allowed, dout, dlse, **reference)
    plain = attention_and_grads(q, k, v, allowed, dout, dlse, dtype=None, **reference)
    for name, actual in zip(("dq", "dk", "dv"), grads):
        want, same = getattr(exact, name), getattr(plain, name).double()
        assert actual.dtype == (grad_dtype or q.dtype)
        if name == "dq" and dq_prev is not None:
            want, same = want + dq_prev.double(), same + dq_prev.double()
        assert_accurate(name, actual, want, same)
        error = (actual.double() - want).norm() / want.norm().clamp_min(1e-3)
        assert error < 1.5e-2, f"{name} relative error {error:.1e}"  # bf16 operands
    return grads


def check_random_masks(rng, dims):
    pick = lambda options: options[int(torch.randint(0, len(options), (), generator=rng))]  # noqa: E731
    for _ in range(5):
        num_q, num_k = (int(pick([64, 300, 1000, 4000]) * torch.rand((), generator=rng)) + 1 for _ in range(2))
        heads, kv_heads = pick(HEADS if num_q * num_k < 1e6 else HEADS[:4])
        (dim, v_dim), dtype = pick(dims), pick([torch.bfloat16, torch.float16])
        q, k, v = tensors(rng, num_q, num_k, heads, kv_heads, dim, dtype, v_dim)
        check(rng, q, k, v, random_slices(rng, num_q, num_k), deterministic=pick([False, True]))


@pytest.mark.parametrize("seed", range(60))
def test_random_masks(seed):
    check_random_masks(torch.Generator().manual_seed(seed), [(dim, dim) for dim in (64, 128, 128, 40, 96)])


@pytest.mark.parametrize("seed", range(30))
def test_random_masks_of_wide_heads(seed):
    check_random_masks(torch.Generator().manual_seed(200 + seed), WIDE)


@pytest.mark.parametrize("seed", range(20))
def test_long_slices(seed):
    """Where slices have 4,096 rows on average (512 at head_dim 64), visits have more."""
    rng = torch.Generator().manual_seed(100 + seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=rng))  # noqa: E731
    count = 1 + seed % 2
    num_q, num_k = 4096 * count + draw(0, 500), draw(1, 1500)
    slices = []
    for _ in range(count):
        q0, k0 = draw(0, num_q), draw(0, num_k)
        q1, k1 = draw(q0, num_q + 1), draw(k0, num_k + 1)
        lo, hi = sorted((draw(-num_q, num_k), draw(-num_q, num_k)))
        slices.append([q0, q1, k0, k1, lo if draw(0, 2) else -NONE, hi if draw(0, 2) else NONE])
    if seed < 4:
        slices = [[0, num_q, 0, num_k, -NONE, num_k - num_q if seed else NONE]]
    dim, dtype = (64, 128, 40, 96)[seed // 2 % 4], (torch.bfloat16, torch.float16)[seed % 2]
    options = [{}, {"softmax_scale": -0.1}, {"grad_dtype": torch.float32}, {"sm_margin": 100}][draw(0, 4)]
    q, k, v = tensors(rng, num_q, num_k, 4, draw(1, 3), dim, dtype)
    check(rng, q, k, v, torch.tensor(slices, dtype=torch.int32), deterministic=bool(draw(0, 2)), **options)


@pytest.mark.parametrize(
    "num_q, num_k, heads, kv_heads, dim, options",
    [
        (4100, 3000, 8, 4, 128, {}),  # fewer tiles than blocks
        (4200, 9000, 2, 2, 128, {}),  # little more: shares of more than a tile
        (4100, 12000, 2, 2, 128, {}),  # the last round only
        (8192, 100, 1, 1, 128, {}),  # one tile, in as many parts as there may be
        (4100, 3000, 2, 1, 96, {"sm_margin": 100, "grad_dtype": torch.float32}),
        (4100, 5000, 4, 4, 64, {}),
        (1100, 4000, 8, 2, 64, {"sm_margin": 7}),
        (1000, 1024, 16, 4, 128, {}),  # heads of a group apart
        (2047, 2000, 2, 1, 128, {"softmax_scale": -0.1}),
        (300, 200, 1, 1, 64, {}),
    ],
)
def test_tiles_in_shares(num_q, num_k, heads, kv_heads, dim, options):
    """Tiles that not all blocks would have are spread over all of them; a tile's parts add up in one order."""
    rng = torch.Generator().manual_seed(12)
    q, k, v = tensors(rng, num_q, num_k, heads, kv_heads, dim, torch.bfloat16)
    dout = torch.randn(q.shape, generator=rng).to("cuda", q.dtype)
    for last in (NONE, num_k - num_q):  # full and causal
        slices = torch.tensor([[0, num_q, 0, num_k, -NONE, last]], dtype=torch.int32)
        check(rng, q, k, v, slices, dout=dout, **options)
        first = backward(q, k, v, dout, None, slices, **options)
        for _ in range(4):
            again = backward(q, k, v, dout, None, slices, **options)
            assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])


@pytest.mark.parametrize("heads, dim, v_dim", [(4, 128, 128), (3, 64, 64), (40, 96, 72), (2, 192, 128), (5, 256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_delta_beside_the_statistics(heads, dim, v_dim, dtype):
    """Delta that the backward takes from out and dlse itself is that of ffa_delta to the bit."""
    rng = torch.Generator().manual_seed(13)
    q, k, v = tensors(rng, 500, 450, heads, 1, dim, dtype, v_dim)
    slices = random_slices(rng, 500, 450)
    dout = torch.randn(500, heads, v_dim + 8, generator=rng).to("cuda", dtype)[..., 8:]
    for dlse in (None, torch.randn(500, heads, generator=rng).cuda()):
        results = [backward(q, k, v, dout, dlse, slices, deterministic=True, fused=fused) for fused in (True, False)]
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim, v_dim", [(64, 64), (128, 128), (192, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 15.0},
        {"softmax_scale": 0.0},
        {"softmax_scale": -0.1},
        {"sm_margin": 100},
        {"grad_dtype": torch.float32},
    ],
)
def test_options(dim, v_dim, options, deterministic):
    rng = torch.Generator().manual_seed(1)
    slices = causal_documents([700, 1, 130, 669])
    q, k, v = tensors(rng, 1500, 1500, 4, 2, dim, torch.bfloat16, v_dim)
    check(rng, q, k, v, slices, deterministic=deterministic, **options)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim, v_dim", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("lo, hi", [(-700, 0), (-65, 63), (-300, 400)])
def test_windows_go_round(lo, hi, dim, v_dim, deterministic):
    rng = torch.Generator().manual_seed(12)
    slices = torch.tensor([[0, 1600, 0, 1500, lo, hi], [1600, 3000, 1400, 2900, lo - 200, hi - 30]], dtype=torch.int32)
    check(rng, *tensors(rng, 3000, 2900, 4, 2, dim, torch.bfloat16, v_dim), slices, deterministic=deterministic)


@pytest.mark.parametrize("dim", [96, 160, 256])
@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
def test_adds_to_a_previous_dq(grad_dtype, dim):
    rng = torch.Generator().manual_seed(2)
    q, k, v = tensors(rng, 700, 900, 4, 2, dim, torch.float16)
    dq_prev = torch.randn(q.shape, generator=rng).to("cuda", grad_dtype or q.dtype)
    check(rng, q, k, v, random_slices(rng, 700, 900), dq_prev=dq_prev, grad_dtype=grad_dtype)


def test_values_narrower_than_keys():
    rng = torch.Generator().manual_seed(3)
    check(rng, *tensors(rng, 300, 400, 2, 1, 128, torch.float16, v_dim=72), random_slices(rng, 300, 400))


@pytest.mark.parametrize("dim", [128, 256])
def test_strided_inputs(dim):
    rng = torch.Generator().manual_seed(4)
    slices = causal_documents([500, 524])
    packed = torch.randn(1024, 4, 4, dim, generator=rng).to("cuda", torch.bfloat16).unbind(1)
    check(rng, *packed[:3], slices, dout=packed[3])
    heads_first = torch.randn(4, 4, 1024, dim, generator=rng).to("cuda", torch.bfloat16).transpose(1, 2)
    check(rng, *heads_first[:3], slices, dout=heads_first[3])
    odd = torch.randn(4, 1024, 4, dim + 3, generator=rng).to("cuda", torch.bfloat16)[..., 3:]  # not as TMA reads
    check(rng, *odd[:3], slices, dout=odd[3])
    q, k, v = tensors(rng, 1024, 1024, 4, 4, dim // 2, torch.bfloat16, v_dim=64 if dim == 128 else 192)
    check(rng, q, k, v, slices, dout=torch.ones(1, 1, 1, dtype=q.dtype, device="cuda").expand(v.shape))


@pytest.mark.parametrize("dim", [128, 192])
@pytest.mark.parametrize("deterministic", [False, True])
def test_thousands_of_slices_in_one_tile(deterministic, dim):
    """More slices than the table's pool holds: every key range overlaps every other."""
    rng = torch.Generator().manual_seed(6)
    slices = torch.tensor([[i, i + 1, 0, 500, -NONE, NONE] for i in range(1000)], dtype=torch.int32)
    check(rng, *tensors(rng, 1000, 500, 1, 1, dim, torch.bfloat16), slices, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("heads, kv_heads, dim", [(150, 150, 128), (240, 120, 128), (150, 75, 192)])
def test_many_heads(heads, kv_heads, dim, deterministic):
    """More heads than are worked on together: several sections."""
    rng = torch.Generator().manual_seed(10)
    for slices in (random_slices(rng, 1000, 1100), causal_documents([64, 500, 1, 435])):
        q, k, v = tensors(rng, 1000, 1100, heads, kv_heads, dim, torch.bfloat16)
        check(rng, q, k, v, slices, deterministic=deterministic)


@pytest.mark.parametrize("dim, seen", [(128, 768), (256, 960)])  # whole tiles of keys
def test_keys_that_nobody_sees_may_hold_anything(dim, seen):
    """Their gradients are zeros, also where their tiles' work is to finish rows of earlier heads."""
    rng = torch.Generator().manual_seed(11)
    q, k, v = tensors(rng, 1000, 1100, 150, 150, dim, torch.bfloat16)
    k[seen:] = v[seen:] = float("nan")
    slices = torch.tensor([[0, 1000, 0, seen, -NONE, NONE]], dtype=torch.int32)
    dout, dlse = torch.randn(q.shape, generator=rng).to("cuda", q.dtype), torch.zeros(q.shape[:2], device="cuda")
    grads = backward(q, k, v, dout, dlse, slices)
    same = backward(q, k[:seen].contiguous(), v[:seen].contiguous(), dout, dlse, slices, deterministic=True)
    for name, actual, want in zip(("dq", "dk", "dv"), grads, same):
        got = actual if name == "dq" else actual[:seen]
        assert (got.double() - want.double()).norm() < 1e-2 * want.double().norm()
        assert name == "dq" or not actual[seen:].any()


@pytest.mark.parametrize("dim", [64, 192])
def test_one_row_and_one_key(dim):
    rng = torch.Generator().manual_seed(7)
    slices = torch.tensor(
        [
            [7, 8, 0, 300, -NONE, NONE],
            [0, 7, 299, 300, -NONE, NONE],
            [50, 300, 13, 14, -NONE, NONE],
            [9, 9, 5, 7, 0, 0],
        ],
        dtype=torch.int32,
    )
    check(rng, *tensors(rng, 301, 333, 2, 1, dim, torch.bfloat16), slices)


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_slices_no_keys_no_rows(deterministic, dim):
    rng = torch.Generator().manual_seed(8)
    for num_q, num_k in ((100, 50), (100, 0), (0, 50)):
        q, k, v = tensors(rng, num_q, num_k, 2, 1, dim, torch.bfloat16)
        slices = torch.zeros(0, 6, dtype=torch.int32)
        grads = backward(q, k, v, torch.randn_like(q), None, slices, deterministic=deterministic)
        for grad, like in zip(grads, (q, k, v)):
            assert grad.shape == like.shape and not grad.any()


@pytest.mark.parametrize("dim, v_dim", [(128, 128), (192, 128), (192, 192), (256, 256)])
def test_deterministic_repeats_bitwise(dim, v_dim):
    rng = torch.Generator().manual_seed(9)
    for slices in (random_slices(rng, 4096, 4096), causal_documents([4096]), causal_documents([1000, 3, 93, 3000])):
        q, k, v = tensors(rng, 4096, 4096, 8, 2, dim, torch.bfloat16, v_dim)
        dout = torch.randn_like(q[..., :v_dim])
        first = backward(q, k, v, dout, None, slices, deterministic=True)
        for margin in (0, 0, 0, 7, 50, 131):  # with fewer blocks, work is spread in another way
            again = backward(q, k, v, dout, None, slices, deterministic=True, sm_margin=margin)
            assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("dim, v_dim", [(128, 128), (192, 128)])
def test_compiled_is_eager(dim, v_dim):
    """Forward and backward traced whole: any number of slices in one graph, with gradients through out and lse."""

    def loss(q, k, v, sink, slices):
        out, lse = ops.ffa.slices(q * 2, k, v, slices, sink=sink, deterministic=True)
        return (out * 0.5).float().square().sum() + lse.where(lse > -1e30, 0).sum()

    torch._dynamo.reset()
    counters["stats"].clear()
    compiled = torch.compile(loss, fullgraph=True)
    rng = torch.Generator().manual_seed(10)
    for lengths in ([700], [300, 1, 399], [5] * 140, [128, 572], []):
        slices = causal_documents(lengths).cuda()
        mark_unbacked(slices, 0)
        inputs = (*tensors(rng, 700, 700, 4, 2, dim, torch.bfloat16, v_dim), torch.randn(1, 4, generator=rng).cuda())
        results = []
        for function in (compiled, loss):
            leaves = [x.detach().requires_grad_() for x in inputs]
            value = function(*leaves, slices)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for got, want in zip(*results):
            assert_close(got, want, rtol=1e-5, atol=1e-5)  # outputs and gradients are bitwise equal, their sums are not
        for got, want in zip(results[0][1:4], results[1][1:4]):
            assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1
