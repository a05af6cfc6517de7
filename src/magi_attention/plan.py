"""Who owns which rows, who sends what to whom, what does each rank compute? `build_plan` turns a mask into a `Plan`.

Planning needs no GPU and no process group, and every rank finds the same answer alone: it can run ahead of time, in a
dataloader worker. The arithmetic is in csrc/plan.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from magi_attention import ops  # noqa: F401  (loads the library that holds the planner)


class MaskLike(Protocol):
    """What planning reads of a mask: band slices int32 [n, 6] on the CPU, and how many rows and keys there are."""

    @property
    def slices(self) -> Tensor: ...
    @property
    def total_q(self) -> int: ...
    @property
    def total_k(self) -> int: ...


@dataclass(frozen=True)
class HardwareProfile:
    """What a rank can do, as far as planning depends on it.

    Attributes:
        flops: attention kernel rate in floating-point operations a second.
        bandwidth: bytes a second that a rank receives.
        exposed: share of the shorter one of compute and communication that is not hidden behind the longer one.
    """

    flops: float = 600e12
    bandwidth: float = 360e9
    exposed: float = 0.1

    def __post_init__(self) -> None:
        if not (self.flops > 0 and self.bandwidth > 0):
            raise ValueError(f"flops and bandwidth must be positive, got {self.flops} and {self.bandwidth}")
        if not 0 <= self.exposed <= 1:
            raise ValueError(f"exposed must be a share between 0 and 1, got {self.exposed}")


@dataclass(frozen=True)
class PlanConfig:
    """How to plan.

    Attributes:
        chunk: rows that move to a rank together, at most. Short sequences get smaller chunks, so that every rank has
            several; smaller chunks balance better, larger ones make longer runs of neighbouring rows.
        stages: remote stages, fixed for a compiled function. The communication of one overlaps the compute of the last.
        heads: query heads and key/value heads of the model; with `head_dim` and `profile` they weigh compute
            against communication.
        head_dim: width of a head.
        profile: what the hardware can do.
    """

    chunk: int = 256
    stages: int = 2
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    profile: HardwareProfile = field(default_factory=HardwareProfile)

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 row, got {self.chunk}")
        if not 1 <= self.stages <= 64:
            raise ValueError(f"stages must be between 1 and 64, got {self.stages}")
        if len(self.heads) != 2 or min(self.heads) < 1 or self.head_dim < 1:
            raise ValueError(f"heads and head_dim must be at least 1, got {self.heads} and {self.head_dim}")

    def costs(self) -> list[float]:
        """Seconds of one allowed cell, seconds of one received key row, exposed share: forward pass, 16-bit keys."""
        return [
            4 * self.heads[0] * self.head_dim / self.profile.flops,
            4 * self.heads[1] * self.head_dim / self.profile.bandwidth,
            self.profile.exposed,
        ]


_CHUNKS_PER_RANK = 8  # at least so many where the sequence is short, so that there is something to balance with


def _mark(t: Tensor) -> Tensor:
    """Dim 0 depends on the mask: a compiled function must never specialise on it."""
    torch._dynamo.decorators.mark_unbacked(t, 0)
    return t


class _Tables:
    """A frozen dataclass of tensors, compared by content, whose mask-dependent tensors stay marked wherever they go."""

    _unbacked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self._unbacked:
            _mark(getattr(self, name))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Marks are attributes of the tensor object: they are lost between processes.
        self.__dict__.update(state)
        for name in self._unbacked:
            _mark(getattr(self, name))

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def _parts(self) -> Iterator[object]:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, _Tables):
                    yield from item._parts()
                else:
                    yield item

    @functools.cached_property
    def digest(self) -> str:
        """Name of the content: equal for equal plans, on every rank and in every process."""
        content = hashlib.blake2b(digest_size=16)
        for part in self._parts():
            if isinstance(part, Tensor):
                content.update(repr((tuple(part.shape), part.dtype)).encode())
                content.update(part.cpu().contiguous().numpy().tobytes())
            else:
                content.update(repr(part).encode())
        return content.hexdigest()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self is other or self.digest == other.digest  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, eq=False)
class Layout(_Tables):
    """Where the rows of one sequence live. Local row s * chunk + i of a rank is row i of the chunk in its slot s.

    Attributes:
        total: rows of the whole sequence.
        chunk: rows of a chunk; the last chunk of the sequence may be shorter.
        world_size, rank: as given to `build_plan`.
        rows: rows of the local tensors, padding included; the same on all ranks.
        num_owned: rows of this rank without padding. They are the first ones.
        chunks: int32 [world_size, slots], on the CPU: chunk ids of every rank, ascending, then -1 for padding.
        ranges: int32 [m, 2], global row ranges of this rank's rows in local order, without padding.
    """

    total: int
    chunk: int
    world_size: int
    rank: int
    rows: int
    num_owned: int
    chunks: Tensor
    ranges: Tensor

    _unbacked = ("ranges",)


@dataclass(frozen=True, eq=False)
class Stage(_Tables):
    """One step of communication and what is computed with it.

    The key buffer of a stage holds the received rows by source rank, each source's rows ascending.

    Attributes:
        slices: int32 [n, 6], local query rows x rows of the key buffer.
        send_ranges: int32 [m, 2], own key rows to send, by destination rank, ascending within.
        splits: int64 [2, world_size], always on the CPU: rows to send to and to receive from each rank.
        recv_rows, send_rows: int32 [n, 0], carry the two row counts as shapes.
    """

    slices: Tensor
    send_ranges: Tensor
    splits: Tensor
    recv_rows: Tensor
    send_rows: Tensor

    _unbacked = ("slices", "send_ranges", "recv_rows", "send_rows")


@dataclass(frozen=True, eq=False)
class Plan(_Tables):
    """All that one rank needs to know to attend its rows under one mask. A value: frozen, hashable, picklable.

    Attributes:
        q_layout, k_layout: where query rows and keys live; one object for self-attention.
        slices: int32 [n, 6], local query rows x own key rows (stage 0: needs no communication).
        stages: the remote stages; their number is `config.stages`.
        config: as given to `build_plan`.
        statistics: int64 [world_size, 2 + stages], on the CPU: of every rank the allowed cells, the key rows it
            receives, and those of each stage.
    """

    q_layout: Layout
    k_layout: Layout
    slices: Tensor
    stages: tuple[Stage, ...]
    config: PlanConfig
    statistics: Tensor

    _unbacked = ("slices",)

    @property
    def world_size(self) -> int:
        return self.q_layout.world_size

    @property
    def rank(self) -> int:
        return self.q_layout.rank

    @property
    def area(self) -> Tensor:
        """int64 [world_size], allowed cells of each rank."""
        return self.statistics[:, 0]

    @property
    def remote_rows(self) -> Tensor:
        """int64 [world_size], key rows that each rank receives."""
        return self.statistics[:, 1]

    @property
    def stage_rows(self) -> Tensor:
        """int64 [world_size, stages], key rows that each rank receives in each stage."""
        return self.statistics[:, 2:]

    @property
    def imbalance(self) -> float:
        """Area of the busiest rank over that of the average one; 1.0 for an empty mask."""
        total = int(self.area.sum())
        return int(self.area.max()) * self.world_size / total if total else 1.0

    def to(self, device: torch.device | str) -> Plan:
        """The same plan with its tables on `device`, moved in one copy. Split sizes and statistics stay on the CPU."""
        device = torch.device(device)
        layouts = [self.q_layout] if self.k_layout is self.q_layout else [self.q_layout, self.k_layout]
        tables = [layout.ranges for layout in layouts] + [self.slices]
        for stage in self.stages:
            tables += [stage.slices, stage.send_ranges, stage.recv_rows, stage.send_rows]
        moved = iter(_move(tables, device))
        new_layouts = [_replace(layout, ranges=next(moved)) for layout in layouts]
        slices = next(moved)
        stages = tuple(Stage(next(moved), next(moved), stage.splits, next(moved), next(moved)) for stage in self.stages)
        return Plan(new_layouts[0], new_layouts[-1], slices, stages, self.config, self.statistics)


def _replace(layout: Layout, **changes: Any) -> Layout:
    return Layout(**{**layout.__getstate__(), **changes})


def _move(tables: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tables copied through one packed buffer; each gets a storage of its own (views would be guarded by offset)."""
    packed = torch.cat([t.flatten() for t in tables])
    if device.type == "cuda":
        packed = packed.pin_memory()
    packed = packed.to(device, non_blocking=True)
    out = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in tables]
    filled = [(t, piece) for t, piece in zip(out, packed.split([t.numel() for t in tables])) if t.numel()]
    if filled:
        torch._foreach_copy_([t for t, _ in filled], [piece.view_as(t) for t, piece in filled])
    return out


def _grid(total: int, world_size: int, config: PlanConfig) -> list[int]:
    chunk = max(1, min(config.chunk, -(-total // (world_size * _CHUNKS_PER_RANK))))
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
