"""From a mask to a plan: the calls into the planner core, and a cache of their results."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from magi_attention import ops  # noqa: F401  (loads the library that holds the planner)
from magi_attention.plan.config import PlanConfig
from magi_attention.plan.tables import Guests, Layout, Plan, Stage


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
    equal_share = max(1, -(-total // (chunk * world_size)))
    return [total, chunk, world_size, math.ceil(equal_share * (1 + config.spare))]


def _grid_of(layout: Layout) -> list[int]:
    return [layout.total, layout.chunk, layout.world_size, layout.chunks.shape[1]]


def _layout(grid: list[int], chunks: Tensor, ranges: Tensor, rank: int) -> Layout:
    total, chunk, world_size, slots = grid
    num_owned = sum(end - begin for begin, end in ranges.tolist())
    rows = slots * chunk
    carriers = [torch.empty(n, 0, dtype=torch.int32) for n in (rows, num_owned, total, chunk)]
    return Layout(total, chunk, world_size, rank, rows, num_owned, chunks, ranges, *carriers)


@dataclass(frozen=True)
class PlanArguments:
    """Checked arguments of one planning call, ownership included."""

    slices: Tensor
    q_grid: list[int]
    k_grid: list[int]
    q_chunks: Tensor
    k_chunks: Tensor
    config: PlanConfig
    moves: Tensor | None = None  # int32 [n, 5] q0 q1 k0 k1 rank: what is computed away from the owner of its rows

    @property
    def tables(self) -> tuple[object, ...]:
        """What every op on a mask with owners begins with."""
        return self.slices, self.q_chunks, self.k_chunks, self.q_grid, self.k_grid


def plan_arguments(
    masks: Sequence[MaskLike],
    weights: Sequence[float],
    world_size: int,
    rank: int,
    config: PlanConfig | None,
    layout_of: Plan | None,
    moves: Tensor | None = None,
) -> list[PlanArguments]:
    """Checks what `build_plan` was given, and decides who owns which rows. ValueError names what is wrong."""
    config = PlanConfig() if config is None else config
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if config.node_size is not None and world_size % config.node_size:
        raise ValueError(f"node_size must divide the world size {world_size}, got {config.node_size}")
    if not masks:
        raise ValueError("masks must hold at least one mask, got none")
    if len(weights) != len(masks) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights must be one positive number for each of {len(masks)} masks, got {list(weights)}")
    total_q, total_k = masks[0].total_q, masks[0].total_k
    for mask in masks:
        slices = mask.slices
        if slices.device.type != "cpu" or slices.dtype != torch.int32 or slices.dim() != 2 or slices.shape[1] != 6:
            raise ValueError(
                "mask.slices must be int32 [n, 6] on the CPU, "
                f"got {slices.dtype} {list(slices.shape)} on {slices.device}"
            )
        if (mask.total_q, mask.total_k) != (total_q, total_k):
            raise ValueError(
                f"masks must have equal lengths to share their rows, got {total_q} x {total_k} "
                f"and {mask.total_q} x {mask.total_k}"
            )
    if layout_of is not None:
        q, k = layout_of.q_layout, layout_of.k_layout
        given, expected = (q.world_size, q.total, k.total), (world_size, total_q, total_k)
        if given != expected:
            raise ValueError(f"layout_of must have world_size, total_q, total_k = {expected}, got {given}")
        owned = _grid_of(q), _grid_of(k), q.chunks, k.chunks
    else:
        q_grid, k_grid = _grid(total_q, world_size, config), _grid(total_k, world_size, config)
        slices_of = [mask.slices for mask in masks]
        q_chunks = torch.ops.magi.plan_ownership(slices_of, list(weights), q_grid, total_k, config.costs())
        k_chunks = q_chunks
        if total_q != total_k:
            k_chunks = torch.ops.magi.plan_key_ownership(slices_of, list(weights), q_chunks, q_grid, k_grid)
        owned = q_grid, k_grid, q_chunks, k_chunks
    calls = [PlanArguments(mask.slices, *owned, config) for mask in masks]
    if config.movement == "keys":
        if moves is not None:
            raise ValueError("moves need a config with movement 'auto', got 'keys'")
        return calls
    if moves is None:
        return [replace(call, moves=torch.ops.magi.plan_moves(*call.tables, config.costs())) for call in calls]
    if moves.dtype != torch.int32 or moves.dim() != 2 or moves.shape[1] != 5 or moves.device.type != "cpu":
        raise ValueError(
            f"moves must be int32 [n, 5] on the CPU, got {moves.dtype} {list(moves.shape)} on {moves.device}"
        )
    return [replace(call, moves=moves) for call in calls]


def build_plan(
    mask: MaskLike,
    *,
    world_size: int,
    rank: int,
    config: PlanConfig | None = None,
    layout_of: Plan | None = None,
    moves: Tensor | None = None,
) -> Plan:
    """The plan of one rank for one mask. Needs no GPU and no process group; all ranks agree without talking.

    Where the mask has as many keys as rows, query rows and keys share one layout (self-attention); otherwise each has
    its own.

    Args:
        mask: a `Mask`, or anything with its `slices`, `total_q` and `total_k`; slices must not overlap.
        world_size, rank: of the context-parallel group.
        config: see `PlanConfig`.
        layout_of: a plan whose layouts this one takes over, so that both serve the same dispatched rows (a model whose
            layers have different masks); by default the layouts are chosen for this mask. See also `build_plans`.
        moves: int32 [n, 5] on the CPU, disjoint rectangles `q0 q1 k0 k1 rank`, the same on every rank: their cells are
            computed by that rank. With `config.movement` "auto" only; by default they are chosen by cost.

    Raises:
        ValueError: names the argument that is wrong, before anything is planned.

    Example:
        >>> plan = build_plan(Mask.causal(4096), world_size=4, rank=0)
        >>> plan.q_layout.rows, round(plan.imbalance, 3)
        (1024, 1.0)
    """
    return _plan(plan_arguments([mask], [1.0], world_size, rank, config, layout_of, moves)[0], rank, layout_of)


def build_plans(
    masks: Sequence[MaskLike],
    *,
    weights: Sequence[float] | None = None,
    world_size: int,
    rank: int,
    config: PlanConfig | None = None,
) -> tuple[Plan, ...]:
    """Plans for several masks over the same rows, with one layout that serves all of them as well as it can.

    For a model whose layers have different masks, say windows and full attention: its rows are dispatched once. What
    is made equal among ranks is the weighted sum over the masks; a single mask may then be less balanced.

    Args:
        masks: of equal lengths, at least one.
        weights: how often the model applies each; equal by default.
        world_size, rank, config: as in `build_plan`, and so are the errors.

    Example:
        >>> window, full = Mask.sliding_window(4096, 127, 0), Mask.causal(4096)
        >>> plans = build_plans([window, full], weights=[5, 1], world_size=4, rank=0)
        >>> plans[0].q_layout is plans[1].q_layout
        True
    """
    weights = [1.0] * len(masks) if weights is None else weights
    plans: list[Plan] = []
    for call in plan_arguments(masks, weights, world_size, rank, config, None):
        plans.append(_plan(call, rank, plans[0] if plans else None))
    return tuple(plans)


def _plan(call: PlanArguments, rank: int, layout_of: Plan | None) -> Plan:
    config = call.config
    if config.node_size is None:
        out = torch.ops.magi.plan_tables(*call.tables, rank, config.stage_counts, config.costs(), call.moves)
    else:
        out = torch.ops.magi.plan_relay(*call.tables, rank, config.node_size, config.stage_counts, config.costs())
    if layout_of is not None and layout_of.rank == rank:
        q_layout, k_layout = layout_of.q_layout, layout_of.k_layout
    else:
        q_layout = _layout(call.q_grid, call.q_chunks, out[0], rank)
        k_layout = q_layout if call.k_chunks is call.q_chunks else _layout(call.k_grid, call.k_chunks, out[1], rank)
    guests, rest = (None, out[4:]) if call.moves is None else (Guests(*out[4:9]), out[9:])
    return Plan(q_layout, k_layout, out[2], *stages_of(rest, config), config, out[3], guests)


def stages_of(tables: list[Tensor], config: PlanConfig) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Stages of the forward and of the backward."""
    width = len(tables) // sum(config.stage_counts)
    rows = [tables[i : i + width] for i in range(0, len(tables), width)]

    def stages(rows: list[list[Tensor]]) -> tuple[Stage, ...]:
        if config.movement != "keys":
            return tuple(Stage(row[0], row[1], row[2], row[3], row[4], guest_slices=row[5]) for row in rows)
        # Of several stages nothing of the first one comes from other nodes.
        return tuple(Stage(*(row if i > 0 or len(rows) == 1 else row[:5])) for i, row in enumerate(rows))

    return stages(rows[: config.stages]), stages(rows[config.stages :])


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
