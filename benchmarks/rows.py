"""How fast do rows move on a GPU? Each verb against a device copy of as many bytes, and how long a tiny one takes.

    python benchmarks/rows.py [--json out/rows.json]

Rows are 8 heads of 128 (2 KiB in bf16). A gather reads and writes its output's bytes, a scatter-reduce reads its input
and writes its output, a merge reads two partials and writes one, delta reads two tensors. Calls are replayed from CUDA
graphs, over sets of inputs that take turns and outputs that are kept, so that nothing is found in L2; graphs of verb
and copies take turns, shuffled (`medians` in ffa.py). A copy between addresses that are nearly a power of two apart is
slower by a third, so that the best of several distances counts, and sources are padded. Tiny: 16 and 32 rows.
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
MIB = 2**20
SETS = 4
COUNTS = (8, 4096)  # of ranges
GAPS = (MIB // 4, 3 * MIB // 2, 5 * MIB, 21 * MIB)  # between source and target of a copy

Verb = tuple[int, list[Callable[[], object]]]  # bytes read and written, a call for each set of inputs


def ranges_of(rows: int, count: int) -> torch.Tensor:
    """`count` ranges of equal length over all rows, in random order."""
    begin = torch.randperm(count, generator=torch.Generator().manual_seed(0)) * (rows // count)
    return torch.stack([begin, begin + rows // count], 1).int().cuda()


def padded(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.randn(count + 100_000, device="cuda").to(dtype)[:count].view(shape)


def verbs(rows: int, counts: tuple[int, ...]) -> dict[str, Verb]:
    x = [padded(rows, 8, 128) for _ in range(SETS)]
    found: dict[str, Verb] = {}
    for count in counts:
        once = ranges_of(rows, count)
        twice = torch.cat([ranges_of(rows // 2, count // 2)] * 2)
        found[f"range_gather, {count} ranges"] = (
            2 * x[0].nbytes,
            [lambda t=t, r=once: ops.range_gather(t, r, rows) for t in x],
        )
        for name, ranges, out in (("", once, rows), (", every row twice", twice, rows // 2)):
            found[f"range_scatter_reduce, {count} ranges{name}"] = (
                x[0].nbytes * (rows + out) // rows,
                [lambda t=t, r=ranges, out=out: ops.range_scatter_reduce(t, r, out) for t in x],
            )
    for dtype, merged in ((torch.bfloat16, rows), (torch.float32, rows // 2)):
        parts = [(padded(merged, 8, 128, dtype=dtype), torch.randn(merged, 8, device="cuda")) for _ in range(SETS)]
        found[f"merge_partials, {dtype}".replace("torch.", "")] = (
            3 * sum(t.nbytes for t in parts[0]),
            [lambda a=a, b=b: ops.merge_partials(*a, *b) for a, b in zip(parts, parts[1:] + parts[:1])],
        )
    found["ffa_delta"] = (
        2 * x[0].nbytes + 4 * 8 * rows,
        [lambda a=a, b=b: ops.ffa_delta(a, b, None) for a, b in zip(x, x[1:] + x[:1])],
    )
    return found


def copies(moved: int) -> dict[str, list[Callable[[], object]]]:
    """Device copies that read and write so many bytes together, over several distances from source to target."""
    count = moved // 2
    both = [torch.randint(256, (2 * count + max(GAPS),), dtype=torch.uint8, device="cuda") for _ in range(SETS)]
    return {
        f"copy {gap}": [lambda t=t, at=count + gap: t[at : at + count].copy_(t[:count]) for t in both] for gap in GAPS
    }


def replayed(calls: list[Callable[[], object]], repeats: int = 1) -> Callable[[], object]:
    """A CUDA graph of all calls, `repeats` times; outputs of one round are kept."""
    kept = [call() for call in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            kept = [call() for call in calls]
    return lambda: (graph.replay(), kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget-ms", type=float, default=40, help="of device time for each verb")
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 512], help="of one set of rows")
    args = parser.parse_args()
    rows, large, tiny = [], [], []
    for size in args.mib:
        for name, (moved, calls) in verbs(size * MIB // 2048, COUNTS).items():
            graphs = {what: replayed(c) for what, c in copies(moved).items()}
            timed = medians({"verb": replayed(calls), **graphs}, args.budget_ms)
            ms = {"verb": timed.pop("verb") / SETS, "copy": min(timed.values()) / SETS}
            case = f"{name}, {size} MiB"
            rows.append({"case": case, "ms": ms, "bytes": moved, "share": ms["copy"] / ms["verb"]})
            large.append((case, rows[-1]["share"]))
            print(f"{case:60}{ms['verb']:8.4f} ms{moved / ms['verb'] / 1e9:7.2f} TB/s {rows[-1]['share']:5.2f}")
            torch.cuda.empty_cache()
    for count in (16, 32):
        for name, (_, calls) in verbs(count, (8,)).items():
            us = medians({"verb": replayed(calls, 5)}, 5)["verb"] / (5 * SETS) * 1e3
            rows.append({"case": f"{name}, {count} rows", "us": us})
            tiny.append((rows[-1]["case"], TINY_US / us))
            print(f"{rows[-1]['case']:60}{us:8.1f} us")
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
