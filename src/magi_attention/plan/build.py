"""From a mask to a plan: the calls into the planner core, and a cache of their results."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import torch
from torch import Tensor

from magi_attention import ops  # noqa: F401  (loads the library that holds the planner)
from magi_attention.plan.config import PlanConfig
from magi_attention.plan.tables import Layout, Plan, Stage


class MaskLike(Protocol):
    """What planning reads of a mask: band slices int32 [n, 6] on the CPU, and how many rows and keys there are."""

    @property
    def slices(self) -> Tensor: ...
    @property
    def total_q(self) -> int: ...
    @property
    def total_k(self) -> int: ...


def _grid(total: int, world_size: int, config: PlanConfig) -> list[int]:
    chunk = config.chunk_rows(total, world_size)
    return [total, chunk, world_size, max(1, -(-total // (chunk * world_size)))]


def _layout(grid: list[int], chunks: Tensor, ranges: Tensor, rank: int) -> Layout:
    total, chunk, world_size, slots = grid
    owned = chunks[rank]
    last = (total - 1) // chunk  # only this chunk may be short
    num_owned = int((owned >= 0).sum()) * chunk - (chunk * (last + 1) - total if bool((owned == last).any()) else 0)
    return Layout(total, chunk, world_size, rank, slots * chunk, num_owned, chunks, ranges)


def build_plan(mask: MaskLike, *, world_size: int, rank: int, config: PlanConfig | None = None) -> Plan:
    """The plan of one rank for one mask. Needs no GPU and no process group; all ranks agree without talking.

    Where the mask has as many keys as rows, query rows and keys share one layout (self-attention); otherwise each has
    its own.

    Args:
        mask: a `Mask`, or anything with its `slices`, `total_q` and `total_k`; slices must not overlap.
        world_size, rank: of the context-parallel group.
        config: see `PlanConfig`.

    Raises:
        ValueError: names the argument that is wrong, before anything is planned.

    Example:
        >>> plan = build_plan(Mask.causal(4096), world_size=4, rank=0)
        >>> plan.q_layout.rows, round(plan.imbalance, 3)
        (1024, 1.0)
    """
    config = PlanConfig() if config is None else config
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    slices, total_q, total_k = mask.slices, mask.total_q, mask.total_k
    if slices.device.type != "cpu" or slices.dtype != torch.int32 or slices.dim() != 2 or slices.shape[1] != 6:
        raise ValueError(
            f"mask.slices must be int32 [n, 6] on the CPU, got {slices.dtype} {list(slices.shape)} on {slices.device}"
        )
    q_grid, k_grid = _grid(total_q, world_size, config), _grid(total_k, world_size, config)
    magi = torch.ops.magi
    q_chunks = magi.plan_ownership(slices, q_grid, total_k, config.costs())
    if total_q == total_k:
        k_chunks = q_chunks
    else:
        # Transposed, the keys ask for rows: they are dealt like rows are.
        q0, q1, k0, k1, lo, hi = slices.unbind(1)
        transposed = torch.stack([k0, k1, q0, q1, -hi, -lo], dim=1)
        k_chunks = magi.plan_ownership(transposed, k_grid, total_q, config.costs())
    out = magi.plan_tables(slices, q_chunks, k_chunks, q_grid, k_grid, rank, config.stages)
    q_layout = _layout(q_grid, q_chunks, out[0], rank)
    k_layout = q_layout if total_q == total_k else _layout(k_grid, k_chunks, out[1], rank)
    stages = tuple(Stage(*out[i : i + 5]) for i in range(4, len(out), 5))
    return Plan(q_layout, k_layout, out[2], stages, config, out[3])


class PlanCache:
    """Plans by mask and config: a mask that returns is planned once. Bounded: the plan unused for longest leaves.

    Args:
        capacity: plans kept, at least 1.
    """

    def __init__(self, capacity: int = 64) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._capacity = capacity
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plans)

    def build_plan(self, mask: MaskLike, *, world_size: int, rank: int, config: PlanConfig | None = None) -> Plan:
        """`build_plan`, or the plan that it returned before for these cells and these arguments."""
        key = (mask.slices.numpy().tobytes(), mask.total_q, mask.total_k, world_size, rank, config or PlanConfig())
        plan = self._plans.get(key)
        if plan is None:
            plan = build_plan(mask, world_size=world_size, rank=rank, config=config)
            self._plans[key] = plan
            if len(self._plans) > self._capacity:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan
