"""Which names are public? Everything a user calls, gathered from the layers below."""

from magi_attention.mask import AttnMaskType, Mask
from magi_attention.ops import flex_attend

__all__ = ["AttnMaskType", "Mask", "flex_attend"]
