"""Pictures of a plan; the only place that needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from magi_attention.plan.build import MaskLike
    from magi_attention.plan.overview import Overview


def draw_overview(overview: Overview, path: str | os.PathLike[str] | None, mask: MaskLike | None) -> Figure:
    """Ownership, one transfer matrix for each stage, and the timeline of every rank."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing a plan needs matplotlib: pip install 'magi_attention[viz]'") from error
    stages = len(overview.rows)
    figure = Figure(figsize=(5 + 3 * stages, 8.5), dpi=130, layout="constrained")
    grid = figure.add_gridspec(2, 1 + stages, width_ratios=[1.4] + [1] * stages, height_ratios=[1.25, 1])
    remote = overview.remote_rows.double()
    figure.suptitle(
        f"{overview.total_q:,} rows on {overview.world_size} ranks, chunks of {overview.chunk}; predicted forward "
        f"{overview.step_time * 1e3:.3g} ms\n"
        f"area imbalance {overview.imbalance:.3f}; remote rows per rank: mean {remote.mean():,.0f}, "
        f"most {remote.max():,.0f}",
        fontsize=11,
    )
    _ownership(figure.add_subplot(grid[0, 0]), overview, mask)
    shared = int(overview.rows.max())
    image = None
    for stage in range(stages):
        axes = figure.add_subplot(grid[0, 1 + stage], xlabel="to rank", ylabel="from rank")
        axes.set_title(f"stage {stage + 1}: {int(overview.rows[stage].sum()):,} rows")
        image = axes.imshow(overview.rows[stage].numpy(), cmap="Blues", vmin=0, vmax=max(shared, 1))
        if overview.world_size <= 8:
            _numbers(axes, overview.rows[stage], shared)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.7, label="key rows")
    _timeline(figure.add_subplot(grid[1, :]), overview)
    if path is not None:
        figure.savefig(path)
    return figure


def _colors(count: int) -> list[tuple[float, float, float, float]]:
    from matplotlib import colormaps

    names = "tab10" if count <= 10 else "tab20" if count <= 20 else "turbo"
    colormap = colormaps[names]
    return [colormap(i if count <= 20 else i / (count - 1)) for i in range(count)]


def _ownership(axes: Axes, overview: Overview, mask: MaskLike | None) -> None:
    """The mask, each row in the colour of the rank that owns (and computes) it."""
    palette = _colors(overview.world_size)
    colors = torch.tensor(palette)[:, :3]
    owner = torch.zeros(overview.total_q, dtype=torch.int64)
    for rank, chunks in enumerate(overview.chunks.tolist()):
        for c in chunks:
            if c >= 0:
                owner[c * overview.chunk : (c + 1) * overview.chunk] = rank
    coverage = getattr(mask, "coverage", None)
    shade = coverage(512) if coverage is not None else torch.ones(min(overview.total_q, 512) or 1, 1)
    shade = torch.where(shade > 0, 0.25 + 0.75 * shade, 0.0)
    rows = -(-overview.total_q // 512) or 1
    tint = colors[owner[rows // 2 :: rows][: len(shade)]] if overview.total_q else colors[:1]
    if len(tint) < len(shade):
        tint = torch.cat([tint, colors[owner[-1:]]])
    picture = 1 - shade[..., None] * (1 - tint[:, None, :])
    extent = (0, max(overview.total_k, 1), max(overview.total_q, 1), 0)
    axes.imshow(picture.numpy(), extent=extent, aspect="auto", interpolation="nearest")
    axes.set(title="rows by owner", xlabel="key", ylabel="row")
    if overview.world_size <= 16:
        from matplotlib.patches import Patch

        handles = [Patch(color=color, label=str(rank)) for rank, color in enumerate(palette)]
        axes.legend(handles=handles, title="rank", fontsize=7, title_fontsize=7, loc="upper right")


def _numbers(axes: Axes, rows: torch.Tensor, most: int) -> None:
    for source, line in enumerate(rows.tolist()):
        for target, count in enumerate(line):
            if count:
                color = "white" if count > most / 2 else "black"
                axes.text(target, source, f"{count:,}", ha="center", va="center", fontsize=7, color=color)


def _timeline(axes: Axes, overview: Overview) -> None:
    """Two lanes for each rank: what it computes, and what arrives meanwhile."""
    stages = len(overview.rows)
    colors = _colors(max(stages + 1, 3))
    for rank, spans in enumerate(overview.timeline()):
        for span in spans:
            lane = rank - 0.4 if span.kind == "compute" else rank + 0.02
            axes.broken_barh(
                [(span.begin * 1e3, (span.end - span.begin) * 1e3)],
                (lane, 0.38),
                facecolor=colors[span.stage],
                alpha=1.0 if span.kind == "compute" else 0.45,
            )
    from matplotlib.patches import Patch

    names = ["own keys"] + [f"stage {s + 1}" for s in range(stages)]
    axes.legend(
        handles=[Patch(color=colors[s], label=name) for s, name in enumerate(names)], loc="lower right", fontsize=7
    )
    axes.set(
        xlabel="predicted ms (solid: compute; pale: rows arriving)", ylabel="rank", title="forward pass of each rank"
    )
    axes.set_ylim(overview.world_size - 0.5, -0.5)
    if overview.world_size <= 16:
        axes.set_yticks(range(overview.world_size))
