"""Which names are public? Everything a user calls, gathered from the layers below."""

from magi_attention.dist import attend, dispatch, position_ids, roll, save_attention_policy, undispatch
from magi_attention.mask import AttnMaskType, Mask
from magi_attention.ops import flex_attend
from magi_attention.plan import Plan, PlanConfig, build_plan

__all__ = [
    "AttnMaskType",
    "Mask",
    "Plan",
    "PlanConfig",
    "attend",
    "build_plan",
    "dispatch",
    "flex_attend",
    "position_ids",
    "roll",
    "save_attention_policy",
    "undispatch",
]
