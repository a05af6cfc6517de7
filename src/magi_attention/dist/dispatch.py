"""How do rows get into a plan's layout and out of it? `dispatch`, `undispatch`, `position_ids` and `roll`.

A plan stands for its `q_layout`; where keys have a layout of their own (cross-attention), give `plan.k_layout` instead.

Gradients of a tensor that every rank holds whole come in two conventions, named by `grad`:

- "replicated": every rank computes the same loss from the whole tensor, so every rank's copy carries the whole
  gradient.
- "partial": every rank computes its own part of the loss, so the gradient is the sum of the ranks' copies.

With either one the gradients here are those of the whole, not averaged. A loss summed over dispatched rows and then
over the ranks, with parameters whose gradients the ranks add up (FSDP, DDP), wants "partial" throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from magi_attention.dist.comm import Mesh, group_name, wait
from magi_attention.ops import accumulation_dtype
from magi_attention.plan import Layout, Plan

__all__ = ["check_group", "check_rows", "dispatch", "position_ids", "roll", "undispatch"]

Convention = Literal["replicated", "partial"]

_ops = torch.ops.magi
_collectives = torch.ops._c10d_functional


def dispatch(x: Tensor, plan: Plan | Layout, mesh: Mesh, *, grad: Convention = "replicated") -> Tensor:
    """This rank's rows of a sequence.

    Args:
        x: the whole sequence `[total, ...]`, the same on every rank, of any dtype; or a DTensor of that shape that is
            `Shard(0)` on `mesh`: its rows then travel from the ranks that hold them, each once.
        plan: on the device of x.
        mesh: 1-D device mesh or process group of the plan's ranks.
        grad: convention of the gradient of a plain x (see the module's text): "replicated" gathers the whole gradient
            on every rank, "partial" leaves zeros for rows of other ranks. A DTensor's gradient is sharded as it is.

    Returns:
        `[layout.rows, ...]`, the rows in the layout's order, then zeros as padding.

    Raises:
        ValueError: x, plan and mesh disagree; before anything is sent.

    Example:
        >>> tokens = dispatch(packed_tokens, plan, mesh)
    """
    layout = _layout(plan)
    check_group(layout, mesh)
    _check_convention(grad)
    if isinstance(x, DTensor):
        return _dispatch_shards(x, layout, mesh)
    if torch.compiler.is_compiling():
        torch._check(x.shape[0] == layout.sequence_rows.shape[0])
    elif x.ndim == 0 or x.shape[0] != layout.total:
        raise ValueError(f"x must have the sequence's {layout.total} rows, got {list(x.shape)}")
    _check_device("x", x, layout)
    return _Dispatch.apply(x, layout, group_name(mesh), grad)


def undispatch(x: Tensor, plan: Plan | Layout, mesh: Mesh, *, grad: Convention = "replicated") -> Tensor:
    """The whole sequence from the ranks' rows: the inverse of `dispatch`. Padding is dropped.

    Args:
        x: this rank's rows `[layout.rows, ...]`.
        grad: convention of the incoming gradient (see the module's text): "replicated" picks this rank's rows of it,
            "partial" adds up the ranks' gradients (in float32 or wider).

    Returns:
        `[total, ...]`, the same on every rank.

    Raises:
        ValueError: x, plan and mesh disagree; before anything is sent.
    """
    layout = _layout(plan)
    check_group(layout, mesh)
    _check_convention(grad)
    check_rows("x", x, layout)
    return _Undispatch.apply(x, layout, group_name(mesh), grad)


def position_ids(plan: Plan | Layout, device: torch.device | str) -> Tensor:
    """Positions in the sequence of this rank's rows, int64 `[layout.rows]` on `device`; 0 for padding."""
    layout = _layout(plan)
    chunks = layout.chunks[layout.rank].long()
    rows = (chunks[:, None] * layout.chunk + torch.arange(layout.chunk, device=chunks.device)).flatten()
    return torch.where((rows >= 0) & (rows < layout.total), rows, 0).to(device)


def roll(x: Tensor, shift: int, plan: Plan | Layout, mesh: Mesh) -> Tensor:
    """`torch.roll(sequence, shift, dims=0)` of a dispatched sequence; only rows whose owner changes travel.

    The true length is rolled: padding never enters it, and stays zero.

    Args:
        x: this rank's rows `[layout.rows, ...]`, any dtype.
        shift: rows that the sequence moves to the right; any integer.

    Returns:
        `[layout.rows, ...]`. Its gradient is rolled back.

    Raises:
        ValueError: x, plan and mesh disagree; before anything is sent.

    Example:
        >>> next_tokens = roll(tokens, -1, plan, mesh)
    """
    layout = _layout(plan)
    check_group(layout, mesh)
    check_rows("x", x, layout)
    return _Move.apply(x, layout, layout, shift, layout.rank, group_name(mesh))


# ---- the whole sequence on every rank --------------------------------------------------------------------------------


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout, group, grad):
        ctx.layout, ctx.group, ctx.grad = layout, group, grad
        return _take(x, layout)

    @staticmethod
    def backward(ctx, dy):
        layout = ctx.layout
        if ctx.grad == "replicated":
            dx = _gather(dy, layout, ctx.group)
        else:
            dx = _ops.return_rows(dy, layout.ranges, layout.owned_rows.shape[0], layout.sequence_rows.shape[0])
        return dx, None, None, None


class _Undispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout, group, grad):
        ctx.layout, ctx.group, ctx.grad = layout, group, grad
        return _gather(x, layout, group)

    @staticmethod
    def backward(ctx, dy):
        layout = ctx.layout
        if ctx.grad == "replicated":
            dx = _take(dy, layout)
        else:
            placed = _ops.range_scatter_reduce(
                dy.to(accumulation_dtype(dy.dtype)),
                _sequence_order(layout),
                layout.world_size * layout.local_rows.shape[0],
            )
            dx = wait(_collectives.reduce_scatter_tensor(placed, "sum", layout.world_size, ctx.group)).to(dy.dtype)
        return dx, None, None, None


# Sizes come from the layout's carriers, not from its numbers, so that one traced graph serves every length; what is
# computed from several of them is computed inside an op.
_library = torch.library.Library("magi", "FRAGMENT")
_library.define("take_rows(Tensor x, Tensor ranges, SymInt num_owned, SymInt rows) -> Tensor")
_library.define("return_rows(Tensor y, Tensor ranges, SymInt num_owned, SymInt total) -> Tensor")
_library.define("sequence_order(Tensor ranges, Tensor chunks, SymInt chunk, SymInt total) -> Tensor")


def _take_rows(x: Tensor, ranges: Tensor, num_owned: int, rows: int) -> Tensor:
    """Own rows of the whole sequence, then zeros."""
    own = _ops.range_gather(x, ranges, num_owned)
    return torch.cat([own, own.new_zeros((rows - num_owned, *own.shape[1:]))])


def _return_rows(y: Tensor, ranges: Tensor, num_owned: int, total: int) -> Tensor:
    """The adjoint of `take_rows`: own rows at their places in the whole sequence, zeros elsewhere."""
    return _ops.range_scatter_reduce(y[:num_owned], ranges, total)


def _order_of_chunks(ranges: Tensor, chunks: Tensor, chunk: int, total: int) -> Tensor:
    """int32 [slots of all ranks, 2] on the device of ranges: where the sequence's chunks, in order, are in the rows of all
    ranks put end to end; empty ranges for padding."""
    slots, begin = torch.sort(chunks.flatten())  # padding, -1, comes first
    begin *= chunk
    length = torch.where(slots < 0, 0, (total - slots.long() * chunk).clamp(max=chunk))
    return torch.stack([begin, begin + length], dim=1).to(torch.int32).to(ranges.device)


for _key in ("CPU", "CUDA"):
    _library.impl("take_rows", _take_rows, _key)
    _library.impl("return_rows", _return_rows, _key)
    _library.impl("sequence_order", _order_of_chunks, _key)


@torch.library.register_fake("magi::take_rows", lib=_library)
def _(x, ranges, num_owned, rows):
    return x.new_empty((rows, *x.shape[1:]))


@torch.library.register_fake("magi::return_rows", lib=_library)
def _(y, ranges, num_owned, total):
    return y.new_empty((total, *y.shape[1:]))


@torch.library.register_fake("magi::sequence_order", lib=_library)
def _(ranges, chunks, chunk, total):
    return ranges.new_empty((chunks.shape[0] * chunks.shape[1], 2))


def _take(x: Tensor, layout: Layout) -> Tensor:
    return _ops.take_rows(x, layout.ranges, layout.owned_rows.shape[0], layout.local_rows.shape[0])


def _gather(x: Tensor, layout: Layout, group: str) -> Tensor:
    """The whole sequence from the rows of all ranks."""
    ranks = wait(_collectives.all_gather_into_tensor(x.contiguous(), layout.world_size, group))
    return _ops.range_gather(ranks, _sequence_order(layout), layout.sequence_rows.shape[0])


def _sequence_order(layout: Layout) -> Tensor:
    return _ops.sequence_order(
        layout.ranges, layout.chunks, layout.chunk_rows.shape[0], layout.sequence_rows.shape[0]
    )


# ---- from one division into chunks to another ------------------------------------------------------------------------

_library.define(
    "move_rows(Tensor x, Tensor source, Tensor target, SymInt source_chunk, SymInt target_chunk, SymInt total, "
    "SymInt rows, SymInt shift, int rank, str group) -> Tensor"
)


def _move_rows(
    x: Tensor,
    source: Tensor,
    target: Tensor,
    source_chunk: int,
    target_chunk: int,
    total: int,
    rows: int,
    shift: int,
    rank: int,
    group: str,
) -> Tensor:
    """A sequence of `total` rows, rolled by `shift` and handed from one division over the ranks to another.

    Args:
        x: this rank's rows under `source`.
        source, target: int32 `[world, slots]` on the CPU, chunk ids of every rank as in `Layout.chunks`.
        source_chunk, target_chunk: rows of a chunk.
        rows: of the result.

    Returns:
        `[rows, ...]`, this rank's rows under `target`, then zeros.
    """
    world = len(source)
    out = x.new_zeros((rows, *x.shape[1:]))
    if total == 0:
        return out
    # The sequence falls into pieces that lie in one chunk on either side; `to` and `at` are their first rows after and
    # before the roll.
    cuts = [
        torch.arange(0, total, target_chunk),
        (torch.arange(0, total, source_chunk) + shift) % total,
    ]
    to = torch.unique(torch.cat(cuts))
    length = torch.diff(to, append=torch.tensor([total]))
    at = (to - shift) % total
    to_rank, to_row = _locate(to, target, target_chunk)
    at_rank, at_row = _locate(at, source, source_chunk)

    def exchange(mine: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Pieces of mine by the other rank, and the rows for each."""
        pieces = mine.nonzero().flatten()
        pieces = pieces[torch.argsort(other[pieces], stable=True)]
        return pieces, torch.zeros(world, dtype=torch.int64).index_add_(0, other[pieces], length[pieces])

    def ranges(begin: Tensor, pieces: Tensor) -> Tensor:
        return torch.stack([begin[pieces], begin[pieces] + length[pieces]], dim=1).to(torch.int32).to(x.device)

    leaving, send = exchange(at_rank == rank, to_rank)
    coming, receive = exchange(to_rank == rank, at_rank)
    packed = _ops.range_gather(x, ranges(at_row, leaving), int(send.sum()))
    arrived = wait(_collectives.all_to_all_single(packed, receive.tolist(), send.tolist(), group))
    # Back into the order of the rows: the buffer's pieces by the row they belong to. Padding is behind them all.
    begin = torch.cumsum(length[coming], 0) - length[coming]
    order = torch.argsort(to_row[coming])
    pieces = torch.stack([begin, begin + length[coming]], dim=1)[order].to(torch.int32).to(x.device)
    num_rows = int(receive.sum())
    out[:num_rows] = _ops.range_gather(arrived, pieces, num_rows)
    return out


def _locate(rows: Tensor, chunks: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Rank and local row, int64 each, of rows of the sequence."""
    slots = chunks.shape[1]
    place = torch.argsort(chunks.flatten())[int((chunks < 0).sum()) :]  # of every chunk, in order
    at = place[rows // chunk]
    return at // slots, at % slots * chunk + rows % chunk


for _key in ("CPU", "CUDA"):
    _library.impl("move_rows", _move_rows, _key)


@torch.library.register_fake("magi::move_rows", lib=_library)
def _(x, source, target, source_chunk, target_chunk, total, rows, shift, rank, group):
    return x.new_empty((rows, *x.shape[1:]))


@dataclass(frozen=True)
class _Blocks:
    """One block of neighbouring rows per rank, described like a `Layout`."""

    chunks: Tensor
    chunk_rows: Tensor


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, source, target, shift, rank, group):
        ctx.source, ctx.target = source, target
        ctx.shift, ctx.rank, ctx.group = shift, rank, group
        ctx.rows = x.shape[0]
        chunks = source.chunk_rows.shape[0], target.chunk_rows.shape[0]
        total, rows = target.sequence_rows.shape[0], target.local_rows.shape[0]
        return _ops.move_rows(x, source.chunks, target.chunks, *chunks, total, rows, shift, rank, group)

    @staticmethod
    def backward(ctx, dy):
        source, target = ctx.source, ctx.target
        chunks = target.chunk_rows.shape[0], source.chunk_rows.shape[0]
        back = target.sequence_rows.shape[0], ctx.rows, -ctx.shift, ctx.rank, ctx.group
        return _ops.move_rows(dy, target.chunks, source.chunks, *chunks, *back), None, None, None, None, None


def _dispatch_shards(x: DTensor, layout: Layout, mesh: Mesh) -> Tensor:
    """Own rows of a sequence that is split into one block of neighbouring rows per rank."""
    if not isinstance(mesh, DeviceMesh) or x.device_mesh != mesh or x.placements != (Shard(0),):
        raise ValueError(
            f"x must be a DTensor with Shard(0) on the device mesh {mesh}, got {x.placements} on {x.device_mesh}"
        )
    if x.shape[0] != layout.total:
        raise ValueError(f"x must have the sequence's {layout.total} rows, got {list(x.shape)}")
    local = x.to_local()
    _check_device("x", local, layout)
    # A last shard may be short, or empty: the rows it lacks are none of the sequence's.
    ranks = torch.arange(layout.world_size, dtype=torch.int32)
    chunk_rows = torch.empty(max(1, -(-layout.total // layout.world_size)), 0)
    return _Move.apply(local, _Blocks(ranks[:, None], chunk_rows), layout, 0, layout.rank, group_name(mesh))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _layout(plan: Plan | Layout) -> Layout:
    return plan if isinstance(plan, Layout) else plan.q_layout


def check_group(layout: Layout, mesh: Mesh) -> None:
    """ValueError unless the layout is that of this rank of the group."""
    size, rank = mesh.size(), 0
    if isinstance(mesh, DeviceMesh):
        for dim in range(mesh.ndim):
            rank = rank * mesh.size(dim) + mesh.get_local_rank(dim)
    else:
        rank = mesh.rank()
    if (layout.world_size, layout.rank) != (size, rank):
        raise ValueError(
            f"plan must be that of rank {rank} of {size}, like mesh, got rank {layout.rank} of {layout.world_size}"
        )


def check_rows(name: str, x: Tensor, layout: Layout) -> None:
    """ValueError unless x has the local rows of the layout and is on its device."""
    _check_device(name, x, layout)
    if torch.compiler.is_compiling():
        # In the graph, before anything is launched. (`rows`, a number, would make a graph of its own for each length.)
        torch._check(x.shape[0] == layout.local_rows.shape[0])
    elif x.ndim == 0 or x.shape[0] != layout.rows:
        raise ValueError(f"{name} must have the {layout.rows} rows of this rank, got {list(x.shape)}")


def _check_device(name: str, x: Tensor, layout: Layout) -> None:
    if x.device != layout.ranges.device:
        raise ValueError(
            f"{name} and the plan must be on one device, got {x.device} and {layout.ranges.device}: "
            f"plan.to({str(x.device)!r})"
        )


def _check_convention(grad: str) -> None:
    if grad not in ("replicated", "partial"):
        raise ValueError(f"grad must be 'replicated' or 'partial', got {grad!r}")
