"""What does one rank need to know? `Plan`: layouts, stages and slices as plain tensors."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from magi_attention.plan.config import PlanConfig

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure
    from typing_extensions import Self

    from magi_attention.plan.build import MaskLike


def _mark(t: Tensor) -> Tensor:
    """Dim 0 depends on the mask: a compiled function must never specialise on it."""
    torch._dynamo.decorators.mark_unbacked(t, 0)
    return t


class _Tables:
    """A frozen dataclass of tensors, compared by content, whose mask-dependent tensors stay marked wherever they go."""

    _unbacked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._mark()

    def _mark(self) -> None:
        for table in self.tables:
            _mark(table)

    def __getstate__(self) -> dict[str, Any]:
        # By value: a tensor would travel between processes as a shared-memory handle each, which takes longer to open
        # than a plan takes to build.
        state = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {k: v.numpy() if isinstance(v, Tensor) and v.device.type == "cpu" else v for k, v in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()})
        self._mark()  # marks are attributes of the tensor object: they are lost between processes

    @property
    def tables(self) -> list[Tensor]:
        """The tensors that depend on the mask: those that move to a device."""
        return [table for name in self._unbacked if (table := getattr(self, name)) is not None]

    def with_tables(self, tables: Iterator[Tensor]) -> Self:
        """A copy with the next of `tables` for each of its own."""
        names = [name for name in self._unbacked if getattr(self, name) is not None]
        return dataclasses.replace(self, **{name: next(tables) for name in names})  # type: ignore[type-var]

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
        local_rows, owned_rows, sequence_rows, chunk_rows: int32 [n, 0] on the CPU, carry `rows`, `num_owned`, `total`
            and `chunk` as shapes: a compiled function would specialise on the numbers.
    """

    total: int
    chunk: int
    world_size: int
    rank: int
    rows: int
    num_owned: int
    chunks: Tensor
    ranges: Tensor
    local_rows: Tensor
    owned_rows: Tensor
    sequence_rows: Tensor
    chunk_rows: Tensor

    _unbacked = ("ranges", "local_rows", "owned_rows", "sequence_rows", "chunk_rows")

    def _mark(self) -> None:
        super()._mark()
        torch._dynamo.decorators.mark_unbacked(self.chunks, 1)


class Hop(NamedTuple):
    """Rows that every rank of a group sends to the others: fields as in `Stage`."""

    ranges: Tensor
    splits: Tensor
    recv_rows: Tensor
    send_rows: Tensor


@dataclass(frozen=True, eq=False)
class Stage(_Tables):
    """One step of communication and what is computed with it.

    The key buffer of a stage holds the received rows by source rank, each source's rows ascending.

    With `config.node_size` rows come in two hops. First every rank sends the rows of `relay_ranges` to the ranks at its
    place in other nodes; they arrive by source node, ascending within. Then it sends the rows of `send_ranges`, which
    count through its own key rows (padding included) and on through those that it just received, to the ranks of its
    node; for itself, those that it relayed and needs. The key buffer then lies by source rank and the owner's node. Of
    several stages the first has no relay: its rows come from the own node, while the next stage's cross.

    Attributes:
        slices: int32 [n, 6], local query rows x rows of the key buffer.
        send_ranges: int32 [m, 2], own key rows to send, by destination rank, ascending within.
        splits: int64 [2, world_size] (with nodes [2, node_size]), always on the CPU: rows to send to and to receive
            from each rank.
        recv_rows, send_rows: int32 [n, 0], carry the two row counts as shapes.
        relay_ranges, relay_splits, relay_rows, relay_send_rows: the same of the hop between nodes, splits [2, nodes];
            None where there is none.
        guest_slices: int32 [n, 6], guest rows x rows of the key buffer; None where query rows do not move.
    """

    slices: Tensor
    send_ranges: Tensor
    splits: Tensor
    recv_rows: Tensor
    send_rows: Tensor
    relay_ranges: Tensor | None = None
    relay_splits: Tensor | None = None
    relay_rows: Tensor | None = None
    relay_send_rows: Tensor | None = None
    guest_slices: Tensor | None = None

    _unbacked = (
        "slices",
        "send_ranges",
        "recv_rows",
        "send_rows",
        "relay_ranges",
        "relay_rows",
        "relay_send_rows",
        "guest_slices",
    )

    @property
    def relay(self) -> Hop | None:
        """Between nodes."""
        ranges, splits, rows, send_rows = self.relay_ranges, self.relay_splits, self.relay_rows, self.relay_send_rows
        if ranges is None or splits is None or rows is None or send_rows is None:
            return None
        return Hop(ranges, splits, rows, send_rows)

    @property
    def arrival(self) -> Hop:
        """To the ranks that compute: the only hop, or the last."""
        return Hop(self.send_ranges, self.splits, self.recv_rows, self.send_rows)


@dataclass(frozen=True, eq=False)
class Guests(_Tables):
    """Query rows that visit other ranks to be computed there, and whose partial results come back to their owners.

    All arrive before the first remote stage, by source rank, each source's rows ascending. The same tables take their
    outputs (and in the backward their gradients) home.

    Attributes:
        slices: int32 [n, 6], guest rows x own key rows.
        send_ranges: int32 [m, 2], own query rows that visit others, by destination rank, ascending within.
        splits, recv_rows, send_rows: as in `Stage`.
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
        slices: int32 [n, 6], local query rows x own key rows, which need no communication.
        stages: the remote stages of the forward; their number is `config.stages`.
        backward_stages: those of the backward: the same cells and rows, divided to hide its communication.
        config: as given to `build_plan`.
        statistics: int64 [world_size, 4 + stages + backward_stages], on the CPU: of every rank the allowed cells that
            it computes, the key rows, the guest rows and the partial results of its own rows that it receives, and
            the key rows of each stage.
        guests: None unless `config.movement` lets query rows move.
    """

    q_layout: Layout
    k_layout: Layout
    slices: Tensor
    stages: tuple[Stage, ...]
    backward_stages: tuple[Stage, ...]
    config: PlanConfig
    statistics: Tensor
    guests: Guests | None = None

    _unbacked = ("slices",)

    @property
    def world_size(self) -> int:
        return self.q_layout.world_size

    @property
    def rank(self) -> int:
        return self.q_layout.rank

    @property
    def area(self) -> Tensor:
        """int64 [world_size], allowed cells that each rank computes."""
        return self.statistics[:, 0]

    @property
    def remote_rows(self) -> Tensor:
        """int64 [world_size], key rows that each rank receives."""
        return self.statistics[:, 1]

    @property
    def guest_rows(self) -> Tensor:
        """int64 [world_size], query rows of others that each rank receives."""
        return self.statistics[:, 2]

    @property
    def returned_rows(self) -> Tensor:
        """int64 [world_size], partial results of its own rows that each rank receives."""
        return self.statistics[:, 3]

    @property
    def stage_rows(self) -> Tensor:
        """int64 [world_size, stages], key rows that each rank receives in each stage of the forward."""
        return self.statistics[:, 4 : 4 + len(self.stages)]

    @property
    def backward_stage_rows(self) -> Tensor:
        """int64 [world_size, backward_stages], the same of the backward."""
        return self.statistics[:, 4 + len(self.stages) :]

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
        moving = [*self.stages, *self.backward_stages, *([] if self.guests is None else [self.guests])]
        tables += [table for part in moving for table in part.tables]
        moved = iter(_move(tables, device))
        new_layouts = [_replace(layout, ranges=next(moved)) for layout in layouts]
        slices = next(moved)
        forward, backward = (
            tuple(stage.with_tables(moved) for stage in stages) for stages in (self.stages, self.backward_stages)
        )
        guests = None if self.guests is None else self.guests.with_tables(moved)
        return Plan(new_layouts[0], new_layouts[-1], slices, forward, backward, self.config, self.statistics, guests)

    def draw(self, mask: MaskLike, path: str | os.PathLike[str] | None = None) -> Figure:
        """This plan's mask by owner, who sends what to whom in each stage, and the predicted timeline of every rank.

        Args:
            mask: the mask that this plan was built for (a plan holds one rank's share only).
            path: PNG, SVG or PDF by its ending; nothing is written without.
        """
        from magi_attention.plan.overview import survey

        overview = survey(mask, world_size=self.world_size, config=self.config, layout_of=self)
        return overview.draw(path, mask=mask)


def _replace(layout: Layout, **changes: Any) -> Layout:
    return dataclasses.replace(layout, **changes)


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
