"""Is distributed attention attention? `attend` against the fp64 reference, and its refusals, in real processes."""

import pytest
import torch
import torch.distributed as dist
from dist_data import inputs, local, owned, plan_here, random_masks
from dist_harness import run
from torch.distributed.device_mesh import init_device_mesh

from magi_attention import Mask
from magi_attention.dist import attend
from magi_attention.plan import PlanConfig, build_plan
from magi_attention.reference import Attention, assert_accurate, attention_and_grads


def case_exact(
    mask,
    stages=2,
    heads=(4, 2),
    head_dim=16,
    v_dim=8,
    sinks=0,
    dtype=torch.float32,
    seed=0,
    options=None,
    deterministic=False,
    device="cpu",
    mesh=None,
    node_size=None,
    movement="keys",
):
    """out, lse and every gradient of this rank's rows, within the error contract."""
    options = options or {}
    layout = {"node_size": node_size, "movement": movement, "seed": seed}
    plan = plan_here(mask, stages=stages, backward_stages=stages % 3 + 1, **layout)
    tensors, dout, dlse = inputs(mask, heads=heads, head_dim=head_dim, v_dim=v_dim, sinks=sinks, dtype=dtype, seed=seed)
    ql, kl = plan.q_layout, plan.k_layout
    args = [local(x, layout) for x, layout in zip(tensors, (ql, kl, kl))] + tensors[3:]
    args = [x.to(device, copy=True).requires_grad_() for x in args]
    sink = args[3] if sinks else None
    mesh = dist.group.WORLD if mesh is None else mesh
    out, lse = attend(*args[:3], plan.to(device), mesh, sink=sink, deterministic=deterministic, **options)
    # Padding is rows without keys.
    assert not out[ql.num_owned :].any()
    assert sinks or bool((lse[ql.num_owned :] == -torch.inf).all())
    grads = torch.autograd.grad([out, lse], args, [local(x, ql).to(device) for x in (dout, dlse)])
    if sinks:
        dist.all_reduce(grads[3])
    got = Attention(out, lse, *grads)
    for x, layout in zip(got[2:5], (ql, kl, kl)):
        assert not x[layout.num_owned :].any()

    def want(precision):
        whole = attention_and_grads(
            *tensors[:3], mask, dout, dlse, sink=tensors[3] if sinks else None, dtype=precision, **options
        )
        return owned(whole, plan)

    exact, plain = want(torch.float64), want(None)
    lengths = (ql.num_owned, ql.num_owned, ql.num_owned, kl.num_owned, kl.num_owned, sinks)
    for name, x, length, right, same in zip(Attention._fields, got, lengths, exact, plain):
        if x is not None:
            # Of dsink there are a few numbers only, too few for the largest error of 16-bit rounding to settle.
            few = name == "dsink" and dtype.itemsize == 2
            assert_accurate(name, x[:length], right, same, factor=4 if few else 2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 3])
def test_random_masks(world_size, stages):
    for seed, mask in enumerate(random_masks(16)):
        run(world_size, case_exact, mask, stages, (4, 2), 16, 8, 0, torch.float32, seed)


def case_options():
    mask = Mask.varlen([0, 13, 40, 61])
    case_exact(mask, sinks=2, options={"softcap": 3.0, "softmax_scale": 0.4})
    case_exact(mask, sinks=1, deterministic=True)
    case_exact(mask, heads=(2, 2), v_dim=16)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        case_exact(mask, sinks=1, dtype=dtype)
    # A sink, and rows without keys.
    case_exact(Mask.from_slices([[3, 20]], [[30, 50]], ["full"], total_q=60, total_k=60), sinks=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_options(world_size):
    run(world_size, case_options)


def case_cross_attention():
    """Keys of another sequence, with a length and a layout of their own."""
    case_exact(Mask.full(37, 90))
    case_exact(Mask.from_slices([[0, 20], [20, 70]], [[5, 9], [0, 16]], ["full", "causal"], total_q=70, total_k=16))


@pytest.mark.parametrize("world_size", [1, 4])
def test_cross_attention(world_size):
    run(world_size, case_cross_attention)


def test_eight_ranks():
    run(8, case_exact, Mask.varlen([0, 100, 180, 333]), 2)


def case_refusals():
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    mask = Mask.causal(64)
    plan = plan_here(mask)
    tensors, _, _ = inputs(mask, sinks=1)
    q, k, v = (local(x, plan.q_layout) for x in tensors[:3])
    sink = tensors[3]
    attend(q, k, v, plan, mesh, sink=sink)

    def refused(message, *args, **options):
        with pytest.raises(ValueError, match=message):
            attend(*args, **options)

    rank = dist.get_rank()
    refused("q must have the 32 rows of this rank, got", q[:-1], k, v, plan, mesh)
    refused("v must have the 32 rows of this rank, got", q, k, v[:-1], plan, mesh)
    refused("k must have the dtype of q", q, k.double(), v, plan, mesh)
    refused("q must be floating point", q.long(), k, v, plan, mesh)
    refused("q must be floating point", q[0], k, v, plan, mesh)
    refused("multiple of the 2 heads of k, got 3", q[:, :3], k, v, plan, mesh)
    refused("v must have the 2 heads of k, got 1", q, k, v[:, :1], plan, mesh)
    refused("k must have the head_dim of q, 16, got 8", q, k[..., :8], v, plan, mesh)
    refused("sink must be torch.float32", q, k, v, plan, mesh, sink=sink.double())
    refused("sink must be torch.float32", q, k, v, plan, mesh, sink=sink[:, :3])
    refused("on one device", q, k, v, plan.to("meta"), mesh)
    other = build_plan(mask, world_size=2, rank=1 - rank)
    refused(f"plan must be that of rank {rank} of 2, like mesh, got rank {1 - rank} of 2", q, k, v, other, mesh)
    larger = build_plan(mask, world_size=4, rank=rank, config=PlanConfig(chunk=8))
    refused("got rank . of 4", q, k, v, larger, mesh)
    refused("mesh must be a DeviceMesh or a ProcessGroup, got str", q, k, v, plan, "cp")
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    refused("mesh must have one dimension, got 2", q, k, v, plan, square)
    attend(q, k, v, plan, square["cp"])
    dist.barrier()  # nobody is left in a launch


def test_refusals():
    run(2, case_refusals)
