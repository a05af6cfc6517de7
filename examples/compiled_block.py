"""A compiled attention layer over two processes: one graph for all masks, forward and backward.

python examples/compiled_block.py
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from magi_attention import Mask, PlanConfig, attend, build_plan, dispatch, undispatch

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 8, 2, 32, 256


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)  # the same weights and inputs on both ranks
    qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    group = dist.group.WORLD

    @torch.compile(fullgraph=True)
    def layer(x, plan):  # x: the rows of this rank
        q, k, v = qkv(x).unflatten(1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        return attend(q, k, v, plan, group)[0].flatten(1)

    for mask in (Mask.causal(500), Mask.varlen([0, 90, 500]), Mask.sliding_window(500, 63, 0), Mask.prefix_lm(500, 7)):
        plan = build_plan(mask, world_size=2, rank=rank, config=PlanConfig(stages=2, heads=(HEADS, KV_HEADS)))
        x = dispatch(torch.randn(500, WIDTH), plan, group)
        y = undispatch(layer(x, plan), plan, group)
        y.square().sum().backward()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if rank == 0:
            print(f"{mask}: |y| {y.norm():.4f}, {int(plan.remote_rows.sum())} remote rows, {graphs} graph")
        assert graphs == 1
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(main, (folder,), nprocs=2)
