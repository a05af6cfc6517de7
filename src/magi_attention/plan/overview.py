"""What do all ranks' plans say together: who sends what to whom, who computes what, how long should it take?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from magi_attention.plan.build import MaskLike, plan_arguments
from magi_attention.plan.config import PlanConfig
from magi_attention.plan.tables import Plan

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure


class Span(NamedTuple):
    """One activity of a rank in the predicted step. Stage 0 computes with own keys and receives nothing."""

    kind: str  # "compute" or "receive"
    stage: int
    begin: float  # seconds from the start of the step
    end: float


@dataclass(frozen=True)
class Overview:
    """All ranks' plans for one mask, side by side.

    Attributes:
        chunks: int32 [world_size, slots], chunk ids of every rank's query rows, -1 for padding; `chunk` rows each.
        total_q, total_k, chunk: lengths.
        rows: int64 [stages, world_size, world_size], key rows from each rank (dim 1) to each rank (dim 2).
        areas: int64 [world_size, 1 + stages], allowed cells that each rank computes: with own keys, then in each stage.
        pieces: int64 [world_size, 1 + stages], slices that they take.
        config: as given to `build_plan`.
    """

    chunks: Tensor
    total_q: int
    total_k: int
    chunk: int
    rows: Tensor
    areas: Tensor
    pieces: Tensor
    config: PlanConfig

    @property
    def world_size(self) -> int:
        return self.areas.shape[0]

    @property
    def imbalance(self) -> float:
        """Area of the busiest rank over that of the average one; 1.0 for an empty mask."""
        area = self.areas.sum(1).double()
        return float(area.max() / area.mean()) if bool(area.any()) else 1.0

    @property
    def remote_rows(self) -> Tensor:
        """int64 [world_size], key rows that each rank receives."""
        return self.rows.sum((0, 1))

    @property
    def efficiency(self) -> float:
        """Mean compute over the slowest rank's step, if communication and compute overlapped perfectly."""
        cell, row, *_ = self.config.costs()
        compute, transfer = self.areas.sum(1) * cell, self.remote_rows * row
        slowest = float(torch.maximum(compute, transfer).max())
        return float(compute.mean()) / slowest if slowest else 1.0

    def timeline(self) -> list[list[Span]]:
        """The predicted forward pass of every rank: the next stage's rows arrive while this one's are computed with."""
        cell, row, launch, *_ = self.config.costs()
        received = self.rows.sum(1)
        ranks = []
        for rank in range(self.world_size):
            begin, spans = 0.0, []
            for stage, area in enumerate(self.areas[rank].tolist()):
                end = computed = begin + cell * area + (launch if stage and area else 0.0)
                spans.append(Span("compute", stage, begin, computed))
                if stage < len(received):
                    arrived = begin + launch + row * int(received[stage, rank])
                    spans.append(Span("receive", stage + 1, begin, arrived))
                    end = max(computed, arrived)
                begin = end
            ranks.append(spans)
        return ranks

    @property
    def step_time(self) -> float:
        """Predicted seconds of the slowest rank's forward pass."""
        return max(spans[-1].end for spans in self.timeline())

    def draw(self, path: str | os.PathLike[str] | None = None, *, mask: MaskLike | None = None) -> Figure:
        """Ownership, transfers and predicted timeline as one matplotlib figure, saved where `path` is given.

        Args:
            path: PNG, SVG or PDF by its ending.
            mask: drawn behind the ownership, where given and able to (`Mask.coverage`).
        """
        from magi_attention.plan.draw import draw_overview

        return draw_overview(self, path, mask)


def survey(
    mask: MaskLike, *, world_size: int, config: PlanConfig | None = None, layout_of: Plan | None = None
) -> Overview:
    """The plans of all ranks at once: for reports, pictures and the choice of a configuration.

    Takes about as long as `world_size` plans. Arguments and errors as in `build_plan`.

    Example:
        >>> survey(Mask.causal(4096), world_size=4).rows.sum().item() > 0
        True
    """
    (call,) = plan_arguments([mask], [1.0], world_size, 0, config, layout_of)
    rows, areas, pieces = torch.ops.magi.plan_overview(*call.tables, call.config.stages, call.config.costs())
    total_q, chunk = call.q_grid[:2]
    return Overview(call.q_chunks, total_q, call.k_grid[0], chunk, rows, areas, pieces, call.config)


def choose_stages(masks: list[MaskLike], *, world_size: int, config: PlanConfig | None = None, largest: int = 6) -> int:
    """How many remote stages give the shortest predicted step, summed over typical masks of a run.

    The number is fixed for a compiled function: choose once, then pin it with `PlanConfig(stages=...)`.

    Args:
        masks: typical masks of the run, at least one.
        largest: the most stages to try.
    """
    if not masks:
        raise ValueError("masks must hold at least one mask, got none")
    if largest < 1:
        raise ValueError(f"largest must be at least 1, got {largest}")
    config = PlanConfig() if config is None else config

    def time(stages: int) -> float:
        pinned = config.replace(stages=stages)
        return sum(survey(mask, world_size=world_size, config=pinned).step_time for mask in masks)

    return min(range(1, largest + 1), key=time)
