"""Does attend compile to one graph for every mask, equal to eager, with communication beneath compute?"""

import re

import expecttest
import pytest
import torch
import torch.distributed as dist
from dist_data import plan_here, random_masks
from dist_harness import run
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

from magi_attention import Mask
from magi_attention.dist import attend


def step(function, plan, head_dim=16, v_dim=8, dtype=torch.float32):
    """Outputs and gradients of one call on this rank's rows."""
    rows, device = plan.q_layout.rows, plan.slices.device
    g = torch.Generator().manual_seed(rows)
    shapes = ((4, head_dim), (2, head_dim), (2, v_dim), (4, v_dim), (4,))
    *tensors, dlse = (torch.randn(rows, *shape, generator=g).to(device) for shape in shapes)
    q, k, v, dout = (x.to(dtype) for x in tensors)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 0)
    out, lse = function(*inputs, plan)
    return out, lse, *torch.autograd.grad([out, lse], inputs, [dout, torch.where(lse.isfinite(), dlse, 0)])


def attend_here(q, k, v, plan):
    return attend(q, k, v, plan, dist.group.WORLD)


def case_one_graph(num_masks, stages):
    compiled = torch.compile(attend_here, fullgraph=True)
    graphs = set()
    for mask in random_masks(num_masks):
        plan = plan_here(mask, stages=stages)
        for got, want in zip(step(compiled, plan), step(attend_here, plan)):
            assert_close(got, want, rtol=1e-6, atol=1e-6)
        graphs.add(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("world_size, num_masks, stages", [(1, 10, 2), (2, 100, 2), (4, 20, 3)])
def test_one_graph_for_all_masks(world_size, num_masks, stages):
    assert run(world_size, case_one_graph, num_masks, stages, timeout=240) == [{1}] * world_size


CALL = re.compile(r"(?:(\w+) = )?torch\.ops\.(?:magi|_c10d_functional)\.(\w+)\.default\((.*)\)")


def schedule(code):
    """The calls of generated code in order: what is launched or computed, and with which launch a wait ends."""
    names, lines = {}, []
    counts = {"group_cast": 0, "group_reduce": 0}
    for line in code.splitlines():
        if match := re.match(r"\s*(\w+) = (\w+)\s*(?:#.*)?$", line):
            names[match[1]] = names.get(match[2])
            continue
        if not (match := CALL.search(line)):
            continue
        target, op, arguments = match.groups()
        if op in counts:
            counts[op] += 1
            names[target] = f"{op} {counts[op]}"
            lines.append(f"launch {names[target]}")
        elif op == "wait_tensor":
            lines.append(f"wait   {names[arguments]}")
        else:
            lines.append(op)
    return "\n".join(lines)


def case_schedule(stages):
    compiled = torch.compile(attend_here, fullgraph=True)
    _, codes = run_and_get_code(lambda: step(compiled, plan_here(Mask.causal(64), stages=stages)))
    return [schedule(code) for code in codes]


class TestSchedule(expecttest.TestCase):
    """launch(s + 1) < compute(s) < wait(s + 1) in what Inductor generates, the same on every rank."""

    def test_two_ranks_three_stages(self):
        (forward, backward), other = run(2, case_schedule, 3, timeout=240)
        assert [forward, backward] == other
        self.assertExpectedInline(
            forward,
            """\
launch group_cast 1
ffa_fwd
launch group_cast 2
wait   group_cast 1
ffa_fwd
launch group_cast 3
wait   group_cast 2
ffa_fwd
wait   group_cast 3
ffa_fwd""",
        )
        self.assertExpectedInline(
            backward,
            """\
launch group_cast 1
ffa_delta
ffa_bwd
launch group_cast 2
wait   group_cast 1
ffa_bwd
launch group_reduce 1
launch group_cast 3
wait   group_cast 2
ffa_bwd
launch group_reduce 2
wait   group_cast 3
ffa_bwd
launch group_reduce 3
wait   group_reduce 1
range_scatter_reduce
wait   group_reduce 2
range_scatter_reduce
wait   group_reduce 3
range_scatter_reduce""",
        )


def two_layers(q, k, v, plan):
    """The second layer's rows come from the first one's, so its gradients reach back through both."""
    first, lse = attend_here(q, k, v, plan)
    return attend_here(
        torch.cat([first, first], 2) + lse.clamp(min=-10)[..., None], k + first[:, :2].repeat(1, 1, 2), v, plan
    )


def case_two_layers():
    compiled = torch.compile(two_layers, fullgraph=True)
    for mask in random_masks(8):
        plan = plan_here(mask)
        for got, want in zip(step(compiled, plan), step(two_layers, plan)):
            assert_close(got, want, rtol=1e-5, atol=1e-5)
    return counters["stats"]["unique_graphs"]


def test_two_layers_in_one_graph():
    assert run(2, case_two_layers, timeout=240) == [1, 1]


def case_wrong_rows():
    compiled = torch.compile(attend_here, fullgraph=True)
    plan = plan_here(Mask.causal(64))
    q, k, v = torch.randn(32, 4, 16), torch.randn(32, 2, 16), torch.randn(32, 2, 8)
    compiled(q, k, v, plan)
    with pytest.raises(Exception, match=r"plan\.q_layout\.local_rows"):
        compiled(q, k, v, plan_here(Mask.causal(80)))
    dist.barrier()  # nobody is left in a launch
    assert_close(compiled(q, k, v, plan), attend_here(q, k, v, plan))


def test_wrong_rows_are_refused():
    run(2, case_wrong_rows, timeout=240)
