"""How do attention and DTensor meet? Heads are independent, so every op runs on any split of them.

Importing this module registers the sharding of the attention ops: q, k, v on `Shard(1)` (heads, if the mesh dimension
divides the key/value heads) or `Replicate()`. Tables stay whole: a plain `slices` tensor beside DTensors needs
`torch.distributed.tensor.experimental.implicit_replication()`, or be a replicated DTensor itself. Rows are never split
here: that takes a plan and `attend`, which `heads_local` wraps for DTensors whose rows are split over a
context-parallel group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import local_map, register_sharding

__all__ = ["heads_local"]

_WHOLE = ("slices", "q_ranges", "k_ranges", "attn_type_map")  # tables, the same for every head

Sharding = tuple[list[Placement], list[Placement | None]]  # of the outputs, of the inputs


def _register(op: torch._ops.OpOverload) -> None:
    names = [argument.name for argument in op._schema.arguments]
    num_outputs = len(op._schema.returns)

    def shardings(*args: Any, **kwargs: Any) -> Sequence[Sharding]:
        given = {**dict(zip(names, args)), **kwargs}
        # DTensor hands every tensor as a spec, and everything else as it is.
        tensors = [name if hasattr(value, "placements") else None for name, value in given.items()]

        def sharding(heads: Placement) -> Sharding:
            inputs = [None if name is None else Replicate() if name in _WHOLE else heads for name in tensors]
            return [heads] * num_outputs, inputs

        return [sharding(Replicate()), sharding(Shard(1))]

    register_sharding(op)(shardings)


_ops = torch.ops.magi
for _op in (_ops.ffa.slices, _ops.ffa_fwd.default, _ops.ffa_bwd.default, _ops.ffa_delta.default):
    _register(_op)


@register_sharding(_ops.band_slices.default)
def _(q_ranges: Any, k_ranges: Any, attn_type_map: Any) -> Sequence[Sharding]:
    return [([Replicate()], [Replicate(), Replicate(), Replicate()])]


def heads_local(
    function: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]],
    q: DTensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None,
    groups: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """`function` on the local parts of q, k, v and sink, its results put together again.

    Rows are `Shard(0)` on the mesh dimensions whose process groups are `groups`; heads are `Shard(1)`, or whole, on the
    others.

    Raises:
        ValueError: other placements, or different ones for q, k and v.
    """
    mesh = q.device_mesh
    names: list[str] = [mesh.get_group(dim).group_name for dim in range(mesh.ndim)]
    if not set(groups) <= set(names):
        raise ValueError(f"mesh must be a dimension of the device mesh of q, {mesh}")
    rows = [names.index(group) for group in groups]
    for name, x in (("q", q), ("k", k), ("v", v), ("sink", sink)):
        if x is None:
            continue
        if not isinstance(x, DTensor) or x.device_mesh != mesh:
            raise ValueError(f"{name} must be a DTensor on the device mesh of q, {mesh}, got {type(x).__name__}")
        for dim, placement in enumerate(x.placements):
            allowed: tuple[Placement, ...] = (Shard(1), Replicate())
            if dim in rows:
                allowed = (Replicate(),) if name == "sink" else (Shard(0),)
            elif name != "q":
                allowed = (q.placements[dim],)
            if placement not in allowed:
                raise ValueError(
                    f"{name} must be placed as {' or '.join(map(str, allowed))} on dimension {dim} of {mesh}, "
                    f"got {placement}"
                )
    placed = tuple(q.placements)
    sink_placed = sink_grad = None
    if isinstance(sink, DTensor):
        sink_placed = tuple(sink.placements)
        # Each rank of the group knows the part of its own rows.
        sink_grad = tuple(Partial() if dim in rows else p for dim, p in enumerate(sink_placed))
    run = local_map(
        function,
        out_placements=(placed, placed),
        in_placements=(placed, placed, placed, sink_placed),
        in_grad_placements=(placed, placed, placed, sink_grad),
        device_mesh=mesh,
    )
    return run(q, k, v, sink)
