"""Do head-sharded DTensors attend like whole tensors? The ops alone, and with rows over a group too."""

import math

import pytest
import torch
import torch.distributed as dist
from dist_data import inputs, local, plan_here, random_masks
from dist_harness import run
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.experimental import implicit_replication
from torch.testing import assert_close

from magi_attention import Mask, PlanConfig, attend, build_plan, undispatch
from magi_attention.reference import attention_and_grads

ops = torch.ops.magi


def case_ops(backend):
    """ffa.slices on whole tensors and on heads split over two ranks."""
    mesh = init_device_mesh("cpu", (2,))
    mask = Mask.varlen([0, 20, 50])
    tensors, dout, dlse = inputs(mask, sinks=2)
    placed = [distribute_tensor(x, mesh, [Shard(1)]).requires_grad_() for x in tensors]
    slices = distribute_tensor(mask.slices, mesh, [Replicate()])

    def call(q, k, v, sink):
        return ops.ffa.slices(q, k, v, slices, sink, softcap=2.0)

    # torch 2.13 cannot compile, with gradients, an op on DTensors (its own topk, say) that it ran eagerly before:
    # "tangents_2 was invalid".
    _clear_sharding_prop_cache()
    call = torch.compile(call, fullgraph=True, backend=backend) if backend else call
    out, lse = call(*placed)
    assert out.placements == lse.placements == (Shard(1),)
    grads = torch.autograd.grad([out, lse], placed, [distribute_tensor(x, mesh, [Shard(1)]) for x in (dout, dlse)])
    want = attention_and_grads(*tensors[:3], mask, dout, dlse, sink=tensors[3], softcap=2.0)
    for got, right in zip((out, lse, *grads), want):
        assert got.placements == (Shard(1),)
        assert_close(got.full_tensor().double(), right.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_ops_on_head_shards(backend):
    run(2, case_ops, backend)


def case_other_placements():
    """Rows are never split by an op: they are gathered. Key/value heads that a mesh cannot divide stay whole."""
    mesh = init_device_mesh("cpu", (2,))
    mask = Mask.causal(32)
    (q, k, v), _, _ = inputs(mask, heads=(2, 1))
    want = ops.ffa.slices(q, k, v, mask.slices)
    for placement in (Shard(0), Shard(1), Replicate()):
        placed = [distribute_tensor(q, mesh, [placement])] + [distribute_tensor(x, mesh, [Replicate()]) for x in (k, v)]
        with implicit_replication():
            got = ops.ffa.slices(*placed, mask.slices)
        for x, right in zip(got, want):
            assert_close(x.full_tensor(), right)
    (q, k, v), _, _ = inputs(mask)
    placed = [distribute_tensor(x, mesh, [Shard(1)]) for x in (q, k, v)]
    with implicit_replication():
        first = ops.ffa_fwd(*placed, mask.slices, softmax_scale=0.3)
        got = ops.ffa_fwd(*placed, mask.slices, out_prev=first[0], lse_prev=first[1], softmax_scale=0.3)
    for x, right in zip(got, first):
        assert x.placements == (Shard(1),)
        assert_close(x.full_tensor(), right.full_tensor() + (math.log(2) if x.ndim == 2 else 0))
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        ops.ffa.slices(*placed, mask.slices)


def test_other_placements():
    run(2, case_other_placements)


def case_rows_and_heads(backend, num_masks):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, placements = mesh["cp"], (Shard(0), Shard(1))

    def call(q, k, v, plan, sink):
        return attend(q, k, v, plan, cp, sink=sink)

    call = torch.compile(call, fullgraph=True, backend=backend) if backend else call
    for mask in random_masks(num_masks, total=64):
        plan = build_plan(mask, world_size=2, rank=cp.get_local_rank(), config=PlanConfig(chunk=8))
        layout = plan.q_layout
        tensors, dout, dlse = inputs(mask, sinks=1)

        def place(x, layout=layout):
            mine = local(x, layout).chunk(2, dim=1)[mesh["tp"].get_local_rank()].contiguous()
            return DTensor.from_local(mine, mesh, placements)

        placed = [place(x).requires_grad_() for x in tensors[:3]]
        sink = distribute_tensor(tensors[3], mesh, [Replicate(), Shard(1)]).requires_grad_()
        out, lse = call(*placed, plan, sink)
        *grads, dsink = torch.autograd.grad([out, lse], [*placed, sink], [place(dout), place(dlse)])
        want = attention_and_grads(*tensors[:3], mask, dout, dlse, sink=tensors[3])
        for got, right in zip((out, lse, *grads), want):
            assert got.placements == placements
            whole = torch.cat(torch.unbind(_all_heads(got.to_local(), mesh["tp"])), dim=1)
            assert_close(undispatch(whole, plan, cp).double(), right.double(), rtol=2e-5, atol=2e-5)
        assert_close(dsink.full_tensor().double(), want.dsink.double(), rtol=2e-5, atol=2e-5)
    return counters["stats"]["unique_graphs"]


def _all_heads(x, mesh):
    parts = [torch.empty_like(x) for _ in range(mesh.size())]
    dist.all_gather(parts, x.contiguous(), group=mesh.get_group())
    return torch.stack(parts)


@pytest.mark.parametrize("backend, graphs", [(None, 0), ("inductor", 1)])
def test_rows_and_heads(backend, graphs):
    assert run(4, case_rows_and_heads, backend, 8, timeout=240) == [graphs] * 4


def case_rows_alone():
    """A mesh of one dimension: rows are split, heads are not."""
    mesh = init_device_mesh("cpu", (2,))
    mask = Mask.causal(50)
    plan = plan_here(mask)
    tensors, _, _ = inputs(mask, sinks=1)
    q, k, v = (local(x, plan.q_layout) for x in tensors[:3])
    placed = [DTensor.from_local(x, mesh, [Shard(0)]) for x in (q, k, v)]
    got = attend(*placed, plan, mesh, sink=distribute_tensor(tensors[3], mesh, [Replicate()]))
    for x, right in zip(got, attend(q, k, v, plan, mesh, sink=tensors[3])):
        assert x.placements == (Shard(0),) and torch.equal(x.to_local(), right)


def test_rows_alone():
    run(2, case_rows_alone)


def case_refusals():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp = mesh["cp"]
    plan = build_plan(Mask.causal(64), world_size=2, rank=cp.get_local_rank(), config=PlanConfig(chunk=8))

    def placed(*placements, heads=2, dim=8):
        return DTensor.from_local(torch.zeros(32, heads, dim), mesh, placements)

    q = placed(Shard(0), Shard(1))
    for message, arguments, options in (
        ("q must be placed as S.* on dimension 0", [placed(Replicate(), Shard(1))] * 3, {}),
        ("k must be placed as S.* on dimension 1", [q, placed(Shard(0), Replicate()), q], {}),
        ("v must be a DTensor on the device mesh of q, .*got Tensor", [q, q, torch.zeros(32, 2, 8)], {}),
        ("sink must be a DTensor", [q, q, q], {"sink": torch.zeros(1, 4)}),
        ("v must have the 2 heads of k, got 1", [q, q, placed(Shard(0), Shard(1), heads=1)], {}),
    ):
        with pytest.raises(ValueError, match=message):
            attend(*arguments, plan, cp, **options)
    with pytest.raises(ValueError, match="mesh must be a dimension of the device mesh of q"):
        attend(q, q, q, plan, dist.group.WORLD)


def test_refusals():
    run(4, case_refusals)
