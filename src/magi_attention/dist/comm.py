"""How do rows travel between ranks? `magi::group_cast` and `magi::group_reduce`: launches of communication.

They return an un-waited tensor: reading it before `wait(result)` is undefined. Sizes live in tensors (`splits` on the
CPU, read inside the op), so that one traced graph serves every mask; `after` is never read: it orders launches and
compute under Inductor's scheduler, which keeps no order between opaque ops.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from magi_attention.ops import raise_if_grad

__all__ = ["Mesh", "group_cast", "group_name", "group_reduce", "wait"]

_library = torch.library.Library("magi", "FRAGMENT")
_library.define(
    "group_cast(Tensor x, Tensor send_ranges, Tensor splits, str group, SymInt rows, Tensor[]? after=None) -> Tensor"
)
_library.define("group_reduce(Tensor[] parts, Tensor splits, str group, SymInt rows, Tensor[]? after=None) -> Tensor")

group_cast = torch.ops.magi.group_cast
group_reduce = torch.ops.magi.group_reduce
wait = torch.ops._c10d_functional.wait_tensor

Mesh: TypeAlias = DeviceMesh | dist.ProcessGroup


def group_name(mesh: Mesh) -> str:
    """The name by which functional collectives know a 1-D mesh or a process group."""
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh must have one dimension, got {mesh.ndim}: {mesh}; name one, mesh['cp'], or flatten several"
            )
        return mesh.get_group().group_name
    if not isinstance(mesh, dist.ProcessGroup):
        raise ValueError(f"mesh must be a DeviceMesh or a ProcessGroup, got {type(mesh).__name__}")
    return mesh.group_name


def _split_sizes(splits: Tensor, send_rows: int | None, receive_rows: int | None) -> tuple[list[int], list[int]]:
    """Rows to send to and to receive from each rank, checked against the buffers' rows where these are known."""
    if splits.device.type != "cpu" or splits.dtype != torch.int64 or splits.ndim != 2 or splits.shape[0] != 2:
        raise ValueError(
            f"splits must be an int64 tensor [2, world] on the CPU, got {splits.dtype} {list(splits.shape)} "
            f"on {splits.device}"
        )
    send, receive = splits.tolist()
    for name, sizes, rows in (("send", send, send_rows), ("receive", receive, receive_rows)):
        if rows is not None and sum(sizes) != rows:
            raise ValueError(f"splits must {name} the {rows} rows of the buffer, got {sizes}")
    return send, receive


def _group_cast(
    x: Tensor, send_ranges: Tensor, splits: Tensor, group: str, rows: int, after: list[Tensor] | None = None
) -> Tensor:
    """Sends each rank its rows of x; un-waited.

    Args:
        x: this rank's rows `[n, ...]`.
        send_ranges: int32 `[m, 2]`, rows of x range after range, grouped by destination rank.
        splits: int64 `[2, world]` on the CPU: rows to send to, and to receive from, each rank.
        group: name of the process group.
        rows: sum of splits[1].
        after: tensors that exist before the launch; never read.

    Returns:
        `[rows, ...]`, the received rows grouped by source rank.
    """
    send, receive = _split_sizes(splits, None, rows)
    packed = torch.ops.magi.range_gather(x, send_ranges, sum(send))
    return torch.ops._c10d_functional.all_to_all_single(packed, receive, send, group)


def _group_reduce(
    parts: list[Tensor], splits: Tensor, group: str, rows: int, after: list[Tensor] | None = None
) -> Tensor:
    """The way back of `group_cast`: returns to each source rank the rows it sent, un-waited.

    The owner adds them up with `range_scatter_reduce(result, send_ranges, ...)`: a row that went to several ranks comes
    back once from each.

    Args:
        parts: tensors `[n, ..., d_i]`, rows in the order that `group_cast` returned them; packed side by side along the
            last dimension into a buffer of the op's own. (A buffer of the caller's could be reused by a compiled graph,
            which sees no reader after the launch, while it still travels.)
        splits: the same tensor as `group_cast` got.
        rows: sum of splits[0].

    Returns:
        `[rows, ..., sum of d_i]` in the order of `send_ranges`.
    """
    send, receive = _split_sizes(splits, rows, parts[0].shape[0])
    return torch.ops._c10d_functional.all_to_all_single(torch.cat(parts, dim=-1), send, receive, group)


for _key in ("CPU", "CUDA"):
    _library.impl("group_cast", _group_cast, _key)
    _library.impl("group_reduce", _group_reduce, _key)


@torch.library.register_fake("magi::group_cast", lib=_library)
def _(x, send_ranges, splits, group, rows, after=None):
    return x.new_empty((rows, *x.shape[1:]))


@torch.library.register_fake("magi::group_reduce", lib=_library)
def _(parts, splits, group, rows, after=None):
    return parts[0].new_empty((rows, *parts[0].shape[1:-1], sum(part.shape[-1] for part in parts)))


for _op in (group_cast.default, group_reduce.default):
    raise_if_grad(_op, "call magi_attention.attend, or detach it")
