"""python -m magi_attention.plan MASK --world-size 8: how well is a mask planned? Prints a table, draws on request.

MASK is the name of a mask below, built for --total rows, or a JSON file with one of
    {"cu_seqlens": [0, 100, 512], "causal": true, "window": [-1, 0]}
    {"q_ranges": [[0, 4]], "k_ranges": [[0, 4]], "types": ["causal"], "total_q": 4, "total_k": 4}
    {"slices": [[q0, q1, k0, k1, lo, hi], ...], "total_q": 4, "total_k": 4}
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from magi_attention.mask import Mask
from magi_attention.plan import PlanConfig, build_plan, choose_stages, survey


def documents(total: int) -> Mask:
    """Packed documents, causal: lengths log-uniform from 16 rows to half of the pack."""
    random = torch.Generator().manual_seed(0)
    exponents = torch.rand(total // 16 + 1, generator=random, dtype=torch.float64)
    ends = (16 * (max(total, 64) / 32) ** exponents).long().cumsum(0)
    return Mask.varlen([0, *ends[ends < total].tolist(), total])


NAMED: dict[str, Callable[[int], Mask]] = {
    "full": Mask.full,
    "causal": Mask.causal,
    "window": lambda total: Mask.sliding_window(total, 1023, 0),
    "block-causal": lambda total: Mask.block_causal(total, 2048),
    "documents": documents,
}


def read_mask(name: str, total: int) -> Mask:
    if name in NAMED:
        return NAMED[name](total)
    path = Path(name)
    if not path.is_file():
        raise SystemExit(f"MASK must be a JSON file or one of {', '.join(NAMED)}; got {name!r}")
    data = json.loads(path.read_text())
    if "cu_seqlens" in data:
        left, right = data.get("window", (-1, -1))
        return Mask.varlen(data["cu_seqlens"], causal=data.get("causal", True), window=(left, right))
    if "slices" in data:
        return Mask(torch.tensor(data["slices"], dtype=torch.int32).reshape(-1, 6), data["total_q"], data["total_k"])
    return Mask.from_slices(
        data["q_ranges"], data["k_ranges"], data["types"], total_q=data.get("total_q"), total_k=data.get("total_k")
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m magi_attention.plan", description=__doc__.split("\n")[0])
    parser.add_argument("mask", help=f"a JSON file, or one of {', '.join(NAMED)}")
    parser.add_argument("--total", type=int, default=131072, help="rows of a named mask (default: %(default)s)")
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--chunk", type=int, help="rows of a chunk (default: chosen by length)")
    parser.add_argument("--stages", type=int, default=2, help="remote stages; 0 chooses (default: %(default)s)")
    parser.add_argument(
        "--node-size", type=int, help="ranks of a node: rows cross between nodes once (default: no nodes)"
    )
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("QUERY", "KEY"))
    parser.add_argument("--draw", type=Path, help="write a picture here (png, svg, pdf)")
    arguments = parser.parse_args()

    mask = read_mask(arguments.mask, arguments.total)
    world_size = arguments.world_size
    config = PlanConfig(chunk=arguments.chunk, stages=max(arguments.stages, 1), heads=tuple(arguments.heads))
    config = config.replace(node_size=arguments.node_size)
    if arguments.stages == 0:
        config = choose_stages([mask], world_size=world_size, config=config)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        plan = build_plan(mask, world_size=world_size, rank=0, config=config)
        times.append(time.perf_counter() - start)
    overview = survey(mask, world_size=world_size, config=config)

    rows = max(mask.total_q / world_size, 1)
    remote = overview.remote_rows.double()
    slices = overview.pieces.sum(1).double()
    print(f"{mask.total_q:,} rows x {mask.total_k:,} keys, {len(mask.slices):,} slices, {mask.area():,} cells")
    table = [
        ("ranks", f"{world_size}"),
        ("chunk, rows of a rank", f"{overview.chunk}, {plan.q_layout.rows:,}"),
        ("area imbalance, busiest / mean", f"{overview.imbalance:.4f}"),
        ("remote rows, mean rank", f"{remote.mean():,.0f} = {remote.mean() / rows:.2f} of its own"),
        ("remote rows, worst rank", f"{remote.max():,.0f} = {remote.max() / rows:.2f} of its own"),
        ("remote rows by stage", "  ".join(f"{int(n):,}" for n in overview.rows.sum((1, 2)))),
        ("slices of a rank, mean and most", f"{slices.mean():.1f}, {slices.max():.0f}"),
        ("efficiency, perfect overlap", f"{overview.efficiency:.3f}"),
        ("predicted forward, slowest rank", f"{overview.step_time * 1e3:.3f} ms in {config.stages} stages"),
        ("predicted backward", f"{overview.backward_time * 1e3:.3f} ms in {config.stage_counts[1]} stages"),
        ("time to plan, one rank", f"{min(times) * 1e3:.3f} ms"),
    ]
    for name, value in table:
        print(f"  {name:34}{value}")
    if arguments.draw is not None:
        overview.draw(arguments.draw, mask=mask)
        print(f"  {'picture':34}{arguments.draw}")


if __name__ == "__main__":
    main()
