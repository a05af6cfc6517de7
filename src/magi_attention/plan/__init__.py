"""Who owns which rows, who sends what to whom, what does each rank compute? `build_plan` turns a mask into a `Plan`.

Planning needs no GPU and no process group, and every rank finds the same answer alone: it can run ahead of time, in a
dataloader worker. The arithmetic is in csrc/plan.
"""

from magi_attention.plan.build import PlanCache, build_plan, build_plans
from magi_attention.plan.config import H200_INFINIBAND, H200_NVLINK, CostModel, HardwareProfile, PlanConfig
from magi_attention.plan.overview import Overview, choose_stages, survey
from magi_attention.plan.tables import Guests, Hop, Layout, Plan, Stage

__all__ = [
    "H200_INFINIBAND",
    "H200_NVLINK",
    "CostModel",
    "Guests",
    "HardwareProfile",
    "Hop",
    "Layout",
    "Overview",
    "Plan",
    "PlanCache",
    "PlanConfig",
    "Stage",
    "build_plan",
    "build_plans",
    "choose_stages",
    "survey",
]
