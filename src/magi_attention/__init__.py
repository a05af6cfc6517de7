"""Exact attention under any mask that is a list of slices, on one device or many, traced whole by torch.compile.

The ops are `torch.ops.magi.*`; the Python level is what this package exports (see `magi_attention.api`).
"""

from magi_attention.api import *  # noqa: F403
from magi_attention.api import __all__ as __all__
