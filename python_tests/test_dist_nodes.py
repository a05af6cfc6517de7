"""Is attention over nodes attention, in the order that hides its communication? In 2 x 2, 2 x 4 and 4 x 2 processes."""

import expecttest
import pytest
import torch
import torch.distributed as dist
from dist_data import inputs, local, plan_here, random_masks
from dist_harness import run
from test_compile import schedule, step
from test_dist_attention import case_exact
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close

from magi_attention import Mask
from magi_attention.dist import attend, dispatch, undispatch


def mesh_of(node_size):
    return init_device_mesh("cpu", (dist.get_world_size() // node_size, node_size), mesh_dim_names=("node", "local"))


def case_nodes(masks, node_size, stages):
    mesh = mesh_of(node_size)
    for seed, mask in enumerate(masks):
        case_exact(mask, stages, mesh=mesh, node_size=node_size, seed=seed)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_random_masks(stages):
    run(4, case_nodes, list(random_masks(16)), 2, stages)


@pytest.mark.parametrize("node_size", [2, 4])
def test_eight_ranks(node_size):
    masks = [Mask.varlen([0, 100, 180, 333]), Mask.causal(250), Mask.full(130), *random_masks(5, total=200)]
    run(8, case_nodes, masks, node_size, 3)


@pytest.mark.parametrize("node_size", [1, 4])
def test_one_rank_a_node_and_one_node(node_size):
    run(4, case_nodes, [Mask.causal(100)], node_size, 2)


def case_options():
    mesh, mask = mesh_of(2), Mask.varlen([0, 13, 40, 61])
    case_exact(mask, mesh=mesh, node_size=2, sinks=2, options={"softcap": 3.0, "softmax_scale": 0.4})
    case_exact(mask, mesh=mesh, node_size=2, deterministic=True)
    case_exact(Mask.full(37, 90), mesh=mesh, node_size=2)  # keys of another sequence
    for dtype in (torch.float64, torch.bfloat16):
        case_exact(mask, mesh=mesh, node_size=2, sinks=1, dtype=dtype)


def test_options():
    run(4, case_options)


def case_one_graph(num_masks, stages):
    mesh = mesh_of(2)

    def attend_here(q, k, v, plan):
        return attend(q, k, v, plan, mesh)

    compiled = torch.compile(attend_here, fullgraph=True)
    graphs = set()
    for mask in random_masks(num_masks):
        plan = plan_here(mask, stages=stages, node_size=2)
        for got, want in zip(step(compiled, plan), step(attend_here, plan)):
            assert_close(got, want, rtol=1e-6, atol=1e-6)
        graphs.add(counters["stats"]["unique_graphs"])
    return graphs


def test_one_graph_for_all_masks():
    assert run(4, case_one_graph, 20, 3, timeout=240) == [{1}] * 4


def case_schedule(stages):
    mesh = mesh_of(2)
    compiled = torch.compile(lambda q, k, v, plan: attend(q, k, v, plan, mesh), fullgraph=True)
    _, codes = run_and_get_code(lambda: step(compiled, plan_here(Mask.causal(64), stages=stages, node_size=2)))
    return [schedule(code) for code in codes]


class TestSchedule(expecttest.TestCase):
    """What Inductor generates, the same on every rank: relay(s + 2) and fan(s + 1) are launched before stage s
    computes, and waited for after it. Casts 1, 3 are relays of stages 1, 2 and 2, 4, 5 fans of stages 0, 1, 2; reduces
    1, 2, 3 go back inside the node, and 4, 5 across, from stages 1 and 2."""

    def test_three_stages(self):
        (forward, backward), *others = run(4, case_schedule, 3, timeout=240)
        assert others == [[forward, backward]] * 3
        self.assertExpectedInline(
            forward,
            """\
launch group_cast 1
launch group_cast 2
ffa_fwd
launch group_cast 3
wait   group_cast 1
launch group_cast 4
wait   group_cast 2
ffa_fwd
wait   group_cast 3
launch group_cast 5
wait   group_cast 4
ffa_fwd
wait   group_cast 5
ffa_fwd""",
        )
        self.assertExpectedInline(
            backward,
            """\
launch group_cast 1
launch group_cast 2
ffa_delta
ffa_bwd
launch group_cast 3
wait   group_cast 1
launch group_cast 4
wait   group_cast 2
ffa_bwd
launch group_reduce 1
wait   group_cast 3
launch group_cast 5
wait   group_cast 4
ffa_bwd
launch group_reduce 2
wait   group_cast 5
ffa_bwd
launch group_reduce 3
wait   group_reduce 2
range_scatter_reduce
launch group_reduce 4
wait   group_reduce 3
range_scatter_reduce
launch group_reduce 5
wait   group_reduce 1
range_scatter_reduce
wait   group_reduce 4
range_scatter_reduce
wait   group_reduce 5
range_scatter_reduce""",
        )


def case_borders():
    """Rows get there and back over the flattened mesh; wrong meshes are refused before anything is sent."""
    mesh, mask = mesh_of(2), Mask.causal(64)
    plan = plan_here(mask, node_size=2)
    x = torch.arange(64.0)[:, None]
    flat = mesh._flatten("cp")
    assert torch.equal(undispatch(dispatch(x, plan, flat), plan, flat), x)
    tensors, _, _ = inputs(mask)
    q, k, v = (local(x, plan.q_layout) for x in tensors[:3])

    def refused(message, plan, mesh):
        with pytest.raises(ValueError, match=message):
            attend(q, k, v, plan, mesh)

    refused(r"mesh must be a DeviceMesh \[nodes, ranks of a node\] = \[2, 2\]", plan, flat)
    refused(r"mesh must be a DeviceMesh \[nodes, ranks of a node\] = \[2, 2\]", plan, dist.group.WORLD)
    refused(r"mesh must be a DeviceMesh \[nodes, ranks of a node\] = \[4, 1\]", plan_here(mask, node_size=1), mesh)
    refused("mesh must have one dimension, got 2", plan_here(mask), mesh)
    attend(q, k, v, plan, mesh)
    dist.barrier()


def test_borders():
    run(4, case_borders)


def case_heads():
    """Heads split over a third dimension."""
    mesh, mask = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("node", "local", "tp")), Mask.varlen([0, 30, 64])
    nodes = mesh["node", "local"]
    rank = nodes.get_local_rank(0) * 2 + nodes.get_local_rank(1)
    plan = plan_here(mask, node_size=2, world_size=4, rank=rank)
    tensors, dout, dlse = inputs(mask)
    *qkv, dout, dlse = (local(x, plan.q_layout) for x in (*tensors, dout, dlse))
    heads = [x.chunk(2, dim=1)[mesh.get_local_rank(2)].clone().requires_grad_() for x in qkv]
    placed = [Shard(0), Shard(0), Shard(1)]
    out, lse = attend(*(DTensor.from_local(x, mesh, placed) for x in heads), plan, nodes)
    whole = [x.requires_grad_() for x in qkv]
    want = attend(*whole, plan, nodes)
    want_grads = torch.autograd.grad(want, whole, [dout, dlse.masked_fill(want[1].isinf(), 0)])
    mine = [x.chunk(2, dim=1)[mesh.get_local_rank(2)] for x in (*want, dout, dlse, *want_grads)]
    assert_close([out.to_local(), lse.to_local()], mine[:2])
    grads = torch.autograd.grad(
        [out.to_local(), lse.to_local()], heads, [mine[2], mine[3].masked_fill(mine[1].isinf(), 0)]
    )
    assert_close(list(grads), mine[4:])


def test_heads_beside_nodes():
    run(8, case_heads)
