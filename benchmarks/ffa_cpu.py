"""How fast is attention on the CPU? `ffa` against F.scaled_dot_product_attention in one run, one table; JSON beside it.

    python benchmarks/ffa_cpu.py [--tokens 4096] [--heads 8] [--head-dim 64] [--repeats 5] [--json out/ffa_cpu.json]

Both are timed in turn, and the fastest of the repeats counts. SDPA gets is_causal where the mask is causal and the
dense mask otherwise, as its users have to. FLOPs are counted on allowed cells: forward 4 * area * heads * head_dim,
backward 2.5 times that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from magi_attention import Mask


def fastest(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds of the fastest of `repeats` runs of each call; the calls take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
    return best


def measure(mask: Mask, causal: bool, dtype: torch.dtype, heads: int, head_dim: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(mask.total_q, heads, head_dim).to(dtype) for _ in range(4))
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    theirs = [t.transpose(0, 1)[None].contiguous().requires_grad_() for t in (q, k, v)]
    dense = None if causal else mask.dense()

    def sdpa() -> torch.Tensor:
        return F.scaled_dot_product_attention(*theirs, attn_mask=dense, is_causal=causal)

    out, expected = torch.ops.magi.ffa.slices(*ours, mask.slices)[0], sdpa()
    torch.testing.assert_close(
        out, expected[0].transpose(0, 1), atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2
    )
    dout_theirs = dout.transpose(0, 1)[None].contiguous()
    with torch.no_grad():
        forward = fastest({"ffa": lambda: torch.ops.magi.ffa.slices(q, k, v, mask.slices), "sdpa": sdpa}, repeats)
    backward = fastest(
        {
            "ffa": lambda: torch.autograd.grad(out, ours, dout, retain_graph=True),
            "sdpa": lambda: torch.autograd.grad(expected, theirs, dout_theirs, retain_graph=True),
        },
        repeats,
    )
    flops = 4 * mask.area() * heads * head_dim
    return {
        "forward_ms": forward["ffa"],
        "forward_gflops": flops / forward["ffa"] / 1e6,
        "forward_sdpa_ms": forward["sdpa"],
        "forward_ratio": forward["sdpa"] / forward["ffa"],
        "backward_ms": backward["ffa"],
        "backward_gflops": 2.5 * flops / backward["ffa"] / 1e6,
        "backward_sdpa_ms": backward["sdpa"],
        "backward_ratio": backward["sdpa"] / backward["ffa"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("out/ffa_cpu.json"))
    args = parser.parse_args()

    documents = torch.linspace(0, args.tokens, 17).long()
    masks = {
        "causal": Mask.causal(args.tokens),
        "16 documents, causal": Mask.varlen(documents),
        "window 256, causal": Mask.sliding_window(args.tokens, 255, 0),
    }
    print(
        f"{args.tokens} tokens, {args.heads} heads, head_dim {args.head_dim}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    )
    print(f"{'mask':22}{'dtype':10}{'pass':10}{'ffa ms':>9}{'GFLOP/s':>9}{'SDPA ms':>9}{'ratio':>7}")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, mask in masks.items():
            row = measure(mask, name == "causal", dtype, args.heads, args.head_dim, args.repeats)
            rows.append({"mask": name, "dtype": str(dtype).removeprefix("torch."), **row})
            for direction in ("forward", "backward"):
                print(
                    f"{name:22}{rows[-1]['dtype']:10}{direction:10}{row[direction + '_ms']:9.1f}"
                    f"{row[direction + '_gflops']:9.1f}{row[direction + '_sdpa_ms']:9.1f}"
                    f"{row[direction + '_ratio']:7.2f}",
                    flush=True,
                )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
