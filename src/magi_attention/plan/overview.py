"""What do all ranks' plans say together: who sends what to whom, who computes what, how long should it take?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from magi_attention.plan.build import MaskLike, PlanArguments, plan_arguments, stages_of
from magi_attention.plan.config import PlanConfig
from magi_attention.plan.tables import Plan

if TYPE_CHECKING:
    import os

    from matplotlib.figure import Figure


class Span(NamedTuple):
    """One activity of a rank in the predicted step. Stage 0 computes with own keys and receives nothing."""

    # "compute", "receive" (keys), "visit" (guest rows), "return" (of what guests found; in a backward of gradients)
    kind: str
    stage: int
    begin: float  # seconds from the start of the step
    end: float


@dataclass(frozen=True)
class Overview:
    """All ranks' plans for one mask, side by side.

    Attributes:
        chunks: int32 [world_size, slots], chunk ids of every rank's query rows, -1 for padding; `chunk` rows each.
        total_q, total_k, chunk: lengths.
        rows: int64 [stages, world_size, world_size], key rows from each rank (dim 1) to each rank (dim 2); with
            `config.node_size` from the rank of the own node that hands them on, which may be the rank itself.
        areas: int64 [world_size, 1 + stages], allowed cells that each rank computes: with own keys, then in each stage;
            guest rows with own keys in the first stage.
        pieces: int64 [world_size, 1 + stages], slices that they take.
        work: int64 [world_size, 1 + stages], `areas` as the kernel sees them: cells of whole tiles, and what starting
            on a tile of rows takes (`HardwareProfile.fill`). Predicted times are made of it.
        guest_work: int64 [world_size, 1 + stages], the part of `work` that belongs to guest rows.
        backward_rows, backward_areas, backward_pieces, backward_work, backward_guest_work: the same in the stages of
            the backward.
        guest_rows: int64 [world_size, world_size], query rows of each rank (dim 0) that visit each other one (dim 1).
        config: as given to `build_plan`.
    """

    chunks: Tensor
    total_q: int
    total_k: int
    chunk: int
    rows: Tensor
    areas: Tensor
    pieces: Tensor
    work: Tensor
    guest_work: Tensor
    backward_rows: Tensor
    backward_areas: Tensor
    backward_pieces: Tensor
    backward_work: Tensor
    backward_guest_work: Tensor
    guest_rows: Tensor
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
        costs = self.config.cost_model()
        compute, visits = self.work.sum(1) * costs.cell, self.guest_rows
        transfer = self.remote_rows * costs.row + visits.sum(0) * costs.guest + visits.sum(1) * costs.returned
        slowest = float(torch.maximum(compute, transfer).max())
        return float(compute.mean()) / slowest if slowest else 1.0

    def timeline(self) -> list[list[Span]]:
        """The predicted forward pass of every rank: the next stage's rows arrive while this one's are computed with.

        Guest rows arrive before the first stage's keys; what they found returns beneath the last stage's own rows.
        """
        costs = self.config.cost_model()
        return self._timeline(self.rows, self.work, self.guest_work, 1, 0, costs.guest, costs.returned)

    def backward_timeline(self) -> list[list[Span]]:
        """The predicted backward pass of every rank: gradients go home while the next stage computes."""
        costs = self.config.cost_model()
        tables = self.backward_rows, self.backward_work, self.backward_guest_work
        factors = _BACKWARD_COMPUTE, _GRADIENT_ROW
        return self._timeline(*tables, *factors, costs.guest_backward, costs.returned_backward)

    def _timeline(
        self,
        rows: Tensor,
        work: Tensor,
        guest_work: Tensor,
        compute: float,
        gradient: float,
        guest: float,
        returned: float,
    ) -> list[list[Span]]:
        cell, row, launch, *_ = self.config.cost_model()
        received = rows.sum(1)
        guests, visits = self.guest_rows.sum(0).tolist(), self.guest_rows.sum(1).tolist()
        moves = self.config.movement != "keys"
        ranks = []
        for rank, cells in enumerate(work.tolist()):
            arriving: list[int] = received[:, rank].tolist()
            begin, spans = 0.0, []
            for stage, cell_count in enumerate([*cells, 0] if gradient else cells):
                computed = transferred = begin
                if stage < len(cells):
                    computed += compute * cell * cell_count + (launch if stage and cell_count else 0.0)
                    spans.append(Span("compute", stage, begin, computed))
                if gradient and stage >= 2:
                    end = transferred + launch + gradient * row * arriving[stage - 2]
                    spans.append(Span("return", stage - 1, transferred, end))
                    transferred = end
                if moves and stage == 0:
                    end = transferred + launch + guest * guests[rank]
                    spans.append(Span("visit", 1, transferred, end))
                    transferred = end
                if moves and stage + 1 == len(cells):
                    transferred += compute * cell * int(guest_work[rank, stage])
                    end = transferred + launch + returned * visits[rank]
                    spans.append(Span("return", stage, transferred, end))
                    transferred = end
                if stage < len(arriving):
                    end = transferred + launch + row * arriving[stage]
                    spans.append(Span("receive", stage + 1, transferred, end))
                    transferred = end
                begin = max(computed, transferred)
            ranks.append(spans)
        return ranks

    @property
    def step_time(self) -> float:
        """Predicted seconds of the slowest rank's forward pass."""
        return _slowest(self.timeline())

    @property
    def backward_time(self) -> float:
        """Predicted seconds of the slowest rank's backward pass."""
        return _slowest(self.backward_timeline())

    def draw(self, path: str | os.PathLike[str] | None = None, *, mask: MaskLike | None = None) -> Figure:
        """Ownership, transfers and predicted timeline as one matplotlib figure, saved where `path` is given.

        Args:
            path: PNG, SVG or PDF by its ending.
            mask: drawn behind the ownership, where given and able to (`Mask.coverage`).
        """
        from magi_attention.plan.draw import draw_overview

        return draw_overview(self, path, mask)


# As in csrc/plan/cost.h.
_BACKWARD_COMPUTE, _GRADIENT_ROW = 2.5, 2.0


def _slowest(timeline: list[list[Span]]) -> float:
    return max(span.end for spans in timeline for span in spans)


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
    if call.config.node_size is None:
        out = torch.ops.magi.plan_overview(*call.tables, call.config.stage_counts, call.config.costs(), call.moves)
    else:
        out = _survey_nodes(call, world_size, call.config.node_size)
    names = "rows", "areas", "pieces", "work", "guest_work"
    tables = dict(zip((*names, *(f"backward_{name}" for name in names), "guest_rows"), out))
    total_q, chunk = call.q_grid[:2]
    return Overview(call.q_chunks, total_q, call.k_grid[0], chunk, config=call.config, **tables)


def _survey_nodes(call: PlanArguments, world_size: int, node_size: int) -> list[Tensor]:
    """What `plan_overview` says, of plans for nodes."""
    ranks = []
    for rank in range(world_size):
        counts, costs = call.config.stage_counts, call.config.costs()
        out = torch.ops.magi.plan_relay(*call.tables, rank, node_size, counts, costs)
        ranks.append((out[2], stages_of(out[4:], call.config)))
    tables = []
    for of, count in enumerate(call.config.stage_counts):
        rows = torch.zeros(count, world_size, world_size, dtype=torch.int64)
        parts = [[own, *(stage.slices for stage in passes[of])] for own, passes in ranks]
        for rank, (_, passes) in enumerate(ranks):
            node = rank // node_size * node_size
            for number, stage in enumerate(passes[of]):
                rows[number, rank, node : node + node_size] = stage.splits[0]
        areas = [[int(torch.ops.magi.slices_area(part).sum()) for part in of_rank] for of_rank in parts]
        pieces = torch.tensor([[len(part) for part in of_rank] for of_rank in parts])
        costs = call.config.costs()
        work = [[int(torch.ops.magi.slices_work(part, costs)) for part in of_rank] for of_rank in parts]
        tables += [rows, torch.tensor(areas), pieces, torch.tensor(work), torch.zeros_like(pieces)]
    return [*tables, torch.zeros(world_size, world_size, dtype=torch.int64)]


def choose_stages(
    masks: Sequence[MaskLike], *, world_size: int, config: PlanConfig | None = None, largest: int = 6
) -> PlanConfig:
    """The configuration with the numbers of remote stages that give the shortest predicted passes.

    Forward and backward are chosen apart; what is summed up are the predicted times over typical masks of a run. The
    numbers are fixed for a compiled function: choose once, and build all plans of the run with the result. All ranks
    find the same where they are given the same masks.

    Args:
        masks: typical masks of the run, at least one.
        world_size: of the context-parallel group.
        config: everything else; its own numbers of stages are not used.
        largest: the most stages to try.

    Raises:
        ValueError: no masks, or `largest` below 1.

    Example:
        >>> config = choose_stages([Mask.causal(65536)], world_size=8)
        >>> plan = build_plan(Mask.causal(65536), world_size=8, rank=0, config=config)
    """
    if not masks:
        raise ValueError("masks must hold at least one mask, got none")
    if largest < 1:
        raise ValueError(f"largest must be at least 1, got {largest}")
    config = PlanConfig() if config is None else config
    counts = range(1, largest + 1)
    tried = [config.replace(stages=count, backward_stages=count) for count in counts]
    overviews = [[survey(mask, world_size=world_size, config=pinned) for mask in masks] for pinned in tried]
    forward = [sum(overview.step_time for overview in each) for each in overviews]
    backward = [sum(overview.backward_time for overview in each) for each in overviews]
    return config.replace(
        stages=counts[forward.index(min(forward))], backward_stages=counts[backward.index(min(backward))]
    )
