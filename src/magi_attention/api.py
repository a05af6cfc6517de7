"""Which names are public? Everything a user calls, gathered from the layers below."""

from magi_attention.dist import attend, dispatch, position_ids, roll, save_attention_policy, undispatch
from magi_attention.mask import AttnMaskType, Mask
from magi_attention.ops import flex_attend
from magi_attention.plan import (
    HardwareProfile,
    Plan,
    PlanCache,
    PlanConfig,
    build_plan,
    build_plans,
    choose_stages,
    survey,
)

__all__ = [
    "AttnMaskType",
    "HardwareProfile",
    "Mask",
    "Plan",
    "PlanCache",
    "PlanConfig",
    "attend",
    "build_plan",
    "build_plans",
    "choose_stages",
    "dispatch",
    "flex_attend",
    "position_ids",
    "roll",
    "save_attention_policy",
    "survey",
    "undispatch",
]
