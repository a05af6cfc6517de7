"""Row movement on CUDA: gather to the bit, sums and merges against the CPU."""

import pytest
import torch

import magi_attention  # noqa: F401

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU"),
]
ops = torch.ops.magi


def ranges_of(rng, count, rows, longest):
    begin = torch.randint(0, rows + 1, (count,), generator=rng)
    length = torch.randint(0, longest + 1, (count,), generator=rng)
    return torch.stack([begin, torch.minimum(begin + length, torch.tensor(rows))], 1).to(torch.int32)


@pytest.mark.parametrize("count", [0, 1, 7, 1000, 1025, 5000])  # both sides of what a block sums for itself
@pytest.mark.parametrize(
    "shape,dtype", [((8, 128), torch.bfloat16), ((3,), torch.float32), ((5,), torch.int8), ((), torch.int64)]
)
def test_gather_is_exact(count, shape, dtype):
    rng = torch.Generator().manual_seed(count)
    x = torch.randint(-100, 100, (777, *shape), generator=rng).to(dtype)
    ranges = ranges_of(rng, count, 777, 20)
    total = int((ranges[:, 1] - ranges[:, 0]).sum())
    want = ops.range_gather(x, ranges, total)
    assert torch.equal(ops.range_gather(x.cuda(), ranges.cuda(), total).cpu(), want)


@pytest.mark.parametrize("op", ["sum", "mean"])
@pytest.mark.parametrize("count", [0, 1, 40, 1025, 5000])
@pytest.mark.parametrize(
    "width,dtype",  # several rows a tile, and a row of several
    [(256, torch.bfloat16), (3, torch.float32), (64, torch.float16), (64, torch.float32), (2568, torch.bfloat16)],
)
def test_scatter_reduce(op, count, width, dtype):
    rng = torch.Generator().manual_seed(count)
    ranges = ranges_of(rng, count, 333, 20)
    y = torch.randn(int((ranges[:, 1] - ranges[:, 0]).sum()), width, generator=rng).to(dtype)
    want = ops.range_scatter_reduce(y, ranges, 333, op)
    torch.full_like(want, float("nan"), device="cuda")
    got = ops.range_scatter_reduce(y.cuda(), ranges.cuda(), 333, op)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
    assert torch.equal(got, ops.range_scatter_reduce(y.cuda(), ranges.cuda(), 333, op))


@pytest.mark.parametrize("count", [4096, 5000])  # more ranges touch a block's rows than it lists
def test_scatter_reduce_of_crowded_rows(count):
    rng = torch.Generator().manual_seed(count)
    ranges = ranges_of(rng, count, 16, 10)
    y = torch.randn(int((ranges[:, 1] - ranges[:, 0]).sum()), 256, generator=rng).bfloat16()
    got = ops.range_scatter_reduce(y.cuda(), ranges.cuda(), 16)
    torch.testing.assert_close(got.cpu(), ops.range_scatter_reduce(y, ranges, 16), rtol=1e-2, atol=1e-5)


def test_ranges_of_any_alignment():
    x = torch.randn(64, 64, device="cuda")
    flat = torch.tensor([9, 3, 10, 60, 64, 0, 1], dtype=torch.int32)
    want = torch.cat([x[3:10], x[60:64], x[0:1]])
    assert torch.equal(ops.range_gather(x, flat.cuda()[1:].view(3, 2), len(want)), want)


@pytest.mark.parametrize("dim", [1, 20, 64, 128])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_merge(dim, dtypes):
    rng = torch.Generator().manual_seed(dim)
    parts = []
    for dtype in dtypes:
        lse = torch.randn(300, 4, generator=rng)
        lse[torch.rand(300, 4, generator=rng) < 0.3] = -torch.inf
        parts += [torch.randn(300, 4, dim, generator=rng).to(dtype), lse]
    want = ops.merge_partials(*parts)
    got = ops.merge_partials(*(t.cuda() for t in parts))
    torch.testing.assert_close(got[1].cpu(), want[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-2 if dtypes[0] != torch.float32 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [20, 64, 128, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_delta(dim, dtype, with_dlse):
    rng = torch.Generator().manual_seed(dim)
    dout, out = (torch.randn(501, 3, dim, generator=rng).to(dtype) for _ in range(2))
    dlse = torch.randn(501, 3, generator=rng) if with_dlse else None
    want = ops.ffa_delta(dout, out, dlse)
    got = ops.ffa_delta(dout.cuda(), out.cuda(), None if dlse is None else dlse.cuda())
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("megabytes", [64, 512])
def test_gather_near_copy_speed(megabytes):
    """Reported with -s; the bar of 90 % is the benchmark's."""
    rows = megabytes * 1024 * 1024 // 2048
    x = torch.randn(rows, 8, 128, device="cuda").to(torch.bfloat16)
    edges = torch.arange(0, rows + 1, max(1, rows // 64), dtype=torch.int32)
    ranges = torch.stack([edges[:-1], edges[1:]], 1).flip(0).contiguous().cuda()
    total = int((ranges[:, 1] - ranges[:, 0]).sum())
    y = torch.empty_like(x)

    def milliseconds(f):
        for _ in range(3):
            f()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            f()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 20

    copy, gather = milliseconds(lambda: y.copy_(x)), milliseconds(lambda: ops.range_gather(x, ranges, total))
    print(f"{megabytes} MB: copy {copy * 1e3:.0f} us, gather {gather * 1e3:.0f} us, {copy / gather:.2f} of copy speed")
    assert gather < 2 * copy
