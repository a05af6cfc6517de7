"""How does a context-parallel group attend? `attend`: one autograd function that loops over the stages of a plan.

The keys of stage s+1 travel while stage s computes, and those of stage s+2 between nodes where there are nodes; the
backward fetches them again instead of saving them. Order is a data edge (`after`), or Inductor's scheduler loses it: each
launch lists the launch before it, each kernel the buffers that are in flight, and the launches of the backward list its
incoming gradient, without which they would be merged with the forward's.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from magi_attention.dist.comm import Mesh, group_cast, group_name, group_reduce, wait
from magi_attention.dist.dispatch import check_group, check_rows
from magi_attention.dist.guests import RETURN_COPIES, AttendWithGuests
from magi_attention.dist.tensor_parallel import heads_local
from magi_attention.ops import accumulation_dtype, area_of, raise_if_grad, sink_gradient
from magi_attention.plan import Hop, Plan, Stage

__all__ = ["attend"]

_ops = torch.ops.magi


class _Traffic:
    """Key rows of one pass on their way to this rank, and in a backward their gradients on the way home.

    Step 0 computes with own keys, step 1 + s with those of stage s. Rows that come in two hops (`Stage.relay`)
    cross to this node two steps ahead and fan out inside it one step ahead; gradients add up inside the node in one step
    and cross back in the next. With one hop there is just the one step.

    Args:
        kv: own keys and values side by side.
        groups: names of the process group that rows arrive over, and of that between nodes.
        after: what every launch comes after; so does each launch after the one before it.
    """

    def __init__(self, kv: Tensor, stages: tuple[Stage, ...], groups: tuple[str, str], after: list[Tensor]) -> None:
        self.kv, self.stages, self.after = kv, stages, after
        self.group, self.relay_group = groups
        self.last: list[Tensor] = []
        # Un-waited, by stage: rows between nodes and to this rank, gradients from this rank and between nodes.
        self.crossing: dict[int, Tensor] = {}
        self.arriving: dict[int, Tensor] = {}
        self.leaving: dict[int, Tensor] = {}
        self.returning: dict[int, Tensor] = {}

    @property
    def in_flight(self) -> list[Tensor]:
        """What a kernel lists to run after the launches and before the waits."""
        traffic = (self.crossing, self.arriving, self.leaving, self.returning)
        return [x for kind in traffic for x in kind.values()]

    def launch_for(self, step: int) -> None:
        """Launches what travels while `step` computes."""
        stages = self.stages
        for s in (0, 1) if step == 0 else (step + 1,):
            relay = stages[s].relay if s < len(stages) else None
            if relay is not None:
                self.crossing[s] = self._cast(self.kv, relay, self.relay_group)
        if step < len(stages):
            rows = self.kv
            if step in self.crossing:
                rows = torch.cat([rows, wait(self.crossing.pop(step))])
            self.arriving[step] = self._cast(rows, stages[step].arrival, self.group)

    def keys_of(self, s: int) -> Tensor:
        """The key buffer of stage s."""
        return wait(self.arriving.pop(s))

    def send_home(self, s: int, grads: list[Tensor]) -> None:
        """Launches gradients of the key buffer of stage s, `[rows, heads, d_i]` each, on their way back."""
        self.leaving[s] = self._reduce(grads, self.stages[s].arrival, self.group)

    def cross_home(self, s: int, dkv: Tensor) -> Tensor:
        """Gradients of rows that this rank relayed, added up, go on to their node; those of own rows join dkv."""
        relay = self.stages[s].relay if s in self.leaving else None
        if relay is None:
            return dkv
        rows, relayed = dkv.shape[0], relay.recv_rows.shape[0]
        ranges = self.stages[s].send_ranges
        grads = _ops.range_scatter_reduce(wait(self.leaving.pop(s)), ranges, rows + relayed)
        own, far = grads.split([rows, relayed])
        self.returning[s] = self._reduce([far], relay, self.relay_group)
        return dkv + own

    def all_home(self, dkv: Tensor) -> Tensor:
        """dkv with what the other ranks found."""
        for s in range(len(self.stages)):
            dkv = self.cross_home(s, dkv)
        for s, stage in enumerate(self.stages):
            relay = stage.relay
            if relay is None:
                found, ranges = self.leaving.pop(s), stage.send_ranges
            else:
                found, ranges = self.returning.pop(s), relay.ranges
            dkv = dkv + _ops.range_scatter_reduce(wait(found), ranges, dkv.shape[0])
        return dkv

    def _cast(self, rows: Tensor, hop: Hop, group: str) -> Tensor:
        after = [*self.after, *self.last]
        launched = group_cast(rows, hop.ranges, hop.splits, group, hop.recv_rows.shape[0], after)
        self.last = [launched]
        return launched

    def _reduce(self, grads: list[Tensor], hop: Hop, group: str) -> Tensor:
        launched = group_reduce(grads, hop.splits, group, hop.send_rows.shape[0], [*self.after, *self.last])
        self.last = [launched]
        return launched


def _below_autograd() -> AbstractContextManager[None]:
    """Inside an autograd function nothing else differentiates: ops go straight to their kernels. While tracing, autograd
    takes no time, and is needed."""
    return nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd()


def _forward(q, k, v, sink, slices, stages, groups, softmax_scale, softcap) -> tuple[Tensor, Tensor]:
    accumulator, widths = accumulation_dtype(q.dtype), [k.shape[2], v.shape[2]]

    def attend_keys(keys, slices, out, lse, after, last):
        return _ops.ffa_fwd(
            q,
            *keys.split(widths, dim=2),
            slices,
            sink=sink if last else None,  # once
            out_prev=out,
            lse_prev=lse,
            softmax_scale=softmax_scale,
            softcap=softcap,
            out_dtype=q.dtype if last else accumulator,
            after=after,
        )

    with _below_autograd():
        kv = torch.cat([k, v], dim=2)
        traffic = _Traffic(kv, stages, groups, [])
        traffic.launch_for(0)
        out, lse = attend_keys(kv, slices, None, None, traffic.in_flight, last=False)
        for s, stage in enumerate(stages):
            traffic.launch_for(1 + s)
            keys = traffic.keys_of(s)
            out, lse = attend_keys(keys, stage.slices, out, lse, traffic.in_flight, last=s + 1 == len(stages))
    return out, lse


# The whole forward as one op, for eager calls under a dispatch mode: to selective checkpointing it is one thing to keep,
# so that the backward runs neither kernels nor communication of the forward again. A traced forward stays in pieces.
_library = torch.library.Library("magi", "FRAGMENT")
_library.define(
    "attend_forward(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor slices, Tensor?[] stages, str[] groups, "
    "float softmax_scale, float softcap) -> (Tensor out, Tensor lse)"
)
_STAGE = [field.name for field in dataclasses.fields(Stage)]


def _attend_forward(q, k, v, sink, slices, stages, groups, softmax_scale, softcap):
    """`stages` are the fields of all stages, one after the other."""
    width = len(_STAGE)
    rebuilt = tuple(Stage(*stages[i : i + width]) for i in range(0, len(stages), width))
    return _forward(q, k, v, sink, slices, rebuilt, tuple(groups), softmax_scale, softcap)


for _key in ("CPU", "CUDA"):
    _library.impl("attend_forward", _attend_forward, _key)


@torch.library.register_fake("magi::attend_forward", lib=_library)
def _(q, k, v, sink, slices, stages, groups, softmax_scale, softcap):
    rows, heads, _ = q.shape
    return q.new_empty((rows, heads, v.shape[2])), q.new_empty((rows, heads), dtype=accumulation_dtype(q.dtype))


@register_flop_formula(_ops.attend_forward, get_raw=True)
def _(q, k, v, sink, slices, stages, *args, out_val=None, **kwargs) -> int:
    tables = [slices, *stages[_STAGE.index("slices") :: len(_STAGE)]]
    return sum(2 * area_of(q, k, table) * q.shape[1] * (q.shape[2] + v.shape[2]) for table in tables)


raise_if_grad(_ops.attend_forward.default, "call magi_attention.attend, or detach it")


class _Attend(torch.autograd.Function):
    # Slices and stages, not the plan: torch 2.11 guards every number in a frozen dataclass that it sees go in here.
    @staticmethod
    def forward(
        ctx, q, k, v, sink, slices, stages, backward_stages, groups, softmax_scale, softcap, deterministic
    ):
        if not torch.compiler.is_compiling() and is_in_torch_dispatch_mode():
            tables = [getattr(stage, name) for stage in stages for name in _STAGE]
            out, lse = _ops.attend_forward(q, k, v, sink, slices, tables, groups, softmax_scale, softcap)
        else:
            out, lse = _forward(q, k, v, sink, slices, stages, groups, softmax_scale, softcap)
        ctx.save_for_backward(q, k, v, sink, slices, out, lse)
        ctx.stages, ctx.groups = backward_stages, groups
        ctx.softmax_scale, ctx.softcap, ctx.deterministic = softmax_scale, softcap, deterministic
        return (out.clone(), lse.clone()) if RETURN_COPIES else (out, lse)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink, slices, out, lse = ctx.saved_tensors
        stages, widths = ctx.stages, [k.shape[2], v.shape[2]]

        def grads_of_keys(keys, slices, dq, after):
            return _ops.ffa_bwd(
                dout,
                q,
                *keys.split(widths, dim=2),
                lse,
                delta,
                slices,
                dq_prev=dq,
                softmax_scale=ctx.softmax_scale,
                softcap=ctx.softcap,
                deterministic=ctx.deterministic,
                grad_dtype=accumulation_dtype(q.dtype),
                after=after,
            )

        with _below_autograd():
            kv = torch.cat([k, v], dim=2)
            traffic = _Traffic(kv, stages, ctx.groups, [dout])
            traffic.launch_for(0)
            delta = _ops.ffa_delta(dout, out, dlse)
            dq, dk, dv = grads_of_keys(kv, slices, None, traffic.in_flight)
            dkv = torch.cat([dk, dv], dim=2)
            for s, stage in enumerate(stages):
                traffic.launch_for(1 + s)
                dkv = traffic.cross_home(s - 2, dkv)
                keys = traffic.keys_of(s)
                dq, dk, dv = grads_of_keys(keys, stage.slices, dq, traffic.in_flight)
                traffic.send_home(s, [dk, dv])
            dkv = traffic.all_home(dkv)
            dq, (dk, dv) = dq.to(q.dtype), dkv.to(k.dtype).split(widths, dim=2)
            dsink = None if sink is None else sink_gradient(sink, lse, delta)
        return dq, dk, dv, dsink, None, None, None, None, None, None, None


def _groups(plan: Plan, mesh: Mesh) -> tuple[str, str]:
    """Names of the process group that rows arrive over, and of that between nodes (the same where there are none)."""
    node_size = plan.config.node_size
    if node_size is None:
        name = group_name(mesh)
        return name, name
    shape = (plan.world_size // node_size, node_size)
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 2 or (mesh.size(0), mesh.size(1)) != shape:
        raise ValueError(
            f"mesh must be a DeviceMesh [nodes, ranks of a node] = {list(shape)} for a plan with node_size={node_size}, "
            f"got {mesh}"
        )
    return mesh.get_group(1).group_name, mesh.get_group(0).group_name


def _check(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, plan: Plan, mesh: Mesh) -> None:
    """Raises ValueError where the arguments disagree, so that no rank hangs in a launch that another one refused."""
    check_group(plan.q_layout, mesh)
    layouts = (("q", q, plan.q_layout), ("k", k, plan.k_layout), ("v", v, plan.k_layout))
    for name, x, layout in layouts:
        if x.ndim != 3 or not x.is_floating_point():
            raise ValueError(f"{name} must be floating point [rows, heads, head_dim], got {x.dtype} {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        check_rows(name, x, layout)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q must have a multiple of the {k.shape[1]} heads of k, got {q.shape[1]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v must have the {k.shape[1]} heads of k, got {v.shape[1]}")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have the head_dim of q, {q.shape[2]}, got {k.shape[2]}")
    if sink is not None:
        dtype = accumulation_dtype(q.dtype)
        if sink.ndim != 2 or sink.shape[1] != q.shape[1] or sink.dtype != dtype or sink.device != q.device:
            raise ValueError(
                f"sink must be {dtype} [s_sink, {q.shape[1]}] on {q.device}, got {sink.dtype} {list(sink.shape)} "
                f"on {sink.device}"
            )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    mesh: Mesh,
    *,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Exact attention of a sequence that the ranks of `mesh` hold in the layout of `plan`; every rank calls it.

    Traced whole by `torch.compile(fullgraph=True)`, in one graph for all plans with the same number of stages.

    Args:
        q: this rank's queries `[plan.q_layout.rows, heads, head_dim]`, as `dispatch` lays them out, padding included.
        k, v: this rank's keys `[plan.k_layout.rows, kv_heads, head_dim]` and values `[plan.k_layout.rows, kv_heads,
            v_dim]`, same dtype; `heads` is a multiple of `kv_heads`.
        plan: of this rank, on the device of q (`plan.to(device)`).
        mesh: 1-D device mesh (also one dimension of a larger one, `mesh["cp"]`) or process group, of the plan's world
            size and with its rank. For a plan with `config.node_size` a 2-D device mesh, nodes x ranks of a node (also
            two dimensions of a larger one, `mesh["node", "local"]`).
        sink: natural-log logits `[s_sink, heads]`, the same on every rank, that join each row's softmax with the value
            0; float32 (float64 for float64 q).
        softmax_scale: factor on q k^T, `head_dim ** -0.5` by default.
        softcap: c > 0 replaces each scaled score s by c tanh(s / c); 0 leaves it.
        deterministic: gradients that are bitwise equal from run to run (outputs always are).

    With DTensors on a mesh that has another dimension than those of `mesh`: q, k, v are `Shard(0)` on `mesh` and `Shard(1)`
    (heads) or `Replicate()` on the other one, sink is `Replicate()` on `mesh` and `Shard(1)` or `Replicate()` like
    the heads, and so are the results.

    Returns:
        out `[rows of q, heads, v_dim]` in the dtype of q, and lse `[rows of q, heads]`, the natural log of the softmax
        denominator (sink included), float32 (float64 for float64 q). Rows without keys, padding among them, have out 0
        and lse -inf, or that of the sink. Gradients flow through both outputs. Those of q, k and v are complete; that
        of sink is this rank's part ("partial"): the sum over the ranks is the gradient.

    Raises:
        ValueError: an argument disagrees with the plan, the mesh or the others; before anything is sent.

    Example:
        >>> plan = build_plan(mask, world_size=mesh.size(), rank=mesh.get_local_rank()).to("cuda")
        >>> out, lse = attend(q, k, v, plan, mesh)
    """
    groups = _groups(plan, mesh)
    if isinstance(q, DTensor):

        def attend_local(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> tuple[Tensor, Tensor]:
            return attend(
                q,
                k,
                v,
                plan,
                mesh,
                sink=sink,
                softmax_scale=softmax_scale,
                softcap=softcap,
                deterministic=deterministic,
            )

        return heads_local(attend_local, q, k, v, sink, groups)
    _check(q, k, v, sink, plan, mesh)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    options = (scale, softcap, deterministic)
    if plan.guests is not None:
        return AttendWithGuests.apply(
            q, k, v, sink, plan.slices, plan.stages, plan.backward_stages, plan.guests, groups[0], *options
        )
    return _Attend.apply(q, k, v, sink, plan.slices, plan.stages, plan.backward_stages, groups, *options)
