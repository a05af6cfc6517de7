"""torchrun --nproc-per-node N -m magi_attention.plan.measure: what can this hardware do? Prints a `HardwareProfile`.

Times the attention kernel on one causal sequence and on short documents, and all-to-all exchanges of growing size
between the ranks started, on their GPUs, or on the CPU where there are none. Alone, without torchrun, it measures the
kernel only.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from magi_attention import ops  # noqa: F401  (loads the kernels)
from magi_attention.plan.config import _TILE, HardwareProfile, PlanConfig


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after two that are not counted."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 2):
        finish()
        start = time.perf_counter()
        run()
        finish()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def kernel_rate(
    rows: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Floating-point operations a second of a forward pass on whole tiles, and `HardwareProfile.fill`.

    A causal sequence spends its time on tiles, short documents much of it on starting tiles of rows: two equations.
    """
    q = torch.randn(rows, heads[0], head_dim, dtype=dtype, device=device)
    k, v = torch.randn(2, rows, heads[1], head_dim, dtype=dtype, device=device)

    def measured(document: int) -> tuple[float, float]:
        """Cells of whole tiles, and seconds."""
        begin = torch.arange(0, rows, document, dtype=torch.int32)
        end = (begin + document).clamp(max=rows)
        bounds = torch.tensor([[-(1 << 30), 0]], dtype=torch.int32).expand(len(begin), 2)
        slices = torch.cat([torch.stack([begin, end, begin, end], dim=1), bounds], dim=1)
        tiles = torch.ops.magi.slices_work(slices, PlanConfig(profile=HardwareProfile(fill=0)).costs())
        on_device = slices.to(device)
        return float(tiles), seconds(lambda: torch.ops.magi.ffa.slices(q, k, v, on_device), device, 10)

    (long_tiles, long_time), (short_tiles, short_time) = measured(rows), measured(min(512, rows))
    # time = cell * (tiles + start), start being the same for both since they have the same rows.
    cell = max(long_time - short_time, 1e-12) / max(long_tiles - short_tiles, 1.0)
    start = max(short_time / cell - short_tiles, 0.0)
    return 4 * heads[0] * head_dim / cell, start / (rows * _TILE)


def exchange_rate(largest: int, device: torch.device) -> tuple[float, float]:
    """Bytes a second that a rank receives in an all-to-all of `largest` bytes, and seconds of an empty one."""
    world_size = dist.get_world_size()

    def exchange(size: int) -> float:
        count = size // world_size
        sent = torch.zeros(world_size * count, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        mine = seconds(lambda: dist.all_to_all_single(received, sent), device, 10)
        slowest = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    launch = exchange(world_size)
    remote = largest // world_size * (world_size - 1)
    return remote / max(exchange(largest) - launch, 1e-9), launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", type=int, help="rows of the kernel's sequence (default: 32768 on a GPU, 2048 on a CPU)"
    )
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("QUERY", "KEY"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--mib", type=int, help="size of the largest exchange (default: 256 on GPUs, 16 on CPUs)")
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    distributed = dist.is_torchelastic_launched()
    if distributed:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank() if distributed else 0
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    rows = arguments.rows or (32768 if on_gpu else 2048)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    flops, fill = kernel_rate(rows, tuple(arguments.heads), arguments.head_dim, dtype, device)
    profile = HardwareProfile(flops=flops, fill=fill)
    if distributed and dist.get_world_size() > 1:
        bandwidth, launch = exchange_rate((arguments.mib or (256 if on_gpu else 16)) << 20, device)
        profile = dataclasses.replace(profile, bandwidth=bandwidth, launch=launch)
    if rank == 0:
        where = torch.cuda.get_device_name(device) if on_gpu else "CPU"
        print(
            f"# {where}, {dist.get_world_size() if distributed else 1} ranks; exposed and traffic keep their defaults"
        )
        print(
            f"HardwareProfile(flops={profile.flops:.3g}, bandwidth={profile.bandwidth:.3g}, "
            f"launch={profile.launch:.2g}, exposed={profile.exposed}, traffic={profile.traffic}, "
            f"fill={profile.fill:.2g})"
        )
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
