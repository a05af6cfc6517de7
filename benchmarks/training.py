"""Does bf16 training with `ffa` follow training with SDPA? The loss of one model, trained by both, on one GPU.

    python benchmarks/training.py [--steps 200] [--json out/training.json] [--chart out/training.png]

The model and the text are the demo's (examples/train.py), packs of documents with their varlen causal masks. Linear
layers and attention run in bf16 under autocast, blocks are compiled. Four runs start from the same weights and see the
same packs: SDPA in fp32 as the truth, SDPA in bf16 by two of its backends, whose distance is the noise of bf16, and
`torch.ops.magi.ffa.slices`. The exit code is 1 where `ffa` is further from the truth than twice the worse of the two.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train as demo


def ffa(q: Tensor, k: Tensor, v: Tensor, slices: Tensor) -> Tensor:
    return torch.ops.magi.ffa.slices(q, k, v, slices)[0]


def sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)[0].transpose(0, 1)


RUNS = {  # attention, dtype, backend
    "sdpa fp32": (sdpa, torch.float32, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa bf16 efficient": (sdpa, torch.bfloat16, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa bf16 math": (sdpa, torch.bfloat16, SDPBackend.MATH),
    "ffa bf16": (ffa, torch.bfloat16, None),
}


def train(name: str, config: demo.Config) -> Tensor:
    attend, dtype, backend = RUNS[name]
    torch._dynamo.reset()

    def attend_16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q.to(dtype), k.to(dtype), v.to(dtype), mask)

    model = demo.Llama(config, attend_16).cuda()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)
    optimizer = demo.Optimizer(model, config)
    packs = demo.Packs(config.tokens, config.seed)
    positions = torch.arange(config.tokens, device="cuda")
    losses = []
    with sdpa_kernel(backend) if backend else nullcontext():
        for step in tqdm(range(config.steps), name, dynamic_ncols=True):
            pack = packs[step]
            mask = (pack.mask.slices if attend is ffa else pack.mask.dense()).cuda()
            if attend is ffa:
                torch._dynamo.decorators.mark_unbacked(mask, 0)  # as many slices as the pack has documents
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                logits = model(pack.tokens.cuda(), positions, mask)
            targets = pack.targets.cuda()
            loss = demo.summed_loss(logits.float(), targets) / (targets >= 0).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).double().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    config = demo.Config(steps=args.steps, width=512, heads=8, kv_heads=2)
    losses = {name: train(name, config) for name in RUNS}
    truth = losses["sdpa fp32"]
    print(f"{args.steps} steps of {config.tokens} tokens, {config.layers} layers of width {config.width}\n")
    print("| run | first loss | mean of the last 20 | distance from fp32, mean | worst |\n|---|---|---|---|---|")
    distance = {}
    for name, loss in losses.items():
        far = (loss - truth).abs()
        distance[name] = far.mean().item()
        print(f"| {name} | {loss[0]:.4f} | {loss[-20:].mean():.4f} | {distance[name]:.2e} | {far.max():.2e} |")
    if args.json:
        args.json.write_text(json.dumps({name: loss.tolist() for name, loss in losses.items()}))
    if args.chart:
        draw(losses, args.chart)
    sys.exit(distance["ffa bf16"] > 2 * max(distance["sdpa bf16 efficient"], distance["sdpa bf16 math"]))


def draw(losses: dict[str, Tensor], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 6), layout="constrained")
    for color, (name, loss) in enumerate(losses.items()):
        top.plot(loss, f"C{color}", label=name)
        if name != "sdpa fp32":
            bottom.semilogy((loss - losses["sdpa fp32"]).abs(), f"C{color}")
    top.set_ylabel("loss")
    top.legend()
    bottom.set(xlabel="step", ylabel="distance from fp32")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
