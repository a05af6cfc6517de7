"""Plan in a dataloader worker, while the model trains on the batch before.

    python examples/plan_ahead.py

Every batch has another mask, so every batch needs a plan. Planning needs no GPU and no process group, and every rank
finds the same answer alone: a worker process packs the documents and builds this rank's plan, and the training loop
receives both finished. `plan.to(device)` belongs to the loop: a worker holds no GPU.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from magi_attention import Mask, Plan, PlanConfig, build_plan

ROWS = 262_144
WORLD_SIZE, RANK = 16, 3


class PackedDocuments(IterableDataset):
    """Yields (tokens [ROWS], plan): documents of random lengths, causal within each. All ranks draw the same masks."""

    def __init__(self, batches: int, config: PlanConfig) -> None:
        self.batches, self.config = batches, config

    def __iter__(self) -> Iterator[tuple[Tensor, Plan]]:
        for batch in range(self.batches):
            lengths = random.Random(batch)
            ends = [0]
            while ends[-1] < ROWS:
                ends.append(min(ROWS, ends[-1] + int(2 ** lengths.uniform(5, 16))))
            tokens = torch.randint(0, 256, (ROWS,), generator=torch.Generator().manual_seed(batch))
            yield tokens, build_plan(Mask.varlen(ends), world_size=WORLD_SIZE, rank=RANK, config=self.config)


def main() -> None:
    # batch_size=None: a pack is a batch already. Tensors and plans arrive through shared memory.
    loader = DataLoader(PackedDocuments(8, PlanConfig()), batch_size=None, num_workers=1, prefetch_factor=2)
    waited = time.perf_counter()
    for tokens, plan in loader:
        wait = time.perf_counter() - waited
        # Here: x = dispatch(tokens, plan.to(device), mesh), forward, backward.
        time.sleep(0.2)
        remote = plan.remote_rows.double().mean()
        print(
            f"{len(tokens):,} tokens, plan {plan.digest[:8]}: area imbalance {plan.imbalance:.3f}, "
            f"remote rows {remote:,.0f} for {plan.q_layout.rows:,} own; waited {wait * 1e3:.1f} ms"
        )
        waited = time.perf_counter()


if __name__ == "__main__":
    main()
