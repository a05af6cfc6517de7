"""What does `attend` cost a host beside its work? One process on gloo, 16 rows: nothing to compute, nothing to send.

python benchmarks/attend_host.py [--stages 1 2 4]

Prints microseconds a call (least of five medians): `attend`, forward and both ways, eager; and the kernels and
collectives of the forward called one by one, which nothing in Python can take away.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from magi_attention import Mask, PlanConfig, attend, build_plan

_ops, _collectives = torch.ops.magi, torch.ops._c10d_functional


def microseconds(function: Callable[[], object]) -> float:
    medians = []
    for _ in range(5):
        times = []
        for _ in range(100):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    return 1e6 * min(medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        group = dist.group.WORLD
        q, k, v = (torch.randn(16, heads, 16) for heads in (2, 1, 1))
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        print(f"{'stages':>6}{'forward':>10}{'and back':>10}{'forward, without host':>24}   us")
        for stages in arguments.stages:
            plan = build_plan(Mask.causal(16), world_size=1, rank=0, config=PlanConfig(stages=stages))

            def both(plan=plan) -> None:
                attend(*inputs, plan, group)[0].backward(q)

            @torch.inference_mode()
            def work(plan=plan) -> None:
                for _ in range(1 + len(plan.stages)):
                    _ops.ffa_fwd(q, k, v, plan.slices, softmax_scale=0.25)
                for stage in plan.stages:
                    rows = _ops.range_gather(k, stage.send_ranges, 0)
                    _collectives.wait_tensor(_collectives.all_to_all_single(rows, [0], [0], group.group_name))

            forward = microseconds(lambda plan=plan: attend(q, k, v, plan, group))
            print(f"{stages:>6}{forward:>10.0f}{microseconds(both):>10.0f}{microseconds(work):>24.0f}")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
