"""Train a small Llama on real text with FSDP2 x context parallelism, then check the run against one process.

    python examples/train.py                                    # 4 processes on the CPU, or one on each GPU
    python examples/train.py --steps 300 --dp 2 --cp 2 --stages 3 --ac selective
    python examples/train.py --help

The text is the Python standard library. Every step packs other documents into one sequence, so every step has another
mask; every transformer block is compiled with fullgraph=True, once for all. The first steps are repeated by the same
model in one process with eager dense-mask attention: equal losses and parameters, or a non-zero exit code. Pictures and
numbers go to out/.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import train_report
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

from magi_attention import Mask, PlanConfig, attend, build_plan, dispatch, position_ids, save_attention_policy
from magi_attention.plan import HardwareProfile


def flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """Every field is a flag."""

    steps: int = flag(30, "optimizer steps")
    check_steps: int = flag(20, "first steps that one process repeats with dense attention; 0: no check")
    dp: int = flag(1, "data-parallel groups; each has a pack of its own")
    cp: int = flag(0, "context-parallel ranks of a group; 0: all that are left of 4 processes, or of the GPUs")
    tp: int = flag(1, "tensor-parallel ranks; heads are sharded over them")
    stages: int = flag(2, "remote stages of an attention")
    chunk: int = flag(0, "rows that are dispatched together; 0: the planner's choice")
    tokens: int = flag(4096, "tokens of a pack")
    layers: int = flag(4, "transformer blocks")
    width: int = flag(256, "width of the model")
    heads: int = flag(8, "query heads")
    kv_heads: int = flag(2, "key and value heads")
    lr: float = flag(2e-3, "peak learning rate of AdamW")
    ac: str = flag("none", "activation checkpointing of the blocks: none, selective (attention is saved) or full")
    bf16: bool = flag(False, "compute in bfloat16 (FSDP2 mixed precision), always on a GPU; the check is then coarse")
    seed: int = flag(0, "of the weights and of the order of documents")
    out: str = flag("out", "folder for mask.png, plan.png, loss.png and report.json")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def plan(self) -> PlanConfig:
        # The planner weighs compute against communication: a core of a CPU computes less than the default GPU.
        cpu = HardwareProfile(flops=30e9, bandwidth=1e9, launch=1e-3)
        return PlanConfig(
            chunk=self.chunk or None,
            stages=self.stages,
            heads=(self.heads, self.kv_heads),
            head_dim=self.head_dim,
            profile=HardwareProfile() if torch.cuda.is_available() else cpu,
        )


def parse_config() -> Config:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = {"action": "store_true"} if f.default is False else {"type": type(f.default), "default": f.default}
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=f"{f.metadata['help']} ({f.default})", **kind)
    values = vars(parser.parse_args())
    if not values["cp"]:
        processes = torch.cuda.device_count() if torch.cuda.is_available() else 4
        values["cp"] = max(1, processes // (values["dp"] * values["tp"]))
    values["bf16"] |= torch.cuda.is_available()  # the GPU kernels take 16-bit inputs
    values["check_steps"] = min(values["check_steps"], values["steps"])
    config = Config(**values)
    if config.heads % config.tp or config.kv_heads % config.tp:
        parser.error(f"--tp {config.tp} must divide {config.heads} query heads and {config.kv_heads} key heads")
    if config.ac not in ("none", "selective", "full"):
        parser.error(f"--ac must be none, selective or full, got {config.ac}")
    return config


# ---- text: documents, packed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    tokens: Tensor  # int64 [tokens]
    targets: Tensor  # int64 [tokens], the next token of the same document; -1 where a document ends
    cu_seqlens: Tensor  # int64 [documents + 1]

    @property
    def mask(self) -> Mask:
        return Mask.varlen(self.cu_seqlens, causal=True)


class Packs:
    """The standard library's source files as byte tokens, cut to documents of 64 to `tokens` bytes, in random order.

    Lengths are log-uniform, as those of collected text are: most documents are short, most tokens are in long ones.
    The pack's edge cuts a document in two.
    """

    def __init__(self, tokens: int, seed: int) -> None:
        rng = random.Random(seed)
        library = Path(sysconfig.get_paths()["stdlib"])
        documents = []
        for path in sorted(library.rglob("*.py")):
            text = b"" if {"site-packages", "test", "tests"} & set(path.parts) else path.read_bytes()
            while text:
                length = int(math.exp(rng.uniform(math.log(64), math.log(tokens))))
                documents.append(text[:length])
                text = text[length:]
        rng.shuffle(documents)
        self.tokens = tokens
        self.stream = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8).long()
        self.ends = torch.tensor([len(d) for d in documents]).cumsum(0)

    def __getitem__(self, index: int) -> Pack:
        start = index * self.tokens % (len(self.stream) - self.tokens)
        stop = start + self.tokens
        inside = self.ends[(self.ends > start) & (self.ends < stop)] - start
        cu_seqlens = torch.cat([torch.tensor([0]), inside, torch.tensor([self.tokens])])
        targets = self.stream[start + 1 : stop + 1].clone()
        targets[cu_seqlens[1:] - 1] = -1
        return Pack(self.stream[start:stop], targets, cu_seqlens)


# ---- model: Llama, [tokens, width] ----------------------------------------------------------------------------------

Attend = Callable[
    [Tensor, Tensor, Tensor, Any], Tensor
]  # (q, k, v, mask or plan) -> out, each [tokens, heads, head_dim]


def rope_tables(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [tokens, 1, head_dim / 2], of each token's position in the pack."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = positions[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        self.head_dim, self.attend = config.head_dim, attend
        self.wq = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Any) -> Tensor:
        q, k, v = (w(x).unflatten(1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # -1: this rank's heads
        return self.wo(self.attend(rotate(q, rope), rotate(k, rope), v, mask).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        hidden = 64 * math.ceil(config.width * 8 / 3 / 64)
        self.w1 = nn.Linear(config.width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.width, bias=False)
        self.w3 = nn.Linear(config.width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(config.width, eps=1e-5), Attention(config, attend)
        self.feed_forward_norm, self.feed_forward = nn.RMSNorm(config.width, eps=1e-5), FeedForward(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """A model that knows nothing of ranks: it sees rows, their positions, and an `attend` that understands `mask`."""

    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.embedding = nn.Embedding(256, config.width)
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, 256, bias=False)
        random_state = torch.Generator().manual_seed(config.seed)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02, generator=random_state)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Any) -> Tensor:
        x = self.embedding(tokens)
        rope = rope_tables(positions, self.head_dim)
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.head(self.norm(x)).float()  # [tokens, 256]


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


class Optimizer:
    """AdamW with a linear warm-up of 10 steps."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        # Sharded by heads or not, parameters live on different meshes, which the fused loops cannot mix.
        foreach = config.tp == 1
        # eps stands well above the rounding of a gradient, so that two orders of summation take the same steps.
        self.adamw = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.95), eps=1e-6, foreach=foreach)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, lambda step: min(1.0, (step + 1) / 10))

    def step(self) -> None:
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


# ---- the reference: one process, eager, a dense mask -----------------------------------------------------------------


def dense_attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)[0].transpose(0, 1)


def train_in_one_process(config: Config) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the first `check_steps` steps, and the parameters after them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Llama(config, dense_attend).to(device)
    optimizer = Optimizer(model, config)
    packs = Packs(config.tokens, config.seed)
    positions = torch.arange(config.tokens, device=device)
    losses = []
    for step in tqdm(range(config.check_steps), "check", dynamic_ncols=True):
        batch = [packs[step * config.dp + group] for group in range(config.dp)]
        num_targets = sum(int((pack.targets >= 0).sum()) for pack in batch)
        losses.append(0.0)
        for pack in batch:
            logits = model(pack.tokens.to(device), positions, pack.mask.dense().to(device))
            loss = summed_loss(logits, pack.targets.to(device)) / num_targets
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
    return losses, {name: p.detach().cpu() for name, p in model.named_parameters()}


# ---- the trainer: dp x cp x tp processes -----------------------------------------------------------------------------


def parallelize(model: Llama, shards: DeviceMesh, tp: DeviceMesh, config: Config) -> None:
    """Tensor parallelism, checkpointing, compilation, FSDP2 over `shards`: from the inside to the outside."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": shards, "mp_policy": policy if config.bf16 else MixedPrecisionPolicy()}
    for block in model.blocks:
        if config.tp > 1:
            columns = dict.fromkeys(
                ["attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3"],
                ColwiseParallel(),
            )
            rows = dict.fromkeys(["attention.wo", "feed_forward.w2"], RowwiseParallel())
            parallelize_module(block, tp, {**columns, **rows})
        if config.ac != "none":
            block.forward = checkpointed(block.forward, config.ac)
        block.forward = torch.compile(block.forward, fullgraph=True)
        fully_shard(block, **options)
    fully_shard(model, **options)


def checkpointed(forward: Callable[..., Tensor], ac: str) -> Callable[..., Tensor]:
    """`forward` that keeps its inputs alone for the backward, or (selective) also what attention computed."""
    save = partial(create_selective_checkpoint_contexts, save_attention_policy)
    options = {"context_fn": save} if ac == "selective" else {}
    return lambda *args: checkpoint(forward, *args, use_reentrant=False, **options)


def train(rank: int, config: Config, folder: str) -> None:
    """One process of the distributed run; rank 0 leaves what `train_report` needs in `folder`."""
    world_size = config.dp * config.cp * config.tp
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=5),
    )
    shape = (config.dp, config.cp, config.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp", "tp"))
    cp, group = mesh["cp"], mesh.get_local_rank("dp")
    shards = mesh["dp", "cp"]._flatten("fsdp")

    model = Llama(config, lambda q, k, v, plan: attend(q, k, v, plan, cp)[0]).to(device)
    parallelize(model, shards, mesh["tp"], config)
    optimizer = Optimizer(model, config)
    packs = Packs(config.tokens, config.seed)
    counters = torch._dynamo.utils.counters

    steps: list[dict[str, Any]] = []
    parameters: dict[str, Tensor] = {}
    bar = tqdm(range(config.steps), "steps", disable=rank > 0, dynamic_ncols=True)
    bar.set_postfix_str("compiling")
    for step in bar:
        start = time.perf_counter()
        batch = [packs[step * config.dp + g] for g in range(config.dp)]
        num_targets = sum(int((pack.targets >= 0).sum()) for pack in batch)
        pack = batch[group]
        planning = time.perf_counter()
        plan = build_plan(pack.mask, world_size=config.cp, rank=cp.get_local_rank(), config=config.plan).to(device)
        planned = time.perf_counter()

        tokens = dispatch(pack.tokens.to(device), plan, cp)
        targets = dispatch(pack.targets.to(device) + 1, plan, cp) - 1  # padding rows are 0: they have no target either
        logits = model(tokens, position_ids(plan, device), plan)
        loss = summed_loss(logits, targets) / num_targets  # this rank's part: the parts of all ranks add up to the loss
        (loss * shards.size()).backward()  # FSDP takes the mean of gradients over its ranks; theirs add up as well
        optimizer.step()

        total = loss.detach().clone()
        dist.all_reduce(total, group=shards.get_group())
        total = total.item()  # waits for the device
        seconds = time.perf_counter() - start
        steps.append(
            {
                "loss": total,
                "seconds": seconds,
                "tokens_per_second": config.dp * config.tokens / seconds,
                "documents": len(pack.cu_seqlens) - 1,
                "imbalance": plan.imbalance,
                "remote_rows": int(plan.remote_rows.sum()),
                "plan_ms": 1e3 * (planned - planning),
                "graphs": counters["stats"]["unique_graphs"],
            }
        )
        bar.set_postfix_str(
            "loss {loss:.3f}, {tokens_per_second:.0f} tokens/s, imbalance {imbalance:.3f}, remote rows {remote_rows}, "
            "graphs {graphs}".format(**steps[-1])
        )
        if step + 1 == config.check_steps:
            parameters = {name: p.full_tensor().cpu() for name, p in model.named_parameters()}

    graphs: list[Any] = [None] * world_size
    dist.all_gather_object(graphs, steps[-1]["graphs"])
    if rank == 0:
        breaks = sum(counters["graph_break"].values())
        run = {
            "device": str(device),
            "steps": steps,
            "parameters": parameters,
            "graphs": graphs,
            "graph_breaks": breaks,
        }
        torch.save(run, f"{folder}/run.pt")
    dist.destroy_process_group()


def main() -> None:
    config = parse_config()
    started = time.perf_counter()
    print(f"dp {config.dp} x cp {config.cp} x tp {config.tp}, {config.dp} x {config.tokens} tokens a step", flush=True)
    with tempfile.TemporaryDirectory(prefix="magi-demo-") as folder:
        # Compiled code lives as long as the run, and the ranks share it.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        mp.start_processes(train, (config, folder), config.dp * config.cp * config.tp, start_method="spawn")
        run = torch.load(f"{folder}/run.pt")
    trained = time.perf_counter()
    reference = train_in_one_process(config) if config.check_steps else None
    seconds = {"training": trained - started, "check": time.perf_counter() - trained}

    packs = Packs(config.tokens, config.seed)
    masks = [packs[index].mask for index in range(config.steps * config.dp)]
    plan = build_plan(masks[0], world_size=config.cp, rank=0, config=config.plan)
    sys.exit(0 if train_report.write(Path(config.out), config, run, reference, masks, plan, seconds) else 1)


if __name__ == "__main__":
    main()
