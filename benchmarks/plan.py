"""How balanced, how local and how fast are plans? Prints one table for each question; --json writes the numbers.

python benchmarks/plan.py                      # everything, about two minutes
python benchmarks/plan.py quality structure    # some of: quality structure nodes movement time
python benchmarks/plan.py time --draw docs/plan_time.png

Quality is measured on packed documents (W1) with 64:8 heads and 8,192 rows a rank, as means over packs, next to the
published alternative: a min-heap over chunks of 2,048 rows (MagiAttention's setting) and of 512. Every ownership gets
its tables from the same code, so remote rows are counted alike. Efficiency is mean compute over the slowest rank's
larger one of compute and communication.
"""

from __future__ import annotations

import argparse
import ctypes
import heapq
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from workloads import NUM_PACKS, WORKLOADS, documents_causal

from magi_attention.mask import Mask
from magi_attention.plan import H200_INFINIBAND, PlanConfig, build_plan, survey

ROWS = 8192
CONFIG = PlanConfig(heads=(64, 8))
BARS = {8: (1.02, 0.97), 16: (1.03, 0.96), 32: (1.03, 0.95), 64: (1.03, 0.95), 1024: (1.05, None)}


def min_heap(mask: Mask, world_size: int, chunk: int) -> tuple[list[int], Tensor]:
    """The classical assignment, heaviest chunk to the lightest rank with a free slot: its grid and chunk table."""
    num_chunks = -(-mask.total_q // chunk)
    slots = -(-num_chunks // world_size)
    area = chunk_areas(mask, chunk)
    ranks, lightest = [[] for _ in range(world_size)], [(0, rank) for rank in range(world_size)]
    for c in np.argsort(-area, kind="stable"):
        load, rank = heapq.heappop(lightest)
        ranks[rank].append(int(c))
        if len(ranks[rank]) < slots:
            heapq.heappush(lightest, (load + int(area[c]), rank))
    table = torch.tensor([sorted(owned) + [-1] * (slots - len(owned)) for owned in ranks], dtype=torch.int32)
    return [mask.total_q, chunk, world_size, slots], table


def chunk_areas(mask: Mask, chunk: int) -> np.ndarray:
    """Allowed cells of each chunk of rows, int64 [chunks]: the areas of the slices cut at chunk borders."""
    slices = mask.slices.long()
    first, last = slices[:, 0] // chunk, (slices[:, 1] - 1) // chunk
    which = torch.repeat_interleave(torch.arange(len(slices)), last - first + 1)
    start = (last - first + 1).cumsum(0) - (last - first + 1)
    c = first[which] + torch.arange(len(which)) - start[which]
    cut = slices[which]
    cut[:, 0], cut[:, 1] = torch.maximum(cut[:, 0], c * chunk), torch.minimum(cut[:, 1], (c + 1) * chunk)
    areas = torch.ops.magi.slices_area(cut.to(torch.int32))
    return torch.zeros(-(-mask.total_q // chunk), dtype=torch.int64).index_add_(0, c, areas).numpy()


def quality_of(statistics: Tensor) -> dict[str, float]:
    """Imbalance, remote rows in units of a rank's own, efficiency."""
    cell, row, *_ = CONFIG.costs()
    area, remote = statistics[:, 0].double(), statistics[:, 1].double()
    slowest = torch.maximum(cell * area, row * remote).max()
    return {
        "imbalance": float(area.max() / area.mean()),
        "mean": float(remote.mean()) / ROWS,
        "worst": float(remote.max()) / ROWS,
        "efficiency": float(cell * area.mean() / slowest),
    }


def heap_quality(mask: Mask, world_size: int, chunk: int) -> dict[str, float]:
    grid, table = min_heap(mask, world_size, chunk)
    tables = torch.ops.magi.plan_tables(mask.slices, table, table, grid, grid, 0, [1, 1], CONFIG.costs())
    return quality_of(tables[3])


def our_quality(mask: Mask, world_size: int) -> dict[str, float]:
    return quality_of(build_plan(mask, world_size=world_size, rank=0, config=CONFIG).statistics)


def quality(worlds: list[int]) -> list[dict]:
    """The bars: packed documents, causal."""
    methods: dict[str, Callable[[Mask, int], dict[str, float]]] = {
        "heap 2048": lambda mask, world: heap_quality(mask, world, 2048),
        "heap 512": lambda mask, world: heap_quality(mask, world, 512),
        "ours": our_quality,
    }
    print(f"packed documents, causal, 64:8 heads, {ROWS:,} rows a rank; remote rows in units of a rank's own")
    print(
        f"{'ranks':>6}{'packs':>7}  {'method':12}{'imbalance':>10}{'remote':>9}{'worst':>9}{'x heap 512':>12}"
        f"{'efficiency':>12}  bar"
    )
    rows = []
    for world in worlds:
        seeds = range(2 * NUM_PACKS if world <= 64 else 4)
        masks = [documents_causal(ROWS * world, seed=seed) for seed in seeds]
        means = {}
        for name, method in methods.items():
            results = [method(mask, world) for mask in masks]
            means[name] = {key: float(np.mean([r[key] for r in results])) for key in results[0]}
        for name, mean in means.items():
            ratio = mean["mean"] / means["heap 512"]["mean"]
            imbalance_bar, efficiency_bar = BARS.get(world, (1.05, None))
            met = mean["imbalance"] <= imbalance_bar and ratio <= 0.5 and mean["efficiency"] >= (efficiency_bar or 0)
            verdict = (
                f"{'met' if met else 'MISSED'} (<= {imbalance_bar}, <= 0.5, >= {efficiency_bar})"
                if name == "ours"
                else ""
            )
            print(
                f"{world:>6}{len(masks):>7}  {name:12}{mean['imbalance']:>10.4f}{mean['mean']:>9.2f}"
                f"{mean['worst']:>9.2f}{ratio:>12.3f}{mean['efficiency']:>12.3f}  {verdict}"
            )
            rows.append({"table": "quality", "world_size": world, "method": name, "ratio": ratio, **mean})
    return rows


def structure(worlds: list[int]) -> list[dict]:
    """Masks with one obvious good plan, and the video masks."""
    print(f"\nother masks, {ROWS:,} rows a rank; S = all rows")
    print(
        f"{'ranks':>6}  {'mask':24}{'imbalance':>10}{'mean / S':>10}{'mean rows':>11}{'worst rows':>12}"
        f"{'slices':>8}  bar"
    )
    window = 1024
    bars: dict[str, Callable[[float, float, float, int], bool]] = {
        "causal": lambda imbalance, mean, worst, world: imbalance <= 1.001 and mean <= 0.75,
        "full": lambda imbalance, mean, worst, world: mean <= 1 - 1 / world + 1e-9,
        "window_1024": lambda imbalance, mean, worst, world: worst <= 0.15 * ROWS + window,
        "documents_block_causal": lambda imbalance, mean, worst, world: imbalance <= 1.03,
        "video_history": lambda imbalance, mean, worst, world: imbalance <= 1.03,
        "video_window": lambda imbalance, mean, worst, world: imbalance <= 1.03,
        "video_clips": lambda imbalance, mean, worst, world: imbalance <= 1.03,
    }
    rows = []
    for world in worlds:
        for name, build in WORKLOADS.items():
            total = ROWS * world
            plan = build_plan(build(total, seed=0), world_size=world, rank=0, config=CONFIG)
            remote = plan.remote_rows.double()
            mean, worst = float(remote.mean()), float(remote.max())
            slices = len(plan.slices) + sum(len(stage.slices) for stage in plan.stages)
            met = bars[name](plan.imbalance, mean / total, worst, world) if name in bars else None
            print(
                f"{world:>6}  {name:24}{plan.imbalance:>10.4f}{mean / total:>10.4f}{mean:>11,.0f}{worst:>12,.0f}"
                f"{slices:>8}  {'' if met is None else 'met' if met else 'MISSED'}"
            )
            rows.append(
                {
                    "table": "structure",
                    "world_size": world,
                    "mask": name,
                    "imbalance": plan.imbalance,
                    "mean": mean,
                    "worst": worst,
                }
            )
    return rows


def nodes() -> list[dict]:
    """Rows that a rank receives over the network: to every rank that needs them, or once for each node of eight."""
    print("\npacked documents on nodes of 8: rows over the network, mean rank, in units of its own")
    print(f"{'ranks':>6}  {'method':12}{'direct':>9}{'relayed':>9}{'x heap 512 relayed':>20}")
    rows = []
    for world in (16, 64):
        means: dict[str, tuple[float, float]] = {}
        for name in "heap 512", "ours":
            direct, relayed = [], []
            for seed in range(5):
                mask = documents_causal(ROWS * world, seed=seed)
                if name == "ours":
                    layout = build_plan(mask, world_size=world, rank=0, config=CONFIG).q_layout
                    grid, table = [layout.total, layout.chunk, world, layout.chunks.shape[1]], layout.chunks
                else:
                    grid, table = min_heap(mask, world, 512)
                call = (mask.slices, table, table, grid, grid)
                sent = torch.ops.magi.plan_overview(*call, [1, 1], CONFIG.costs())[0][0].view(
                    world // 8, 8, world // 8, 8
                )
                direct.append(float(sent.sum((1, 3)).fill_diagonal_(0).sum()) / world / ROWS)
                relay = [torch.ops.magi.plan_relay(*call, rank, 8, [1, 1], CONFIG.costs())[11] for rank in range(world)]
                relayed.append(sum(len(received) for received in relay) / world / ROWS)
            means[name] = float(np.mean(direct)), float(np.mean(relayed))
        for name, (far, once) in means.items():
            print(f"{world:>6}  {name:12}{far:>9.2f}{once:>9.2f}{once / means['heap 512'][1]:>20.3f}")
            rows.append({"table": "nodes", "world_size": world, "method": name, "direct": far, "relayed": once})
    return rows


MIB = 1 << 20


def longformer(total: int, seed: int = 0) -> Mask:
    """A causal window of 1,024 keys, and 64 rows that see every key."""
    window, dense = (-1023, 0), (None, None)
    return Mask.from_bands([[0, 64], [64, total]], [[0, total], [0, total]], [dense, window])


def movement() -> list[dict]:
    """Bytes that the worst rank receives, and predicted step, where keys alone move and where rows may."""
    print(f"\nrows that move, {ROWS:,} rows a rank, one 400 Gb/s adapter for each: MiB received by mean and worst rank")
    print("and predicted ms, forward and backward")
    print(
        f"{'ranks':>6}  {'mask':24}{'heads':>7}{'keys: mean':>12}{'worst':>8}{'ms':>8}{'auto: mean':>13}{'worst':>8}"
        f"{'ms':>8}{'x bytes':>9}{'x time':>8}{'plan ms':>9}"
    )
    masks = {**WORKLOADS, "longformer": longformer}
    cases = [(world, name, (24, 24)) for world in (8, 64) for name in ("causal", "full", "video_history")]
    cases += [(64, "documents_causal", (24, 24)), (64, "longformer", (24, 24)), (64, "longformer", (64, 8))]
    cases += [(64, "causal", (64, 8)), (64, "documents_causal", (64, 8)), (256, "causal", (24, 24))]
    rows = []
    for world, name, heads in cases:
        mask, found = masks[name](ROWS * world, seed=0), {}
        for mode in "keys", "auto":
            config = PlanConfig(heads=heads, profile=H200_INFINIBAND, movement=mode)
            overview = survey(mask, world_size=world, config=config)
            costs, bandwidth = config.cost_model(), config.profile.bandwidth
            guests, returned = overview.guest_rows.sum(0), overview.guest_rows.sum(1)
            keys = (
                overview.remote_rows * costs.row * 4
            )  # once forward; again, and gradients of twice the width, backward
            visits = guests * (costs.guest + costs.guest_backward)
            visits = visits + returned * (costs.returned + costs.returned_backward)
            received = (keys + visits) * bandwidth / MIB
            times = []
            for _ in range(5):
                start = time.perf_counter()
                build_plan(mask, world_size=world, rank=0, config=config)
                times.append(1e3 * (time.perf_counter() - start))
            step = 1e3 * (overview.step_time + overview.backward_time)
            found[mode] = float(received.mean()), float(received.max()), step, min(times)
        (mean, worst, ms, _), (auto_mean, auto_worst, auto_ms, plan_ms) = found["keys"], found["auto"]
        print(
            f"{world:>6}  {name:24}{heads[0]:>4}:{heads[1]:<2}{mean:>12,.0f}{worst:>8,.0f}{ms:>8.1f}{auto_mean:>13,.0f}"
            f"{auto_worst:>8,.0f}{auto_ms:>8.1f}{auto_worst / worst:>9.2f}{auto_ms / ms:>8.2f}{plan_ms:>9.2f}"
        )
        rows.append(
            {
                "table": "movement",
                "world_size": world,
                "mask": name,
                "heads": list(heads),
                "keys_mib": [mean, worst],
                "auto_mib": [auto_mean, auto_worst],
                "keys_ms": ms,
                "auto_ms": auto_ms,
                "plan_ms": plan_ms,
            }
        )
    return rows


TIMED = (
    (8, 8192),
    (8, 16384),
    (16, 16384),
    (64, 2048),
    (64, 8192),
    (64, 16384),
    (64, 65536),
    (64, 262144),
    (256, 16384),
    (1024, 16384),
)


def timing() -> list[dict]:
    """Time of one rank's plan, slices in, tensors out; and where it goes."""
    print("\ntime to plan one rank, ms: least and median of 20 runs on each of 4 packs")
    print(
        f"{'ranks':>6}{'tokens':>12}{'slices':>8}{'chunk':>7}{'least':>9}{'median':>9}{'ownership':>11}{'tables':>9}{'python':>9}"
        f"{'peak MiB':>10}  bar"
    )
    rows = []
    for world, per_rank in TIMED:
        masks = [documents_causal(world * per_rank, seed=seed) for seed in range(4)]
        totals, ownership, tables = [], [], []
        for mask in masks:
            for _ in range(20 if world < 1024 else 5):
                start = time.perf_counter()
                plan = build_plan(mask, world_size=world, rank=world // 2, config=CONFIG)
                totals.append(time.perf_counter() - start)
            layout = plan.q_layout
            grid = [layout.total, layout.chunk, world, layout.chunks.shape[1]]
            for _ in range(5):
                start = time.perf_counter()
                chunks = torch.ops.magi.plan_ownership([mask.slices], [1.0], grid, mask.total_k, CONFIG.costs())
                middle = time.perf_counter()
                torch.ops.magi.plan_tables(
                    mask.slices, chunks, chunks, grid, grid, world // 2, CONFIG.stage_counts, CONFIG.costs()
                )
                ownership.append(middle - start)
                tables.append(time.perf_counter() - middle)
        parts = [min(totals), float(np.median(totals)), float(np.median(ownership)), float(np.median(tables))]
        least, median, own, table = (1e3 * x for x in parts)
        peak = peak_memory(world, per_rank)
        limit = {(64, 16384): 2.0, (1024, 16384): 50.0}.get((world, per_rank))
        verdict = "" if limit is None else f"{'met' if median <= limit else 'MISSED'} (<= {limit:g})"
        print(
            f"{world:>6}{world * per_rank:>12,}{len(masks[0].slices):>8,}{layout.chunk:>7}{least:>9.3f}{median:>9.3f}"
            f"{own:>11.3f}{table:>9.3f}{median - own - table:>9.3f}{peak:>10.1f}  {verdict}"
        )
        rows.append(
            {
                "table": "time",
                "world_size": world,
                "tokens": world * per_rank,
                "least_ms": least,
                "median_ms": median,
                "ownership_ms": own,
                "tables_ms": table,
                "peak_mib": peak,
            }
        )
    return rows


def peak_memory(world: int, per_rank: int) -> float:
    """MiB by which planning raises the peak of a fresh process."""
    here = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {here!r}); import plan; plan.print_peak({world}, {per_rank})"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def print_peak(world: int, per_rank: int) -> None:
    mask = documents_causal(world * per_rank)
    build_plan(Mask.causal(64), world_size=2, rank=0)  # loads everything
    # Nothing freed before is used again: what planning allocates, it takes from the system, where the peak sees it.
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 4096)  # M_MMAP_THRESHOLD: all but small blocks are mapped, and unmapped when freed
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_kib("VmRSS")
    build_plan(mask, world_size=world, rank=0, config=CONFIG)
    print((resident_kib("VmHWM") - before) / 1024)


def resident_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def draw_times(rows: list[dict], path: Path) -> None:
    """Growth with tokens on 64 ranks, and with ranks of 16,384 rows each, by part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=110, layout="constrained")
    panels = (
        ("tokens on 64 ranks", "tokens", [r for r in rows if r["world_size"] == 64]),
        ("ranks of 16,384 rows", "world_size", [r for r in rows if r["tokens"] == 16384 * r["world_size"]]),
    )
    for axes, (label, key, points) in zip(figure.subplots(1, 2), panels):
        points = sorted(points, key=lambda r: r[key])
        for part in "median_ms", "ownership_ms", "tables_ms":
            name = {"median_ms": "whole plan"}.get(part, part.removesuffix("_ms"))
            axes.plot([r[key] for r in points], [r[part] for r in points], marker="o", label=name)
        axes.set(xlabel=label, ylabel="ms for one rank's plan", xscale="log", yscale="log")
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.savefig(path)


TABLES = ["quality", "structure", "nodes", "movement", "time"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="all, unless some are named")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=list(BARS), help="ranks of the quality table (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, help="plot of time against tokens")
    arguments = parser.parse_args()
    arguments.tables = arguments.tables or TABLES
    torch.set_num_threads(1)
    rows = []
    if "quality" in arguments.tables:
        rows += quality(arguments.worlds)
    if "structure" in arguments.tables:
        rows += structure([8, 64])
    if "nodes" in arguments.tables:
        rows += nodes()
    if "movement" in arguments.tables:
        rows += movement()
    if "time" in arguments.tables:
        rows += timing()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if arguments.draw:
        draw_times([r for r in rows if r["table"] == "time"], arguments.draw)


if __name__ == "__main__":
    main()
