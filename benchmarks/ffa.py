"""How fast is attention on a GPU? `ffa` and its peers in one run: a table, and JSON beside it.

    python benchmarks/ffa.py [--direction fwd|bwd|both] [--lengths 8192 16384] [--heads 32:32] [--masks full doc32]
                             [--peers fa3 cudnn fa2 flex] [--json out/ffa_fwd.json] [--chart out/ffa_fwd.png]

A case's calls take turns, timed by device events, and medians count: clocks that fall with the chip's temperature fall
for all. TFLOP/s are of allowed cells: forward 2 * area * heads * (head_dim + v_dim), backward 2.5 times that. A peer
that cannot run a mask is left out of its row. fa3 is the wheel `fa3-fwd` (forward only, no window). `ordered` is our
own backward with deterministic=True. Memory is the peak of our call beyond its inputs, outputs included.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import WORKLOADS, document_packs

from magi_attention import Mask

PEERS = ("fa3", "cudnn", "fa2", "flex")


def mask_of(name: str, total: int) -> Mask:
    """A workload, or docN: N causal documents of equal length, or rdocN: of random lengths."""
    if name.startswith(("doc", "rdoc")) and name.strip("rdoc").isdigit():
        count = int(name.strip("rdoc"))
        if name[0] == "d":
            return Mask.varlen(torch.arange(count + 1) * (total // count))
        cuts = torch.randperm(total - 1, generator=torch.Generator().manual_seed(count))[: count - 1] + 1
        return Mask.varlen(torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([total])]))
    return WORKLOADS[name](total)


def medians(calls: dict[str, Callable[[], object]], budget_ms: float) -> dict[str, float]:
    """Milliseconds of each call; the calls take turns."""

    def timed(call: Callable[[], object], repeats: int) -> list[float]:
        call()  # the caches are this call's own
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    for call in calls.values():
        call()
    once = max(0.02, min(timed(next(iter(calls.values())), 3)))
    repeats = max(1, min(20, int(8 / once)))
    rounds = max(3, min(9, int(budget_ms / (once * repeats))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name] += timed(call, repeats)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def documents_of(mask: Mask) -> torch.Tensor | None:
    """cu_seqlens where the mask is causal documents side by side."""
    s = mask.slices
    square = torch.equal(s[:, :2], s[:, 2:4]) and bool((s[:, 5] == 0).all()) and bool((s[:, 4] == -(2**30)).all())
    ends = [0, *s[:, 1].tolist()]
    return torch.tensor(ends, dtype=torch.int32) if square and ends[:-1] == s[:, 0].tolist() else None


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_mask(name: str, mask: Mask) -> Callable[..., torch.Tensor] | None:
    """The mask as FlexAttention's users write it."""
    total = mask.total_q
    ends = documents_of(mask)
    if name == "full":
        return lambda b, h, q, k: q >= 0
    if name == "causal":
        return lambda b, h, q, k: q >= k
    if name.startswith("window_"):
        width = int(name.split("_")[1])
        return lambda b, h, q, k: (q >= k) & (q - k < width)
    blocks = name == "documents_block_causal"
    if blocks:
        ends = document_packs(total)[0]
    if ends is not None:
        lengths = (ends[1:] - ends[:-1]).long()
        doc = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        assert len(doc) == total
        block = ((torch.arange(total) - ends[:-1].long()[doc]) // 2048).to("cuda")
        doc = doc.to("cuda")
        if blocks:
            return lambda b, h, q, k: (doc[q] == doc[k]) & (block[q] >= block[k])
        return lambda b, h, q, k: (q >= k) & (doc[q] == doc[k])
    return None


def peer_calls(name: str, mask: Mask, q, k, v, peers: list[str], grad: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """The peers that can run this mask: functions of no arguments that return the output."""
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    group = q.shape[1] // k.shape[1]
    batched = [x[None].transpose(1, 2) for x in (q, k, v)]  # [1, heads, tokens, dim]: a view
    ends = documents_of(mask)
    if "fa3" in peers and not grad:
        try:
            import fa3_fwd_interface as fa3
        except ImportError:
            fa3 = None
        if fa3 is not None and name in ("full", "causal"):
            calls["fa3"] = lambda: fa3.flash_attn_func(q[None], k[None], v[None], causal=name == "causal")
        elif fa3 is not None and ends is not None:
            cu, longest = ends.cuda(), int((ends[1:] - ends[:-1]).max())
            calls["fa3"] = lambda: fa3.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    if name in ("full", "causal"):
        for peer, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION)):

            def sdpa(backend=backend) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(*batched, is_causal=name == "causal", enable_gqa=group > 1)

            if peer in peers:
                calls[peer] = sdpa
    predicate = flex_mask(name, mask)
    if "flex" in peers and predicate is not None:
        from torch.nn.attention.flex_attention import create_block_mask

        block = torch.compile(create_block_mask)(predicate, None, None, mask.total_q, mask.total_k, device="cuda")
        flex = compiled_flex()
        calls["flex"] = lambda: flex(*batched, block_mask=block, enable_gqa=group > 1)
    return calls


def measure(name: str, total: int, heads: int, kv_heads: int, dims: str, args: argparse.Namespace) -> dict:
    dim, v_dim = (int(d) for d in (dims.split(":") * 2)[:2])
    mask = mask_of(name, total)
    grad = args.direction != "fwd"
    torch.manual_seed(0)
    q = torch.randn(total, heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=grad)
    k, v = (
        torch.randn(total, kv_heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=grad) for d in (dim, v_dim)
    )
    slices = mask.slices.cuda()
    ours = lambda: torch.ops.magi.ffa.slices(q, k, v, slices)[0]  # noqa: E731
    calls = {"ffa": ours, **peer_calls(name, mask, q, k, v, args.peers, grad)}
    if grad:
        calls["ordered"] = lambda: torch.ops.magi.ffa.slices(q, k, v, slices, deterministic=True)[0]
    if args.direction == "both":
        d = torch.randn_like(calls["ffa"]())
        calls = {
            peer: lambda call=call, own=peer in ("ffa", "ordered"): torch.autograd.grad(
                call(), (q, k, v), d if own else d[None].transpose(1, 2)
            )
            for peer, call in calls.items()
        }
    elif grad:
        forwards = {peer: call() for peer, call in calls.items()}
        dout = {peer: torch.randn_like(out) for peer, out in forwards.items()}
        calls = {
            peer: lambda out=out, d=dout[peer]: torch.autograd.grad(out, (q, k, v), d, retain_graph=True)
            for peer, out in forwards.items()
        }
    ms = medians(calls, args.budget_ms)
    flops = 2 * mask.area() * heads * (dim + v_dim) * {"fwd": 1, "bwd": 2.5, "both": 3.5}[args.direction]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calls["ffa"]()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before
    begin = time.perf_counter()
    for _ in range(10):
        calls["ffa"]()
    host_us = (time.perf_counter() - begin) * 1e5
    torch.cuda.synchronize()
    return {
        "mask": name,
        "tokens": total,
        "heads": f"{heads}:{kv_heads}",
        "head_dim": dims,
        "slices": len(mask.slices),
        "host_us": host_us,
        "memory": memory,
        "ms": ms,
        "tflops": {peer: flops / t / 1e9 for peer, t in ms.items()},
        "ratio": {peer: t / ms["ffa"] for peer, t in ms.items() if peer != "ffa"},
    }


def line(row: dict) -> str:
    peers = "  ".join(f"{p} {row['tflops'][p]:5.0f} ({r:4.2f}x)" for p, r in row["ratio"].items())
    case = f"{row['mask']:24}{row['tokens']:8,}{row['heads']:>7} d{row['head_dim']:<4}"
    return (
        f"{case}{row['ms']['ffa']:9.3f} ms {row['tflops']['ffa']:5.0f} TFLOP/s  host {row['host_us']:4.0f} us  "
        f"{row['memory'] / 2**20:5.0f} MiB  {peers}"
    )


def chart(rows: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    masks = list(dict.fromkeys(r["mask"] for r in rows))
    figure, axes = plt.subplots(len(masks), 1, figsize=(9, 2.4 * len(masks)), squeeze=False)
    for axis, mask in zip(axes[:, 0], masks):
        cases = [r for r in rows if r["mask"] == mask]
        for i, peer in enumerate(("ffa", *PEERS)):
            bars = [r["tflops"].get(peer, 0) for r in cases]
            if any(bars):
                axis.bar([x + (i - 2) * 0.16 for x in range(len(cases))], bars, 0.15, label=peer)
        axis.set_xticks(range(len(cases)), [f"{r['tokens'] // 1024}k {r['heads']} d{r['head_dim']}" for r in cases])
        axis.set_title(mask, loc="left")
        axis.set_ylabel("TFLOP/s")
    axes[0, 0].legend(ncols=5)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", choices=["fwd", "bwd", "both"], default="fwd")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--heads", nargs="+", default=["32:32"], help="query heads:key heads")
    parser.add_argument("--head-dims", nargs="+", default=["128"], help="of queries and keys[:of values]")
    parser.add_argument("--masks", nargs="+", default=["full", "causal", "doc8", "doc32", "rdoc32", "window_1024"])
    parser.add_argument("--peers", nargs="*", default=["fa3", "cudnn"], choices=PEERS)
    parser.add_argument("--budget-ms", type=float, default=150, help="of device time for each call of a case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.direction}; (how much longer the peer takes)"
    )
    rows = []
    for heads in args.heads:
        for dim in args.head_dims:
            for total in args.lengths:
                for name in args.masks:
                    rows.append(measure(name, total, *map(int, heads.split(":")), dim, args))
                    print(line(rows[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))
    if args.chart:
        chart(rows, args.chart)


if __name__ == "__main__":
    main()
