"""Does a compiled, sharded, checkpointed model with `attend` in its blocks train like the same model on one process?"""

import dataclasses
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dist_data import local, rows_of
from dist_harness import run
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from magi_attention import Mask, PlanConfig, attend, build_plan, save_attention_policy
from magi_attention.reference import attention

TOTAL, WIDTH, HEADS, KV_HEADS = 64, 32, 4, 2
DIM = WIDTH // HEADS
STEPS = 4


class Block(nn.Module):
    """Pre-norm attention and a gated MLP; `attention(q, k, v)` is given, so that the reference is the same code."""

    def __init__(self):
        super().__init__()
        self.norm_a, self.norm_m = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, attend_rows):
        q, k, v = self.qkv(self.norm_a(x)).unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        x = x + self.out(attend_rows(q, k, v).flatten(1))
        gate, up = self.up(self.norm_m(x)).chunk(2, dim=1)
        return x + self.down(F.silu(gate) * up)


class ParallelBlock(Block):
    def __init__(self, mesh, checkpointing):
        super().__init__()
        self.mesh, self.checkpointing = mesh, checkpointing

    def forward(self, x, plan):
        body = partial(Block.forward, self)
        rows = lambda q, k, v: attend(q, k, v, plan, self.mesh)[0]  # noqa: E731
        if self.checkpointing == "none":
            return body(x, rows)
        contexts = {}
        if self.checkpointing == "selective":
            contexts["context_fn"] = partial(create_selective_checkpoint_contexts, save_attention_policy)
        return checkpoint(body, x, rows, use_reentrant=False, **contexts)


def weights():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(p.shape, generator=g) * 0.2 + (p.ndim == 1) for p in Block().parameters()]


def load(blocks):
    with torch.no_grad():
        for block in blocks:
            for parameter, weight in zip(block.parameters(), weights()):
                parameter.copy_(weight)
    return blocks


def batches(dp):
    """Per step, for each data-parallel replica: a mask, the tokens and the target."""
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        cuts = [Mask.varlen([0, 7 + 5 * step + r, 40 - step, TOTAL]) for r in range(dp)]
        yield [(mask, torch.randn(TOTAL, WIDTH, generator=g), torch.randn(TOTAL, WIDTH, generator=g)) for mask in cuts]


def reference_losses(dp):
    blocks = load([Block(), Block()])
    optimizer = torch.optim.SGD([p for b in blocks for p in b.parameters()], lr=0.1)
    losses = []
    for batch in batches(dp):
        loss = 0
        for mask, x, target in batch:
            for block in blocks:
                x = block(x, lambda q, k, v, mask=mask: attention(q, k, v, mask, dtype=None)[0])
            loss = loss + (x - target).square().mean() / dp
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach() for b in blocks for p in b.parameters()]


def case_train(dp, checkpointing, bf16, backend):
    """Losses and parameters against one process; compiled graphs; attention kernels in each forward and backward."""
    kernels = []

    def record(graph, example_inputs):
        kernels.append(sum(node.target is torch.ops.magi.ffa_fwd.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    recorded = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    cp = dist.get_world_size() // dp
    mesh = init_device_mesh("cpu", (dp, cp), mesh_dim_names=("dp", "cp"))
    blocks = load([ParallelBlock(mesh["cp"], checkpointing) for _ in range(2)])
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)} if bf16 else {}
    for block in blocks:
        if backend != "eager":
            block.compile(fullgraph=True, backend=recorded if backend == "recorded" else backend)
        fully_shard(block, mesh=mesh["dp", "cp"]._flatten("dp_cp"), **policy)
    optimizer = torch.optim.SGD([p for b in blocks for p in b.parameters()], lr=0.1)
    losses = []

    def step(batch):
        mask, x, target = batch[mesh["dp"].get_local_rank()]
        plan = build_plan(mask, world_size=cp, rank=mesh["cp"].get_local_rank(), config=PlanConfig(chunk=8))
        x, own = local(x, plan.q_layout).requires_grad_(), plan.q_layout.num_owned
        for block in blocks:
            x = block(x, plan)
        # FSDP averages gradients over all ranks: this rank's share of the loss, times the ranks that share it.
        loss = (x[:own].float() - target[rows_of(plan.q_layout)]).square().sum() / (TOTAL * WIDTH) * cp
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach() / dist.get_world_size()
        dist.all_reduce(loss)
        losses.append(loss.item())

    for batch in batches(dp):
        step(batch)
    want, parameters = reference_losses(dp)
    tolerance = 0.02 if bf16 else 1e-5
    torch.testing.assert_close(losses, want, rtol=tolerance, atol=0)
    assert len(set(losses)) == STEPS
    for got, right in zip((p for b in blocks for p in b.parameters()), parameters):
        torch.testing.assert_close(got.full_tensor().float(), right, rtol=0, atol=tolerance)
    return counters["stats"]["unique_graphs"], kernels


# Compiled by torch 2.11, a block under full checkpointing keeps out and lse all the same.
FULL = 3 if torch.__version__ >= "2.13" else 0


@pytest.mark.parametrize("dp, cp", [(1, 2), (2, 2)])
@pytest.mark.parametrize(
    "checkpointing, bf16, forwards_in_backward",
    [("none", False, 0), ("full", False, FULL), ("selective", False, 0), ("selective", True, 0)],
)
def test_training(dp, cp, checkpointing, bf16, forwards_in_backward):
    results = run(dp * cp, case_train, dp, checkpointing, bf16, "recorded", timeout=240)
    assert results == [(1, [3, forwards_in_backward])] * (dp * cp)


@pytest.mark.parametrize("backend, graphs", [("eager", 0), ("inductor", 1)])
def test_training_without_recording(backend, graphs):
    results = run(4, case_train, 2, "selective", True, backend, timeout=300)
    assert results == [(graphs, [])] * 4


def case_eager_checkpoint(checkpointing, node_size):
    """Casts and forward kernels of one eager step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))
    mesh = mesh if node_size else mesh._flatten("cp")
    (block,) = load([ParallelBlock(mesh, checkpointing)])
    config = PlanConfig(chunk=8, stages=2, node_size=node_size)
    plan = build_plan(Mask.causal(TOTAL), world_size=4, rank=dist.get_rank(), config=config)
    x = torch.randn(plan.q_layout.rows, WIDTH)
    (want,) = torch.autograd.grad(load([ParallelBlock(mesh, "none")])[0](x.requires_grad_(), plan).sum(), x)
    with torch.profiler.profile() as profile:
        block(x, plan).sum().backward()
    torch.testing.assert_close(x.grad, want)
    counts = {event.key: event.count for event in profile.key_averages()}
    return [counts.get(f"magi::{op}", 0) for op in ("group_cast", "group_reduce", "ffa_fwd")]


@pytest.mark.parametrize("node_size, casts", [(None, 2), (2, 3)])
def test_eager_checkpointing(node_size, casts):
    for checkpointing, forwards in ("none", 1), ("full", 2), ("selective", 1):
        counts = run(4, case_eager_checkpoint, checkpointing, node_size)
        assert counts == [[casts * (forwards + 1), casts, 3 * forwards]] * 4, checkpointing


def case_forward_op():
    mask = Mask.causal(TOTAL)
    plan = build_plan(mask, world_size=2, rank=dist.get_rank(), config=PlanConfig(chunk=8))
    q, k, v = (torch.randn(plan.q_layout.rows, heads, 16) for heads in (4, 2, 2))
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, plan, dist.group.WORLD)
    assert counter.get_total_flops() == 4 * int(plan.area[plan.rank]) * 4 * 16
    tables = [getattr(stage, field.name) for stage in plan.stages for field in dataclasses.fields(stage)]
    name = dist.group.WORLD.group_name
    call = (q, k, v, None, plan.slices, tables, [name, name], 0.25, 0.0)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    opcheck(torch.ops.magi.attend_forward.default, call, test_utils=tests)


def test_the_forward_is_an_op_that_counts():
    run(2, case_forward_op)
