"""How fast do rows move on a GPU? Each verb against a device copy of as many bytes, and how long a tiny one takes.

    python benchmarks/rows.py [--json out/rows.json]

Rows are 8 heads of 128 in bf16 (2 KiB). Large: the verb's bytes read and written, at the bandwidth of a copy that reads
and writes as many. Tiny: 16 rows, calls replayed from a CUDA graph.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from ffa import medians, print_bars

import magi_attention  # noqa: F401

ops = torch.ops.magi
SHARE = 0.9
TINY_US = 10


def ranges_of(rows: int, count: int) -> torch.Tensor:
    """`count` ranges of equal length over all rows, in random order."""
    begin = torch.randperm(count, generator=torch.Generator().manual_seed(0)) * (rows // count)
    return torch.stack([begin, begin + rows // count], 1).int().cuda()


def verbs(rows: int, count: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Each verb's call, and the bytes that it reads and writes."""
    x = torch.randn(rows, 8, 128, device="cuda", dtype=torch.bfloat16)
    ranges = ranges_of(rows, count)
    parts = [torch.randn(rows, 8, 128, device="cuda") for _ in range(2)]
    weights = [torch.randn(rows, 8, device="cuda") for _ in range(2)]
    moved = 2 * x.nbytes
    return {
        f"range_gather, {count} ranges": (lambda: ops.range_gather(x, ranges, rows), moved),
        f"range_scatter_reduce, {count} ranges": (lambda: ops.range_scatter_reduce(x, ranges, rows), moved),
        "merge_partials": (
            lambda: ops.merge_partials(parts[0], weights[0], parts[1], weights[1]),
            3 * (parts[0].nbytes + weights[0].nbytes),
        ),
    }


def graph_us(call: Callable[[], object], calls: int = 20) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return medians({"graph": graph.replay}, 20)["graph"] / calls * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget-ms", type=float, default=60)
    args = parser.parse_args()
    rows, large, tiny = [], [], []
    for size in (64, 512):
        total = size * 2**20 // 2048
        for count in (8, 4096):
            for name, (call, moved) in verbs(total, count).items():
                source = torch.randn(moved // 4, device="cuda", dtype=torch.bfloat16)
                target = torch.empty_like(source)
                ms = medians({"verb": call, "copy": lambda: target.copy_(source)}, args.budget_ms)  # noqa: B023
                case = f"{name}, {size} MiB"
                rows.append({"case": case, "ms": ms, "bytes": moved, "share": ms["copy"] / ms["verb"]})
                large.append((case, rows[-1]["share"]))
                print(f"{case:46}{ms['verb']:8.3f} ms{moved / ms['verb'] / 1e9:7.2f} TB/s {rows[-1]['share']:5.2f}")
    for name, (call, _) in verbs(16, 8).items():
        us = graph_us(call)
        rows.append({"case": f"{name}, 16 rows", "us": us})
        tiny.append((rows[-1]["case"], TINY_US / us))
        print(f"{rows[-1]['case']:46}{us:8.1f} us")
    bars = [
        {
            "bar": "rows >= 64 MiB: device copy",
            "must": SHARE,
            "goal": None,
            "values": sorted(large, key=lambda x: x[1]),
        },
        {"bar": f"tiny rows: {TINY_US} us", "must": 1.0, "goal": None, "values": sorted(tiny, key=lambda x: x[1])},
    ]
    print_bars(bars)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows, "bars": bars})
        )


if __name__ == "__main__":
    main()
