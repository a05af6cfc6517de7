"""Which masks are measured? Named workloads, each `(total tokens, seed) -> Mask`, the same for planner and kernel
benchmarks.

from workloads import WORKLOADS
mask = WORKLOADS["documents_causal"](65536, seed=3)

python benchmarks/workloads.py [total]      # a table: slices, area, mean keys per row
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from magi_attention.mask import Mask

# Document lengths of a large training corpus, as MagiAttention's benchmark publishes them: (shortest, longest,
# documents).
DOCUMENT_LENGTHS = (
    (0, 10, 30254),
    (11, 50, 391188),
    (51, 100, 699596),
    (101, 200, 1377757),
    (201, 500, 3794735),
    (501, 1024, 3316785),
    (1025, 2048, 2106566),
    (2049, 4096, 988525),
    (4097, 8192, 410002),
    (8193, 16384, 173574),
    (16385, 32768, 115007),
    (32769, 65536, 18428),
    (65537, 131072, 22513),
    (131073, 196608, 18284),
)
NUM_PACKS = 20  # a mean over packs; seeds 0 to 19 name them, seeds 20 to 39 the packs of another shuffle, and so on

VIDEO_CHUNK = 21_600  # tokens of 24 frames at 720 x 1280 (MAGI-1 24B: 6 latent frames of 3,600); no multiple of 128
VIDEO_KV_CHUNKS = (5, 4, 3, 2)  # chunks seen while denoising, from the noisiest of the four to the cleanest


@functools.lru_cache(maxsize=8)
def document_packs(total: int, shuffle: int = 0) -> tuple[torch.Tensor, ...]:
    """`NUM_PACKS` cu_seqlens, int64 [documents + 1], of packs of `total` tokens drawn from `DOCUMENT_LENGTHS`.

    Every document has the middle length of its bin; one longer than a quarter of a pack is cut into quarters and a
    rest. All pieces are shuffled (seed 42 + `shuffle`) and fill packs in order; a piece that meets the end of a pack
    continues in the next one. Whole packs are shuffled, and the first are taken.
    """
    rng = np.random.default_rng(42 + shuffle)
    quarter = max(total // 4, 1)
    pieces = []
    for shortest, longest, documents in DOCUMENT_LENGTHS:
        whole, rest = divmod((shortest + longest) // 2, quarter)
        lengths = [quarter] * whole + [rest] * (rest > 0)
        pieces.append(np.tile(np.asarray(lengths, dtype=np.int64), documents))
    ends = np.concatenate(pieces)
    rng.shuffle(ends)
    np.cumsum(ends, out=ends)
    chosen = rng.permutation(ends[-1] // total)[:NUM_PACKS] * total
    packs = []
    for begin in chosen:
        first, last = np.searchsorted(ends, [begin, begin + total], side="right")
        inside = ends[first:last] - begin
        packs.append(torch.from_numpy(np.unique(np.concatenate([[0], inside, [total]]))))
    return tuple(packs)


def documents_causal(total: int, seed: int = 0) -> Mask:
    """W1: packed documents, causal within each."""
    return Mask.varlen(document_packs(total, seed // NUM_PACKS)[seed % NUM_PACKS])


def documents_full(total: int, seed: int = 0) -> Mask:
    """W1's packs, full within each document."""
    return Mask.varlen(document_packs(total)[seed % NUM_PACKS], causal=False)


def full(total: int, seed: int = 0) -> Mask:
    """W2: dense."""
    return Mask.full(total)


def causal(total: int, seed: int = 0) -> Mask:
    """W2: causal."""
    return Mask.causal(total)


def window_1024(total: int, seed: int = 0) -> Mask:
    """W2: causal sliding window of 1,024 keys, the row's own included."""
    return Mask.sliding_window(total, 1023, 0)


def window_128(total: int, seed: int = 0) -> Mask:
    """W2: the 128-key window of models that alternate it with causal layers."""
    return Mask.sliding_window(total, 127, 0)


def documents_block_causal(total: int, seed: int = 0) -> Mask:
    """W3: W1's packs, block-causal in blocks of 2,048 within each document."""
    return Mask.block_causal(total, 2048, cu_seqlens=document_packs(total)[seed % NUM_PACKS])


def video_history(total: int, seed: int = 0) -> Mask:
    """W4a: video chunks that see all earlier chunks and themselves."""
    return Mask.block_causal(total, VIDEO_CHUNK)


def video_denoising(total: int, seed: int = 0) -> Mask:
    """W4b: clean chunks see themselves; the four being denoised, noisiest last, see their last 2, 3, 4 and 5 chunks."""
    return _recent_chunks(total, [1] * max(-(-total // VIDEO_CHUNK) - 4, 0) + list(reversed(VIDEO_KV_CHUNKS)))


def video_window(total: int, seed: int = 0) -> Mask:
    """W4b as training would see it: every chunk sees its last five chunks."""
    return _recent_chunks(total, [VIDEO_KV_CHUNKS[0]] * -(-total // VIDEO_CHUNK))


def video_clips(total: int, seed: int = 0) -> Mask:
    """W4c: clips of 1 to 8 chunks packed together, block-causal within each."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(rng.integers(1, 9, size=-(-total // VIDEO_CHUNK)) * VIDEO_CHUNK)
    return Mask.block_causal(total, VIDEO_CHUNK, cu_seqlens=[0, *ends[ends < total].tolist(), total])


def block_diffusion(total: int, seed: int = 0) -> Mask:
    """W9: noisy then clean copy of total / 2 tokens in blocks of 32: a noisy block sees itself and the earlier clean
    blocks, a clean block the clean blocks up to itself."""
    length, block = total // 2, 32
    begin = torch.arange(0, length, block)
    end = (begin + block).clamp(max=length)
    zero = torch.full_like(begin, length)
    q = torch.stack([torch.stack(x, 1) for x in ((begin, end), (begin, end), (begin + length, end + length))]).flatten(
        0, 1
    )
    k = torch.stack([torch.stack(x, 1) for x in ((begin, end), (zero, begin + length), (zero, end + length))]).flatten(
        0, 1
    )
    return Mask.from_slices(q, k, "full", total_q=total, total_k=total)


def documents_short(total: int, seed: int = 0) -> Mask:
    """Many short documents, 16 to 512 tokens, causal: the planner's and the tile scheduler's worst count of slices."""
    return Mask.varlen(_log_uniform(total, 16, 512, seed))


def documents_varied(total: int, seed: int = 0) -> Mask:
    """Lengths log-uniform from 16 tokens to half of the pack, causal: a few giants among many dwarfs."""
    return Mask.varlen(_log_uniform(total, 16, max(total // 2, 17), seed))


def _log_uniform(total: int, shortest: int, longest: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    ends = np.cumsum(
        np.exp(rng.uniform(np.log(shortest), np.log(longest), size=total // shortest + 1)).astype(np.int64)
    )
    return [0, *ends[ends < total].tolist(), total]


def _recent_chunks(total: int, seen: list[int]) -> Mask:
    """Chunk i of the last len(seen) chunks sees its last seen[i] chunks, itself among them."""
    begin = torch.arange(0, total, VIDEO_CHUNK)
    end = (begin + VIDEO_CHUNK).clamp(max=total)
    first = (begin - (torch.tensor(seen[-len(begin) :]) - 1) * VIDEO_CHUNK).clamp(min=0)
    return Mask.from_slices(
        torch.stack([begin, end], 1), torch.stack([first, end], 1), "full", total_q=total, total_k=total
    )


WORKLOADS: dict[str, Callable[..., Mask]] = {
    function.__name__: function
    for function in (
        full,
        causal,
        window_1024,
        window_128,
        documents_causal,
        documents_full,
        documents_block_causal,
        documents_short,
        documents_varied,
        video_history,
        video_denoising,
        video_window,
        video_clips,
        block_diffusion,
    )
}


def main() -> None:
    total = int(sys.argv[1]) if len(sys.argv) > 1 else 262_144
    print(f"{total:,} tokens, seed 0")
    print(f"{'workload':24}{'slices':>9}{'density':>10}{'keys/row':>11}{'build ms':>10}")
    document_packs(total)
    for name, build in WORKLOADS.items():
        start = time.perf_counter()
        mask = build(total, seed=0)
        elapsed = time.perf_counter() - start
        area = mask.area()
        print(f"{name:24}{len(mask.slices):9,}{area / total**2:10.4f}{area / total:11,.0f}{elapsed * 1e3:10.2f}")


if __name__ == "__main__":
    main()
