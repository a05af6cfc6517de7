"""What should activation checkpointing keep of attention? `save_attention_policy`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["save_attention_policy"]

_ops = torch.ops.magi
_SAVED = (_ops.ffa_fwd.default, _ops.ffa.slices)


def save_attention_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy for selective activation checkpointing: keep what attention computed, recompute everything else.

    Without it the backward of a checkpointed block runs the forward's attention again, communication included. In a
    compiled block only the final out and lse are kept, and the forward is not run again. Eager checkpointing keeps the
    output of every stage and still repeats the forward's communication.

    Example:
        >>> contexts = partial(create_selective_checkpoint_contexts, save_attention_policy)
        >>> y = checkpoint(block, x, plan, use_reentrant=False, context_fn=contexts)
    """
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE
