"""How to plan, and for which hardware?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class HardwareProfile:
    """What a rank can do, as far as planning depends on it.

    Attributes:
        flops: attention kernel rate in floating-point operations a second, on whole tiles of long rows.
        bandwidth: bytes a second that a rank receives.
        launch: seconds that a collective, or a stage that computes, takes besides its work.
        exposed: share of the shorter one of compute and communication that is not hidden behind the longer one.
        traffic: worth of communication that does hide, as a share of its time: it still takes memory bandwidth and
            power from other work. It decides between plans that take equally long.
        fill: what a kernel's tile of 128 rows takes besides its tiles of 128 keys, in tiles of keys: short documents
            and windows take longer than their cells. From the forward's times on one H200: documents of 512 and 2,048
            rows, a window of 1,024 keys and long sequences agree on 2.3 to 2.8.
    """

    flops: float = 700e12
    bandwidth: float = 360e9
    launch: float = 50e-6
    exposed: float = 0.05
    traffic: float = 0.1
    fill: float = 2.6

    def __post_init__(self) -> None:
        for name in "flops", "bandwidth":
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.fill >= 0:
            raise ValueError(f"fill must be at least 0, got {self.fill}")
        for name in "exposed", "traffic":
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share between 0 and 1, got {getattr(self, name)}")


H200_NVLINK = HardwareProfile()  # eight GPUs of one host, NCCL all-to-all of 16 MB and more
H200_INFINIBAND = HardwareProfile(bandwidth=45e9, launch=80e-6)  # one 400 Gb/s adapter for each GPU


@dataclass(frozen=True)
class PlanConfig:
    """How to plan.

    Attributes:
        chunk: rows that move to a rank together. By default a 64th of a rank's rows in whole tiles of 128, from 128 to
            512; short sequences get smaller chunks, so that every rank has at least 16.
        spare: slots that every rank has beyond an equal share, as a share of it. With 0 all ranks own equally many
            chunks; with 0.25 a rank may own up to a quarter more rows, and others fewer, where that moves or takes
            less. Local tensors have room for the most on every rank.
        stages: remote stages of the forward, fixed for a compiled function. The communication of one overlaps the
            compute before it. `choose_stages` finds good numbers for a run.
        backward_stages: those of the backward, which computes and sends more; by default as many as `stages`. What is
            in each is chosen for the backward alone.
        node_size: ranks of a node (rank node * node_size + place), where ranks share nodes, a slower network between
            these. A row then crosses to a node once, to the rank at its owner's place, and goes on from there to the
            ranks that need it; `attend` takes a mesh of two dimensions, nodes x ranks of a node. `profile` is that of
            the network.
        heads: query heads and key/value heads of the model; with `head_dim` and `profile` they weigh compute
            against communication.
        head_dim: width of a head.
        movement: "keys" or "auto". With "keys" a row is computed where it lives and keys travel to it. With "auto"
            query rows may travel too, as guests of other ranks, and their partial results come back, where the cost
            model finds that shorter: without grouped heads on many ranks, or where few rows see many keys. It is part
            of the compiled graph, and adds two launches to the forward pass and three to the backward even to masks
            for which nothing but keys moves.
        slack: share of the mean step time by which a rank may exceed it before more rows are moved to relieve it.
        profile: what the hardware can do.
    """

    chunk: int | None = None
    spare: float = 0.0
    stages: int = 2
    backward_stages: int | None = None
    node_size: int | None = None
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    movement: Literal["keys", "auto"] = "keys"
    slack: float = 0.01
    profile: HardwareProfile = field(default_factory=HardwareProfile)

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 row, got {self.chunk}")
        if not 0 <= self.spare <= 1:
            raise ValueError(f"spare must be a share between 0 and 1, got {self.spare}")
        for name, count in zip(("stages", "backward_stages"), self.stage_counts):
            if not 1 <= count <= 64:
                raise ValueError(f"{name} must be between 1 and 64, got {count}")
        if self.movement != "keys" and self.node_size is not None:
            raise ValueError(f"movement must be 'keys' with a node_size: over nodes rows stay, got {self.movement!r}")
        if self.node_size is not None and self.node_size < 1:
            raise ValueError(f"node_size must be at least 1, got {self.node_size}")
        if len(self.heads) != 2 or min(self.heads) < 1:
            raise ValueError(f"heads must be at least one query head and one key/value head, got {self.heads}")
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}")
        if self.movement not in ("keys", "auto"):
            raise ValueError(f"movement must be 'keys' or 'auto', got {self.movement!r}")
        if not self.slack >= 0:
            raise ValueError(f"slack must be at least 0, got {self.slack}")

    def replace(self, **changes: Any) -> PlanConfig:
        """A copy with other values for some fields."""
        return dataclasses.replace(self, **changes)

    @property
    def stage_counts(self) -> list[int]:
        """Remote stages of the forward and of the backward."""
        return [self.stages, self.stages if self.backward_stages is None else self.backward_stages]

    def chunk_rows(self, total: int, world_size: int) -> int:
        """Rows of a chunk for a sequence of `total` rows."""
        rows = -(-total // world_size)
        if self.chunk is not None:
            return max(1, min(self.chunk, rows))
        if rows < 16 * _TILE:
            return max(1, -(-rows // 16))
        return min(max(rows // 64 // _TILE, 1), 4) * _TILE

    def cost_model(self) -> CostModel:
        """What the planner weighs against each other."""
        (heads, kv_heads), bandwidth = self.heads, self.profile.bandwidth
        return CostModel(
            cell=4 * heads * self.head_dim / self.profile.flops,
            row=4 * kv_heads * self.head_dim / bandwidth,
            launch=self.profile.launch,
            exposed=self.profile.exposed,
            traffic=self.profile.traffic,
            slack=self.slack,
            guest=2 * heads * self.head_dim / bandwidth,
            returned=4 * heads * (self.head_dim + 1) / bandwidth,
            guest_backward=4 * heads * (self.head_dim + 2) / bandwidth,
            returned_backward=4 * heads * self.head_dim / bandwidth,
            fill=self.profile.fill,
        )

    def costs(self) -> list[float]:
        """The cost model as the planner's core takes it."""
        return list(self.cost_model())


class CostModel(NamedTuple):
    """Seconds of a forward pass, for 16-bit queries, keys and values and 32-bit partial results; csrc/plan/cost.h.

    Attributes:
        cell: of one cell of a tile that the kernel computes, all heads.
        row: of one received key row.
        launch: of a collective, or a stage that computes.
        exposed, traffic, slack: shares, as in `HardwareProfile` and `PlanConfig`.
        guest, returned: of one received guest row, of one partial result that comes back.
        guest_backward, returned_backward: the same in a backward pass.
        fill: as in `HardwareProfile`.
    """

    cell: float
    row: float
    launch: float
    exposed: float
    traffic: float
    slack: float
    guest: float
    returned: float
    guest_backward: float
    returned_backward: float
    fill: float


_TILE = 128  # rows of a kernel's query tile: chunks of whole tiles leave no ragged ones
