"""Attention over a context-parallel group: attention.py is how ranks attend, dispatch.py how rows get there."""

from magi_attention.dist.attention import attend
from magi_attention.dist.checkpoint import save_attention_policy
from magi_attention.dist.dispatch import dispatch, position_ids, roll, undispatch

__all__ = ["attend", "dispatch", "position_ids", "roll", "save_attention_policy", "undispatch"]
