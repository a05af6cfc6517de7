"""What came of a demo run? The check against one process, three pictures, and report.json."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from magi_attention import Mask, Plan


def check(
    run: dict[str, Any], reference: tuple[list[float], dict[str, Tensor]] | None, bf16: bool
) -> dict[str, dict[str, Any]]:
    """Name -> value, limit and whether it is ok. In bf16 only losses are compared: AdamW turns rounding into steps."""
    results: dict[str, dict[str, Any]] = {}

    def bound(name: str, values: list[float], limit: float) -> None:
        value = torch.tensor(values).max().item()  # a NaN stays one, and is not ok
        results[name] = {"value": value, "limit": limit, "ok": value <= limit}

    if reference is not None:
        losses, parameters = reference
        pairs = zip(run["steps"], losses)  # the run may go on after the reference stops
        bound("losses, relative", [abs(s["loss"] - r) / r for s, r in pairs], 2e-2 if bf16 else 1e-4)
        if not bf16:
            assert run["parameters"].keys() == parameters.keys(), "the two runs have different parameters"
            apart = [(run["parameters"][n] - p).abs().max().item() for n, p in parameters.items()]
            bound("parameters, absolute", apart, 1e-4)
    first, last = run["steps"][0]["graphs"], max(run["graphs"])
    results["graphs per compiled function"] = {
        "value": last,
        "limit": 1,
        "ok": first == last == min(run["graphs"]) == 1 and run["graph_breaks"] == 0,
    }
    return results


def write(
    folder: Path,
    config: Any,
    run: dict[str, Any],
    reference: tuple[list[float], dict[str, Tensor]] | None,
    masks: list[Mask],
    plan: Plan,
    seconds: dict[str, float],
) -> bool:
    """Writes the pictures and report.json, prints a summary; True if all is ok. `plan`: for the first mask."""
    folder.mkdir(parents=True, exist_ok=True)
    checks = check(run, reference, config.bf16)
    passed = all(c["ok"] for c in checks.values())
    later = run["steps"][1:] or run["steps"]  # the first step compiles
    chunk = plan.q_layout.chunk
    heap = [min_heap(mask, config.cp, chunk) for mask in masks[:: config.dp]]
    summary = {
        "device": run["device"],
        "world_size": config.dp * config.cp * config.tp,
        "loss": [run["steps"][0]["loss"], run["steps"][-1]["loss"]],
        "first_step_seconds": run["steps"][0]["seconds"],
        **{
            f"median_{name}": statistics.median(s[name] for s in later)
            for name in ("seconds", "tokens_per_second", "documents", "imbalance", "remote_rows", "plan_ms")
        },
        "distinct_masks": len(set(masks)),
        "heap_median_imbalance": statistics.median(imbalance for imbalance, _ in heap),
        "heap_median_remote_rows": statistics.median(remote for _, remote in heap),
        "seconds": seconds,
    }
    report = {
        "passed": passed,
        "checks": checks,
        "summary": summary,
        "config": dataclasses.asdict(config),
        "torch": torch.__version__,
        "graphs_by_rank": run["graphs"],
        "graph_breaks": run["graph_breaks"],
        "reference_losses": reference[0] if reference else [],
        "steps": run["steps"],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    draw_mask(masks[0], plan).savefig(folder / "mask.png")
    plan.draw(masks[0], folder / "plan.png")
    draw_loss(run["steps"], reference[0] if reference else []).savefig(folder / "loss.png")

    print(
        f"\n{len(run['steps'])} steps on {summary['world_size']} processes, {summary['distinct_masks']} masks. Medians:"
    )
    print("  {median_tokens_per_second:.0f} tokens/s, a plan in {median_plan_ms:.2f} ms".format(**summary))
    print("  imbalance {median_imbalance:.3f}, remote rows {median_remote_rows:.0f}".format(**summary), end="; ")
    print("a min-heap over the same chunks of", chunk, end=": ")
    print("{heap_median_imbalance:.3f}, {heap_median_remote_rows:.0f}".format(**summary))
    if reference is not None:
        print(f"Against one process, eager, with a dense mask, {len(reference[0])} steps:")
    for name, result in checks.items():
        print(
            f"  {name:30s} {result['value']:<9.3g} allowed {result['limit']:<8.3g} {'ok' if result['ok'] else 'FAILED'}"
        )
    print(f"Wrote mask.png, plan.png, loss.png and report.json to {folder}/")
    return passed


def min_heap(mask: Mask, world_size: int, chunk: int) -> tuple[float, int]:
    """Imbalance and remote rows of the classical assignment: the heaviest chunk to the lightest rank with room."""
    total = mask.total_q
    chunks = [mask.crop((start, min(start + chunk, total)), (0, total)) for start in range(0, total, chunk)]
    areas = [c.area() for c in chunks]
    owned: list[list[int]] = [[] for _ in range(world_size)]
    for c in sorted(range(len(chunks)), key=lambda c: -areas[c]):
        room = [rank for rank in owned if len(rank) * world_size < len(chunks)]
        min(room, key=lambda rank: sum(areas[c] for c in rank)).append(c)
    remote = 0
    for rank in owned:
        needed = torch.zeros(total, dtype=torch.bool)
        for q0, q1, k0, k1, lo, hi in torch.cat([chunks[c].slices for c in rank]).tolist():
            needed[max(k0, q0 + lo) : min(k1, q1 + hi)] = True
        for c in rank:
            needed[c * chunk : (c + 1) * chunk] = False
        remote += int(needed.sum())
    busiest = max(sum(areas[c] for c in rank) for rank in owned)
    return busiest * world_size / sum(areas), remote


def draw_mask(mask: Mask, plan: Plan) -> Figure:
    """The packed mask; each row in the colour of the rank that owns it, pale where no key is seen."""
    figure = mask.draw()
    (axes,) = figure.axes
    axes.images[0].set_cmap(LinearSegmentedColormap.from_list("veil", [(1, 1, 1, 0.8), (1, 1, 1, 0)]))
    layout = plan.q_layout
    for rank, chunks in enumerate(layout.chunks.tolist()):
        for i, start in enumerate(c * layout.chunk for c in chunks if c >= 0):
            stop = min(start + layout.chunk, layout.total)
            axes.axhspan(start, stop, color=f"C{rank}", lw=0, zorder=-1, label=None if i else f"rank {rank}")
    axes.legend(loc="upper right")
    return figure


def draw_loss(steps: list[dict[str, Any]], reference: list[float]) -> Figure:
    """The run's losses over those of one process."""
    figure = Figure(figsize=(6, 3.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    if reference:
        axes.plot(range(1, len(reference) + 1), reference, "o", color="C1", mfc="none", label="one process, dense mask")
    axes.plot(range(1, len(steps) + 1), [s["loss"] for s in steps], color="C0", label="this run")
    axes.set(xlabel="step", ylabel="loss (nats per byte)")
    axes.legend()
    return figure
