"""How fast is attention on a GPU? `ffa` and its peers in one run: every case, then every bar, and JSON.

    python benchmarks/ffa.py --direction fwd|bwd|both [--json out/ffa_fwd.json]     # all cases of the bars
    python benchmarks/ffa.py --direction fwd --lengths 8192 16384 --masks full doc32 --heads 32:8 --peers fa3
    python benchmarks/report.py out                                                  # charts and tables from the JSON

A case's calls take turns, in another order every round, and medians count: clocks that fall with the chip's temperature
fall for all. Several calls are queued between two events, behind a sleep that outlasts the host's part of them, so that
the device's time counts alone; short inputs come in several sets, so that none is found in L2. FA2 and FlexAttention
draw less power and let the clock recover, so they take turns with `ffa` on their own.
TFLOP/s are of allowed cells: forward 2 * area * heads * (head_dim + v_dim), backward with (3 * head_dim + 2 * v_dim). A
peer that cannot run a case is left out of its row, and the row says why. `ordered` is our own backward with
deterministic=True. Memory is the peak of our call beyond its inputs, outputs included. Short inputs are timed from the
host, too: from the call until the device is done ("waited"), and until the call returns ("host").

--seconds is shared out: a case gets what is left over the number of cases left, and those of the bars come first.

fa3 is the wheel `fa3-fwd`, built without windows and without a backward: `FA3_ELSEWHERE` stands in for them, measured
in another run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from workloads import VIDEO_CHUNK, WORKLOADS, document_packs

from magi_attention import Mask

Call = Callable[[], object]
PEERS = ("fa3", "cudnn", "fa2", "flex")
COOL = ("fa2", "flex")  # peers that draw clearly less power than we do
FLEX_SECONDS = 90  # compiling FlexAttention stops here, or after half of --seconds
TILE_TABLE_SHARE = 0.02
HOST_US = 25
SLEEP_HZ = 2e9  # cycles of torch.cuda._sleep a second, at the highest clock
L2_BYTES = 50 << 20
CALLS_A_CASE = 8  # about: a case's share of the time holds the budget of so many calls, first calls included
LONGEST = 4 * VIDEO_CHUNK  # tokens of the bars; longer cases are for the record

# TFLOP/s of FlashAttention 3 built from source, on the same kind of machine, bf16, head_dim 128, where the wheel does
# not run: (direction, mask, tokens, heads).
FA3_ELSEWHERE = {
    ("fwd", "window_1024", 32768, "32:32"): 473,
    ("bwd", "causal", 8192, "32:32"): 557,
    ("bwd", "causal", 16384, "32:32"): 587,
    ("bwd", "causal", 32768, "32:32"): 600,
    ("bwd", "causal", 16384, "32:8"): 568,
    ("bwd", "causal", 65536, "32:8"): 594,
    ("bwd", "doc8", 8192, "32:32"): 330,
    ("bwd", "doc8", 16384, "32:32"): 438,
    ("bwd", "doc8", 32768, "32:32"): 496,
    ("bwd", "doc32", 8192, "32:32"): 130,
    ("bwd", "doc32", 32768, "32:32"): 342,
    ("bwd", "window_1024", 32768, "32:32"): 409,
}

DENSE = ("full", "causal")
DOCUMENTS = ("doc8", "doc32", "rdoc32", "documents_causal")
BLOCKS = ("block_causal_2048", "documents_block_causal")
SPARSE = (*DOCUMENTS, "window_1024", *BLOCKS)
WIDE = ("192:128", "192", "256")  # head dimensions


@dataclass(frozen=True)
class Case:
    mask: str
    total: int
    heads: str = "32:32"  # of queries:of keys
    dims: str = "128"  # of queries and keys[:of values]
    peers: tuple[str, ...] = ("fa3", "cudnn")

    def __str__(self) -> str:
        length = f"{self.total // 1024}k" if self.total % 1024 == 0 else f"{self.total:,}"
        return f"{self.mask} {length} {self.heads}" + ("" if self.dims == "128" else f" d{self.dims}")


def suite(direction: str) -> list[Case]:
    """The cases of all bars, those that decide most first."""
    if direction == "both":
        cases = [Case(m, n) for n in (16384, 8192) for m in ("causal", "full", "doc8", "window_1024")]
        cases += [Case("causal", 16384, h) for h in ("32:8", "64:8")]
        return cases + [Case("causal", 16384, dims=d) for d in WIDE]

    def masks(n: int) -> list[Case]:
        def slow(mask: str) -> tuple[str, ...]:
            if n > 16384 and mask != "window_1024":  # FA3_ELSEWHERE's was measured beside FlexAttention, too
                return ()
            return ("fa2",) if mask in DENSE else ("flex",)

        return [Case(m, n, peers=("fa3", "cudnn", *slow(m))) for m in (*DENSE, *SPARSE)]

    cases = masks(8192) + masks(16384)
    for heads in ("32:8", "64:8"):
        cases += [Case(m, n, heads) for n in (8192, 16384) for m in (*DENSE, "doc8", "window_1024")]
    cases += [Case(m, n, dims="64") for n in (8192, 16384) for m in (*DENSE, "doc8", "doc32")]
    if direction == "fwd":
        cases += [Case(m, n, h) for n in (1024, 2048, 4096) for h in ("32:8", "32:32") for m in (*DENSE, "doc8")]
        cases += [Case(m, 16384, dims=d) for d in WIDE for m in DENSE]
    else:
        cases += [Case(m, 16384, dims=d, peers=("cudnn", "fa2")) for d in WIDE for m in DENSE]
        cases += [Case("causal", n, "32:8") for n in (1024, 2048, 4096)]
    cases += masks(32768)
    cases += [Case(m, 32768, h) for h in ("32:8", "64:8") for m in DENSE]
    cases += [Case(m, 65536, "32:8") for m in reversed(DENSE)]
    cases.append(Case("video_history", 4 * VIDEO_CHUNK, "48:8", peers=("flex",) if direction == "fwd" else ()))
    if direction == "fwd":
        cases += [Case("causal", 65536, "64:8"), Case("causal", 65536), Case("causal", 131072, "32:8")]
    return cases


@functools.lru_cache(maxsize=4)
def mask_of(name: str, total: int) -> Mask:
    """A workload; docN: N causal documents of equal length; rdocN: of random lengths; block_causal_N: blocks of N."""
    if name.startswith(("doc", "rdoc")) and name.strip("rdoc").isdigit():
        count = int(name.strip("rdoc"))
        if name[0] == "d":
            return Mask.varlen(torch.arange(count + 1) * (total // count))
        cuts = torch.randperm(total - 1, generator=torch.Generator().manual_seed(count))[: count - 1] + 1
        return Mask.varlen(torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([total])]))
    if name.startswith("block_causal_"):
        return Mask.block_causal(total, int(name.split("_")[-1]))
    return WORKLOADS[name](total)


# ---------------------------------------------------------------- clocks


def medians(calls: dict[str, Call], budget_ms: float) -> dict[str, float]:
    """Milliseconds of each call on the device, up to 20 at a time; the calls take turns, shuffled every round."""

    def host_seconds(call: Call, repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds

    def timed(call: Call, repeats: int, host: float) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(1.3 * host * SLEEP_HZ))
        if repeats > 1:
            call()  # the caches are this call's own
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / repeats

    host = {name: host_seconds(call, 1) for name, call in calls.items()}
    once = max(0.01, *(timed(call, 1, host[name]) for name, call in calls.items()))
    repeats = max(1, min(20, int(2 / once)))
    if repeats > 1:
        host = {name: host_seconds(call, repeats + 1) for name, call in calls.items()}
    rounds = max(3, min(15, int(budget_ms / (once * repeats))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(calls), len(calls)):
            times[name].append(timed(calls[name], repeats, host[name]))
    return {name: median(t) for name, t in times.items()}


def in_turns(calls: Iterable[Call]) -> Call:
    """A call that is each of them, one after the other."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def host_times(calls: dict[str, Call], rounds: int = 30) -> dict[str, dict[str, float]]:
    """Microseconds until a call returns, and until the device has done it."""
    times: dict[str, dict[str, list[float]]] = {name: {"host": [], "waited": []} for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            returned = time.perf_counter()
            torch.cuda.synchronize()
            times[name]["host"].append((returned - begin) * 1e6)
            times[name]["waited"].append((time.perf_counter() - begin) * 1e6)
    return {name: {kind: median(t) for kind, t in kinds.items()} for name, kinds in times.items()}


def queued_host_us(call: Call, calls: int = 20) -> float:
    """Microseconds a call takes on the host when calls follow each other."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - begin) / calls * 1e6)
        torch.cuda.synchronize()
    return median(times)


def kernel_us(call: Call, calls: int = 10) -> dict[str, float]:
    """Device microseconds of each kernel of a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as prof:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    total: dict[str, float] = collections.Counter()
    for event in prof.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name] += event.device_time_total / calls
    return dict(total)


def matrix_product_tflops() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / medians({"product": lambda: a @ b}, 400)["product"] / 1e9


# ---------------------------------------------------------------- peers


def documents_of(mask: Mask) -> torch.Tensor | None:
    """cu_seqlens where the mask is causal documents side by side."""
    s = mask.slices
    square = torch.equal(s[:, :2], s[:, 2:4]) and bool((s[:, 5] == 0).all()) and bool((s[:, 4] == -(2**30)).all())
    ends = [0, *s[:, 1].tolist()]
    return torch.tensor(ends, dtype=torch.int32) if square and ends[:-1] == s[:, 0].tolist() else None


@functools.cache
def compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Every mask and length is a compile of its own; past the limit the peer would run unfused.
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 1024
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(name: str, mask: Mask) -> Callable[..., torch.Tensor] | None:
    """The mask as FlexAttention's users write it."""
    total, ends = mask.total_q, documents_of(mask)
    if name == "full":
        return lambda b, h, q, k: q >= 0
    if name == "causal":
        return lambda b, h, q, k: q >= k
    if name.startswith("window_"):
        width = int(name.split("_")[1])
        return lambda b, h, q, k: (q >= k) & (q - k < width)
    if name.startswith("block_causal_") or name == "video_history":
        width = VIDEO_CHUNK if name == "video_history" else int(name.split("_")[-1])
        return lambda b, h, q, k: q // width >= k // width
    blocks = name == "documents_block_causal"
    if blocks:
        ends = document_packs(total)[0]
    if ends is None:
        return None
    lengths = (ends[1:] - ends[:-1]).long()
    doc = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    block = ((torch.arange(total) - ends[:-1].long()[doc]) // 2048).to("cuda")
    doc = doc.to("cuda")
    if blocks:
        return lambda b, h, q, k: (doc[q] == doc[k]) & (block[q] >= block[k])
    return lambda b, h, q, k: (q >= k) & (doc[q] == doc[k])


@contextlib.contextmanager
def limit(seconds: float, what: str) -> Iterator[None]:
    """Raises TimeoutError inside of what takes longer."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"{what} took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(int(seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peer_calls(case: Case, mask: Mask, q, k, v, grad: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """The case's peers that can run this mask: functions of no arguments that return the output."""
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    name, group = case.mask, q.shape[1] // k.shape[1]
    batched = [x[None].transpose(1, 2) for x in (q, k, v)]  # [1, heads, tokens, dim]: a view
    ends = documents_of(mask)
    if "fa3" in case.peers and not grad:
        try:
            import fa3_fwd_interface as fa3
        except ImportError:
            fa3 = None
        if fa3 is not None and name in DENSE:
            calls["fa3"] = lambda: fa3.flash_attn_func(q[None], k[None], v[None], causal=name == "causal")
        elif fa3 is not None and ends is not None:
            cu, longest = ends.cuda(), int((ends[1:] - ends[:-1]).max())
            calls["fa3"] = lambda: fa3.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    if name in DENSE:
        for peer, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("fa2", SDPBackend.FLASH_ATTENTION)):

            def sdpa(backend=backend) -> torch.Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(*batched, is_causal=name == "causal", enable_gqa=group > 1)

            if peer in case.peers:
                calls[peer] = sdpa
    predicate = flex_mask(name, mask) if "flex" in case.peers else None
    if predicate is not None:
        from torch.nn.attention.flex_attention import create_block_mask

        flex = compiled_flex()
        block = functools.cache(
            lambda: create_block_mask(predicate, None, None, mask.total_q, mask.total_k, device="cuda")
        )
        calls["flex"] = lambda: flex(*batched, block_mask=block(), enable_gqa=group > 1)
    return calls


def compile_flex_ahead(cases: list[Case], direction: str, seconds: float) -> list[Case]:
    """Fills Inductor's caches for all cases in processes side by side: one after the other takes minutes. Returns the
    cases, without FlexAttention where it took too long."""

    def code(case: Case) -> tuple[str, int]:
        return "doc8" if case.mask in DOCUMENTS else case.mask, case.total

    begin, running = time.perf_counter(), {}
    for case in cases:
        kind, total = code(case)
        if "flex" in case.peers and (kind, total) not in running:
            running[kind, total] = subprocess.Popen(
                [sys.executable, __file__, "--direction", direction, "--masks", kind, "--lengths", str(total)]
                + ["--heads", case.heads, "--peers", "flex", "--compile-only"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
    late = []
    for what, process in running.items():
        try:
            process.wait(max(0.1, seconds - (time.perf_counter() - begin)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late.append(what)
    if running:
        print(
            f"FlexAttention: {len(running)} compiles, {time.perf_counter() - begin:.0f} s; too late: {late or 'none'}"
        )
    return [without_flex(case) if code(case) in late else case for case in cases]


def without_flex(case: Case) -> Case:
    return replace(case, peers=tuple(peer for peer in case.peers if peer != "flex"))


# ---------------------------------------------------------------- a case


def measure(case: Case, direction: str, budget_ms: float, compile_only: bool = False) -> dict:
    heads, kv_heads = (int(h) for h in case.heads.split(":"))
    dim, v_dim = (int(d) for d in (case.dims.split(":") * 2)[:2])
    mask, total, grad = mask_of(case.mask, case.total), case.total, direction != "fwd"
    torch.manual_seed(0)
    shapes = [(total, heads, dim), (total, kv_heads, dim), (total, kv_heads, v_dim)]
    set_bytes = 2 * total * (heads * (dim + v_dim) + kv_heads * (dim + v_dim))  # q and out, k and v
    sets = [
        [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad) for shape in shapes]
        for _ in range(-(-2 * L2_BYTES // set_bytes))
    ]
    q, k, v = sets[0]
    slices = mask.slices.cuda()

    def forwards_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
        own = {"ffa": lambda: torch.ops.magi.ffa.slices(q, k, v, slices)[0]}
        if grad:
            own["ordered"] = lambda: torch.ops.magi.ffa.slices(q, k, v, slices, deterministic=True)[0]
        return own | peer_calls(case, mask, q, k, v, grad)

    def gradients_of(forward: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Call:
        out = forward()
        dout = torch.randn_like(out)
        if direction == "both":
            return lambda: torch.autograd.grad(forward(), inputs, dout)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    forwards = [forwards_of(*inputs) for inputs in sets]
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    for name in forwards[0]:
        try:
            with limit(FLEX_SECONDS, f"the first call of {name}"):
                each = [f[name] for f in forwards]
                call = in_turns([gradients_of(f, x) for f, x in zip(each, sets)] if grad else each)
                call()
                torch.cuda.synchronize()
                calls[name] = call
        except Exception as error:
            if name in ("ffa", "ordered"):
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if compile_only:
        return {}

    warm = {name: call for name, call in calls.items() if name not in COOL}
    ms = medians(warm, budget_ms)
    beside = (
        medians({name: c for name, c in calls.items() if name in ("ffa", *COOL)}, budget_ms) if warm != calls else {}
    )
    own = {name: beside["ffa"] if name in COOL else ms["ffa"] for name in calls}
    ms |= {name: t for name, t in beside.items() if name in COOL}
    products = {"fwd": dim + v_dim, "bwd": 3 * dim + 2 * v_dim, "both": 4 * dim + 3 * v_dim}[direction]
    flops = 2 * mask.area() * heads * products
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    calls["ffa"]()
    torch.cuda.synchronize()
    row = {
        "case": str(case),
        "mask": case.mask,
        "tokens": total,
        "heads": case.heads,
        "head_dim": case.dims,
        "slices": len(mask.slices),
        "memory": torch.cuda.max_memory_allocated() - before,
        "host_us": queued_host_us(calls["ffa"]),
        "ms": ms,
        "beside": beside,
        "tflops": {name: flops / t / 1e9 for name, t in ms.items()},
        "ratio": {name: t / own[name] for name, t in ms.items() if name != "ffa"},
        "left_out": left_out,
    }
    if total <= 4096:
        row["host"] = host_times(warm)
        if not grad:
            bands = [slices[:, 0:2].contiguous(), slices[:, 2:4].contiguous(), (slices[:, 5] == 0).int()]
            row["host_us_typed"] = queued_host_us(lambda: torch.ops.magi.ffa(q, k, v, *bands))
    if total == 8192 and case.heads == "32:32":
        row["kernels_us"] = kernel_us(calls["ffa"])
    return row


def line(row: dict) -> str:
    peers = "  ".join(f"{p} {row['tflops'][p]:4.0f} ({r:4.2f}x)" for p, r in row["ratio"].items())
    waited = "  waited " + " ".join(f"{p} {t['waited']:.0f}" for p, t in row["host"].items()) if "host" in row else ""
    return (
        f"{row['case']:36}{row['ms']['ffa']:9.3f} ms {row['tflops']['ffa']:4.0f} TFLOP/s  "
        f"host {row['host_us']:3.0f} us "
        f"{row['memory'] / 2**20:5.0f} MiB  {peers}{waited}"
    )


# ---------------------------------------------------------------- bars


def bars(direction: str, rows: list[dict], matrix_product: float) -> list[dict]:
    """Each bar: what it asks of every case, and the share of it that each case reached."""
    table: list[dict] = []

    def bar(name: str, must: float | None, goal: float | None, values: Iterable[tuple[dict, float]]) -> None:
        found = sorted(((row["case"], value) for row, value in values), key=lambda pair: pair[1])
        table.append({"bar": name, "must": must, "goal": goal, "values": found})

    def to(peer: str, masks: Iterable[str], dims: str = "128", shortest: int = 8192) -> list[tuple[dict, float]]:
        chosen = [r for r in rows if r["mask"] in masks and r["head_dim"] == dims]
        return [(r, r["ratio"][peer]) for r in chosen if peer in r["ratio"] and shortest <= r["tokens"] <= LONGEST]

    def to_column(masks: Iterable[str]) -> list[tuple[dict, float]]:
        column = {key: t for key, t in FA3_ELSEWHERE.items() if key[1] in masks}
        known = [
            (r, column.get((direction, r["mask"], r["tokens"], r["heads"]))) for r in rows if r["head_dim"] == "128"
        ]
        return [(r, r["tflops"]["ffa"] / t) for r, t in known if t]

    def against_128(peer: str, dims: str) -> list[tuple[dict, float]]:
        ratios = {(r["mask"], r["tokens"]): x for r, x in to(peer, (*DENSE, *SPARSE)) if r["heads"] == "32:32"}
        narrow = to(peer, (*DENSE, *SPARSE), dims)
        return [(r, x / ratios[key]) for r, x in narrow if (key := (r["mask"], r["tokens"])) in ratios]

    short = [r for r in rows if "host" in r]
    if direction == "fwd":
        bar("full, causal: FA3", 1.0, 1.1, to("fa3", DENSE))
        full = [r for r in rows if r["mask"] == "full" and r["tokens"] >= 8192 and r["head_dim"] == "128"]
        bar("full: matrix product", None, 0.93, [(r, r["tflops"]["ffa"] / matrix_product) for r in full])
        bar("documents: FA3 varlen", 1.1, 1.3, to("fa3", DOCUMENTS))
        bar("window: FA3 (other run)", 1.1, 1.3, to_column(["window_1024"]))
        bar("documents, window, blocks: FlexAttention", 1.6, None, to("flex", (*SPARSE, "video_history")))
        waited = [(r, r["host"]["fa3"]["waited"] / r["host"]["ffa"]["waited"]) for r in short if "fa3" in r["host"]]
        bar("1k-4k, call and wait: FA3", 1.0, 2.0, waited)
        bar(f"1k-4k, host: {HOST_US} us", None, 1.0, [(r, HOST_US / r["host_us"]) for r in short])
        for dims in ("64", *WIDE):
            bar(f"head_dim {dims}: FA3, against that of 128", None, 0.9, against_128("fa3", dims))
        shares = []
        for row in rows:
            us = row.get("kernels_us", {})
            if tiles := sum(t for name, t in us.items() if name in ("tiles", "tiles_small")):
                shares.append((row, TILE_TABLE_SHARE / (tiles / sum(us.values()))))
        bar(f"8k, tile table: {TILE_TABLE_SHARE:.0%} of the time", 1.0, None, shares)
    elif direction == "bwd":
        bar("full, causal: cuDNN", 1.12, 1.25, to("cudnn", DENSE))
        bar("causal: FA3 (other run)", None, 1.0, to_column(["causal"]))
        bar("documents, window, blocks: FlexAttention", 1.4, None, to("flex", SPARSE))
        bar("documents, window: FA3 varlen (other run)", 1.0, 1.2, to_column(SPARSE))
        long = [r for r in rows if r["tokens"] >= 8192]
        bar("deterministic: our own", 0.85, 0.95, [(r, 1 / r["ratio"]["ordered"]) for r in long])
        for dims in ("64", *WIDE):
            bar(f"head_dim {dims}: cuDNN, against that of 128", None, 0.9, against_128("cudnn", dims))
    else:
        bar("causal 16k: cuDNN", 1.1, 1.2, [(r, x) for r, x in to("cudnn", DENSE) if r["case"] == "causal 16k 32:32"])
        bar("all full, causal: cuDNN", None, 1.2, to("cudnn", DENSE))
    return table


def verdict(bar: dict) -> str:
    """met or MISSED, of what a bar must reach and of its goal."""
    if not bar["values"]:
        return "not measured"
    worst = bar["values"][0][1]
    said = ["must " + ("met" if worst >= bar["must"] else "MISSED")] if bar["must"] else []
    return ", ".join(said + (["goal " + ("met" if worst >= bar["goal"] else "missed")] if bar["goal"] else []))


def print_bars(table: list[dict]) -> None:
    print(f"\n{'bar: peer':44}{'must':>6}{'goal':>6}{'worst':>7}{'median':>8}{'best':>6}  cases  verdict (worst case)")
    for bar in table:
        asked = "".join(f"{'-' if x is None else format(x, '.2f'):>6}" for x in (bar["must"], bar["goal"]))
        found = [value for _, value in bar["values"]]
        if not found:
            print(f"{bar['bar']:44}{asked}{'':28}not measured")
            continue
        met = sum(value >= (bar["must"] or bar["goal"]) for value in found)
        print(
            f"{bar['bar']:44}{asked}{found[0]:7.2f}{median(found):8.2f}{found[-1]:6.2f}  {met:2}/{len(found):<2}  "
            f"{verdict(bar)} ({bar['values'][0][0]})"
        )


# ---------------------------------------------------------------- all of it


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The suite, or the grid that was asked for."""
    if not (args.lengths or args.masks or args.heads or args.head_dims):
        return suite(args.direction)
    return [
        Case(mask, total, heads, dims, tuple(args.peers))
        for heads in args.heads or ["32:32"]
        for dims in args.head_dims or ["128"]
        for total in args.lengths or [8192, 16384, 32768]
        for mask in args.masks or (*DENSE, "doc8", "doc32", "window_1024")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--direction", choices=["fwd", "bwd", "both"], default="fwd")
    parser.add_argument("--lengths", type=int, nargs="+", help="this and the next three: a grid instead of the suite")
    parser.add_argument("--heads", nargs="+", help="query heads:key heads")
    parser.add_argument("--head-dims", nargs="+", help="of queries and keys[:of values]")
    parser.add_argument("--masks", nargs="+", help="a workload, docN, rdocN or block_causal_N")
    parser.add_argument("--peers", nargs="*", default=["fa3", "cudnn"], choices=PEERS, help="of a grid")
    parser.add_argument("--no-flex", action="store_true", help="the suite without FlexAttention")
    parser.add_argument("--budget-ms", type=float, default=100, help="of device time for each call of a case, at most")
    parser.add_argument("--seconds", type=float, default=540, help="for all cases; none starts after this")
    parser.add_argument("--json", type=Path, help="written after every case")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    begin = time.perf_counter()
    cases = cases_of(args)
    if args.compile_only:
        for case in cases:
            measure(case, args.direction, 0, compile_only=True)
        return
    if args.no_flex:
        cases = [without_flex(case) for case in cases]
    cases = compile_flex_ahead(cases, args.direction, min(FLEX_SECONDS, args.seconds / 2))
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "direction": args.direction,
        "matrix_product_tflops": matrix_product_tflops(),
        "rows": (rows := []),
        "failed": (failed := {}),
    }
    print(
        f"{result['device']}, torch {result['torch']}, {args.direction}, matrix product "
        f"{result['matrix_product_tflops']:.0f} TFLOP/s; (how much longer the peer takes)"
    )
    for i, case in enumerate(cases):
        seconds = time.perf_counter() - begin
        share_ms = 1e3 * (args.seconds - seconds) / (len(cases) - i)
        progress = f"[{i + 1:2}/{len(cases)} {seconds:4.0f} s]"
        if seconds > args.seconds:
            failed[str(case)] = f"not started: {args.seconds:.0f} s were over"
        else:
            try:
                rows.append(measure(case, args.direction, min(args.budget_ms, share_ms / CALLS_A_CASE)))
                print(progress, line(rows[-1]), flush=True)
                for peer, why in rows[-1]["left_out"].items():
                    print(f"    without {peer}: {why}")
            except Exception as error:  # the other cases are worth having
                failed[str(case)] = f"{type(error).__name__}: {error}".splitlines()[0]
                torch.cuda.empty_cache()
        if str(case) in failed:
            print(progress, f"{case}: FAILED, {failed[str(case)]}", flush=True)
        result["bars"] = bars(args.direction, rows, result["matrix_product_tflops"])
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1))
    print_bars(result["bars"])
    print(f"{len(rows)} cases, {len(failed)} failed, {time.perf_counter() - begin:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
