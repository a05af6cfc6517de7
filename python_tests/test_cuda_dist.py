"""Distributed attention on GPUs over NCCL: exact, compiled to one graph, and compiled equal to eager."""

import itertools

import pytest
import torch
import torch.distributed as dist
from dist_data import plan_here, random_masks
from dist_harness import run
from test_compile import attend_here, step
from test_dist_attention import case_exact
from torch._dynamo.utils import counters
from torch.testing import assert_close

from magi_attention import Mask, dispatch, position_ids, roll, undispatch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
DTYPE = torch.bfloat16


def case_gpu_exact():
    cuts = [0, 700, 701, 1500, 2500]
    for mask, dim in itertools.product((Mask.causal(1000), Mask.varlen(cuts), Mask.full(600, 1300)), (64, 128)):
        case_exact(mask, head_dim=dim, v_dim=dim, sinks=1, dtype=DTYPE, device="cuda")


def test_exact():
    run(2, case_gpu_exact, backend="nccl")


def case_gpu_compiled(num_masks):
    compiled = torch.compile(attend_here, fullgraph=True)
    graphs = set()
    for mask in random_masks(num_masks):
        plan = plan_here(mask).to("cuda")
        for got, want in zip(*(step(function, plan, 128, 128, DTYPE) for function in (compiled, attend_here))):
            assert_close(got, want, rtol=0.02, atol=1e-3)  # dq may be summed in another order each time
        graphs.add(counters["stats"]["unique_graphs"])
    return graphs


def test_compiled_is_eager():
    assert run(2, case_gpu_compiled, 16, backend="nccl", timeout=300) == [{1}] * 2


def case_gpu_rows():
    group, total = dist.group.WORLD, 1000
    plan = plan_here(Mask.causal(total)).to("cuda")
    x = torch.arange(total * 3, device="cuda").view(total, 3)
    rows = dispatch(x, plan, group)
    assert torch.equal(undispatch(rows, plan, group), x)
    assert torch.equal(undispatch(roll(rows, -7, plan, group), plan, group), torch.roll(x, -7, 0))
    own = plan.q_layout.num_owned
    assert torch.equal(x[position_ids(plan, "cuda")[:own]], rows[:own])


def test_rows():
    run(2, case_gpu_rows, backend="nccl")
