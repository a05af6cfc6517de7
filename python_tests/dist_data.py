"""What do the distributed tests attend? Random masks and inputs, the same on every rank, and a rank's rows of them."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from magi_attention.mask import Mask
from magi_attention.plan import Layout, Plan, PlanConfig, build_plan
from magi_attention.reference import Attention


def plan_here(
    mask: Mask,
    chunk: int = 8,
    *,
    world_size: int | None = None,
    rank: int | None = None,
    movement: str = "keys",
    seed: int = 0,
    **config: Any,
) -> Plan:
    """The plan of this process. With movement "anywhere" random rectangles are computed on random ranks."""
    world_size = dist.get_world_size() if world_size is None else world_size
    rank = dist.get_rank() if rank is None else rank
    moves = random_moves(mask, world_size, seed) if movement == "anywhere" else None
    options = PlanConfig(chunk=chunk, movement="keys" if movement == "keys" else "auto", **config)
    return build_plan(mask, world_size=world_size, rank=rank, config=options, moves=moves)


def random_moves(mask: Mask, world_size: int, seed: int) -> Tensor:
    """Half of the cells of a random grid, each for a random rank."""
    g = random.Random(seed)
    cuts = [sorted({0, total, *(g.randint(0, total) for _ in range(4))}) for total in (mask.total_q, mask.total_k)]
    cells = itertools.product(*map(itertools.pairwise, cuts))
    moved = [(*q, *k, g.randrange(world_size)) for q, k in cells if g.random() < 0.5]
    return torch.tensor(moved, dtype=torch.int32).reshape(-1, 5)


def rows_of(layout: Layout) -> Tensor:
    """Global rows of a rank's rows, in order."""
    return torch.cat([torch.arange(begin, end) for begin, end in layout.ranges.tolist()] or [torch.arange(0)])


def local(x: Tensor, layout: Layout) -> Tensor:
    """A rank's rows of a sequence, then zeros."""
    y = x.new_zeros((layout.rows, *x.shape[1:]))
    y[: layout.num_owned] = x[rows_of(layout)]
    return y


def inputs(
    mask: Mask, *, heads=(4, 2), head_dim=16, v_dim=8, sinks=0, dtype=torch.float32, seed=0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Whole q, k, v (and sink), dout, dlse."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int, dtype=dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    tensors = [randn(mask.total_q, heads[0], head_dim)]
    tensors += [randn(mask.total_k, heads[1], d) for d in (head_dim, v_dim)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if sinks:
        tensors.append(randn(sinks, heads[0], dtype=wide))
    return tensors, randn(mask.total_q, heads[0], v_dim), randn(mask.total_q, heads[0], dtype=wide)


def owned(want: Attention, plan: Plan) -> Attention:
    """This rank's rows of whole results, without padding. dsink stays whole."""
    q, k = rows_of(plan.q_layout), rows_of(plan.k_layout)
    places = (q, q, q, k, k)
    return Attention(*(None if x is None else x[at] for x, at in zip(want, places)), want.dsink)


def random_masks(count: int, total: int | None = None) -> Iterator[Mask]:
    """Different in all that shapes a plan: length, documents, no remote key, a single one, no cell at all."""
    g = random.Random(0)
    for i in range(count):
        n = total or g.choice([33, 61, 64, 96, 128, 200])
        kind = i % 8
        if kind == 0:
            yield Mask.from_slices([], [], [], total_q=n, total_k=n)  # nothing at all
        elif kind == 1:
            yield Mask.from_slices([[0, n]], [[n // 2, n // 2 + 1]], [0], total_q=n, total_k=n)  # one key for all
        elif kind == 2:
            yield Mask.sliding_window(n, 0, 0)  # every row itself: nothing is remote
        elif kind == 3:
            yield Mask.from_slices([[0, 1]], [[n - 1, n]], [0], total_q=n, total_k=n)  # one cell
        elif kind == 4:
            yield Mask.sliding_window(n, g.randint(0, n), g.randint(0, 9))
        else:
            cuts = sorted({0, n, *(g.randint(0, n) for _ in range(g.randint(0, 12)))})
            yield Mask.varlen(cuts, causal=kind != 5)
