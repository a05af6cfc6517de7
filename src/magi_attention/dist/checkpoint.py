"""What should activation checkpointing keep of attention? `save_attention_policy`."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

import magi_attention.dist.attention  # noqa: F401  (defines attend_forward)

__all__ = ["save_attention_policy"]

_ops = torch.ops.magi
_SAVED = (_ops.ffa_fwd.default, _ops.ffa.slices, _ops.attend_forward.default)


def save_attention_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Policy for selective activation checkpointing: keep what attention computed, recompute everything else.

    Without it the backward of a checkpointed block runs the forward's attention again, communication included. With it
    only the final out and lse are kept, and neither kernels nor communication of the forward run again, compiled or
    eager. (Eager with plans whose query rows move, the output of every stage is kept and communication runs again.)

    Example:
        >>> contexts = partial(create_selective_checkpoint_contexts, save_attention_policy)
        >>> y = checkpoint(block, x, plan, use_reentrant=False, context_fn=contexts)
    """
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE
