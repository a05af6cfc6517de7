"""Is distributed attention attention where query rows move? Random rectangles on random ranks, in real processes."""

import expecttest
import pytest
import torch
import torch.distributed as dist
from dist_data import inputs, local, owned, plan_here, random_masks
from dist_harness import run
from test_compile import attend_here, schedule, step
from test_dist_attention import case_exact
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

from magi_attention import Mask
from magi_attention.dist import attend
from magi_attention.plan import HardwareProfile, PlanConfig, build_plan
from magi_attention.reference import Attention, attention_and_grads


def case_random_masks(stages):
    for seed, mask in enumerate(random_masks(16)):
        case_exact(mask, stages, seed=seed, movement="anywhere")


@pytest.mark.parametrize("world_size, stages", [(1, 1), (2, 3), (4, 2)])
def test_random_rectangles_anywhere(world_size, stages):
    run(world_size, case_random_masks, stages)


def case_float64(mask, sinks, heads, head_dim, v_dim, stages, seed):
    """Equal to the reference to the last few bits, sink's gradient included."""
    plan = plan_here(mask, stages=stages, movement="anywhere", seed=seed)
    options = {"heads": heads, "head_dim": head_dim, "v_dim": v_dim, "sinks": sinks, "dtype": torch.float64}
    tensors, dout, dlse = inputs(mask, seed=seed, **options)
    ql, kl = plan.q_layout, plan.k_layout
    args = [local(x, layout).requires_grad_() for x, layout in zip(tensors, (ql, kl, kl))]
    args += [x.clone().requires_grad_() for x in tensors[3:]]
    sink = args[3] if sinks else None
    out, lse = attend(*args[:3], plan, dist.group.WORLD, sink=sink)
    grads = list(torch.autograd.grad([out, lse], args, [local(x, ql) for x in (dout, dlse)]))
    if sinks:
        dist.all_reduce(grads[3])
    want = owned(attention_and_grads(*tensors[:3], mask, dout, dlse, sink=tensors[3] if sinks else None), plan)
    for name, x, right in zip(Attention._fields, (out, lse, *grads), want):
        if x is not None:
            assert_close(x[: len(right)], right, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_exact_in_float64(world_size):
    documents = Mask.varlen([0, 13, 40, 61])  # a total that no number of ranks divides
    cross = Mask.from_slices([[0, 20], [20, 71]], [[5, 30], [0, 53]], ["full", "causal"], total_q=71, total_k=53)
    holes = Mask.from_slices([[3, 20]], [[30, 50]], ["full"], total_q=60, total_k=60)  # rows without keys
    for seed, mask in enumerate((documents, cross, holes)):
        run(world_size, case_float64, mask, 0, (4, 2), 16, 8, 2, seed)
        run(world_size, case_float64, mask, 2, (6, 1), 8, 24, 1, seed)
        run(world_size, case_float64, mask, 1, (2, 2), 16, 16, 3, seed)


def case_low_precision():
    mask = Mask.varlen([0, 13, 40, 61])
    for dtype in (torch.bfloat16, torch.float16):
        case_exact(mask, sinks=1, dtype=dtype, movement="anywhere")
    case_exact(mask, sinks=2, options={"softcap": 3.0, "softmax_scale": 0.4}, deterministic=True, movement="anywhere")


def test_low_precision_and_options():
    run(2, case_low_precision)


def case_chosen_by_cost():
    """A slow link makes rows travel by themselves; few rows that see all keys are the plainest case."""
    rows = [[0, 4], [4, 256]]
    mask = Mask.from_bands([*rows], [[0, 256], [0, 256]], [(None, None), (-5, 0)])
    profile = HardwareProfile(flops=1e12, bandwidth=1e9, launch=1e-6)
    config = PlanConfig(chunk=16, heads=(4, 2), head_dim=16, movement="auto", profile=profile)
    plan = build_plan(mask, world_size=4, rank=dist.get_rank(), config=config)
    assert plan.guest_rows.sum() > 0
    keys = build_plan(mask, world_size=4, rank=dist.get_rank(), config=config.replace(movement="keys"))
    for got, want in zip(step(attend_here, plan), step(attend_here, keys)):
        assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_chosen_by_cost():
    run(4, case_chosen_by_cost)


def case_one_graph(num_masks, stages):
    compiled = torch.compile(attend_here, fullgraph=True)
    graphs = set()
    for seed, mask in enumerate(random_masks(num_masks)):
        plan = plan_here(mask, stages=stages, movement=("anywhere", "auto")[seed % 2], seed=seed)
        for got, want in zip(step(compiled, plan), step(attend_here, plan)):
            assert_close(got, want, rtol=1e-6, atol=1e-6)
        graphs.add(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("world_size, num_masks, stages", [(2, 24, 2), (4, 8, 1)])
def test_one_graph_for_all_masks(world_size, num_masks, stages):
    assert run(world_size, case_one_graph, num_masks, stages, timeout=240) == [{1}] * world_size


def case_schedule(stages):
    compiled = torch.compile(attend_here, fullgraph=True)
    plan = plan_here(Mask.causal(64), stages=stages, movement="anywhere")
    _, codes = run_and_get_code(lambda: step(compiled, plan))
    return [schedule(code) for code in codes]


class TestSchedule(expecttest.TestCase):
    """What Inductor generates: guests travel beneath own rows with own keys, and home beneath the last own rows."""

    def test_two_stages(self):
        (forward, backward), other = run(2, case_schedule, 2, timeout=240)
        assert [forward, backward] == other
        self.assertExpectedInline(
            forward,
            """\
launch group_cast 1
launch group_cast 2
ffa_fwd
wait   group_cast 1
ffa_fwd
launch group_cast 3
wait   group_cast 2
ffa_fwd
ffa_fwd
wait   group_cast 3
ffa_fwd
launch group_reduce 1
ffa_fwd
wait   group_reduce 1
range_gather
range_scatter_reduce""",
        )
        self.assertExpectedInline(
            backward,
            """\
ffa_delta
launch group_cast 1
launch group_cast 2
launch group_cast 3
ffa_bwd
wait   group_cast 1
wait   group_cast 2
ffa_bwd
launch group_cast 4
wait   group_cast 3
ffa_bwd
ffa_bwd
launch group_reduce 1
wait   group_cast 4
ffa_bwd
launch group_reduce 2
ffa_bwd
launch group_reduce 3
wait   group_reduce 2
wait   group_reduce 1
wait   group_reduce 3
range_scatter_reduce
range_scatter_reduce
range_scatter_reduce""",
        )
