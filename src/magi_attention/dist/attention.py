"""How does a context-parallel group attend? `attend`: one autograd function that loops over the stages of a plan.

The keys of stage s+1 travel while stage s computes; the backward fetches them again instead of saving them. Order is a
data edge (`after`), or Inductor's scheduler loses it: each launch lists the launch before it, each kernel the buffer
that is in flight, and the launches of the backward list its incoming gradient, without which they would be merged with
the forward's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from magi_attention.dist.comm import Mesh, group_cast, group_name, group_reduce, wait
from magi_attention.dist.dispatch import check_group, check_rows
from magi_attention.dist.tensor_parallel import heads_local
from magi_attention.ops import accumulation_dtype, sink_gradient
from magi_attention.plan import Plan, Stage

__all__ = ["attend"]

_ops = torch.ops.magi
# Before torch 2.13 a traced autograd function that returns a tensor it also saved gives wrong gradients without a word.
_RETURN_COPIES = torch.__version__ < "2.13"


class _Attend(torch.autograd.Function):
    # Slices and stages, not the plan: torch 2.11 guards every number in a frozen dataclass that it sees go in here.
    @staticmethod
    def forward(ctx, q, k, v, sink, slices, stages, backward_stages, group, softmax_scale, softcap, deterministic):
        accumulator = accumulation_dtype(q.dtype)
        kv = torch.cat([k, v], dim=2)

        def attend_keys(keys, slices, out, lse, after, last):
            return _ops.ffa_fwd(
                q,
                keys[..., : k.shape[2]],
                keys[..., k.shape[2] :],
                slices,
                sink=sink if last else None,  # once
                out_prev=out,
                lse_prev=lse,
                softmax_scale=softmax_scale,
                softcap=softcap,
                out_dtype=q.dtype if last else accumulator,
                after=after,
            )

        flying = [_cast(kv, stages[0], group, [])]
        out, lse = attend_keys(kv, slices, None, None, flying, last=False)
        for stage, following in zip(stages, (*stages[1:], None)):
            coming = [] if following is None else [_cast(kv, following, group, flying)]
            out, lse = attend_keys(wait(*flying), stage.slices, out, lse, coming, last=following is None)
            flying = coming

        ctx.save_for_backward(q, k, v, sink, slices, out, lse)
        ctx.stages, ctx.group = backward_stages, group
        ctx.softmax_scale, ctx.softcap, ctx.deterministic = softmax_scale, softcap, deterministic
        return (out.clone(), lse.clone()) if _RETURN_COPIES else (out, lse)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink, slices, out, lse = ctx.saved_tensors
        stages, group = ctx.stages, ctx.group
        kv = torch.cat([k, v], dim=2)

        def grads_of_keys(keys, slices, dq, after):
            return _ops.ffa_bwd(
                dout,
                q,
                keys[..., : k.shape[2]],
                keys[..., k.shape[2] :],
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

        flying = launched = [_cast(kv, stages[0], group, [dout])]
        delta = _ops.ffa_delta(dout, out, dlse)
        dq, dk, dv = grads_of_keys(kv, slices, None, flying)
        dkv = torch.cat([dk, dv], dim=2)
        returning: list[Tensor] = []
        for stage, following in zip(stages, (*stages[1:], None)):
            coming = [] if following is None else [_cast(kv, following, group, [dout, *launched])]
            dq, dk, dv = grads_of_keys(wait(*flying), stage.slices, dq, coming + returning[-1:])
            launched = [group_reduce([dk, dv], stage.splits, group, stage.send_rows.shape[0], coming or launched)]
            returning += launched
            flying = coming
        for stage, arrived in zip(stages, returning):
            dkv = dkv + _ops.range_scatter_reduce(wait(arrived), stage.send_ranges, dkv.shape[0])

        dk, dv = dkv.to(k.dtype).split([k.shape[2], v.shape[2]], dim=2)
        dsink = None if sink is None else sink_gradient(sink, lse, delta)
        return dq.to(q.dtype), dk, dv, dsink, None, None, None, None, None, None, None


def _cast(kv: Tensor, stage: Stage, group: str, after: list[Tensor]) -> Tensor:
    return group_cast(kv, stage.send_ranges, stage.splits, group, stage.recv_rows.shape[0], after)


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
            size and with its rank.
        sink: natural-log logits `[s_sink, heads]`, the same on every rank, that join each row's softmax with the value
            0; float32 (float64 for float64 q).
        softmax_scale: factor on q k^T, `head_dim ** -0.5` by default.
        softcap: c > 0 replaces each scaled score s by c tanh(s / c); 0 leaves it.
        deterministic: gradients that are bitwise equal from run to run (outputs always are).

    With DTensors on a mesh of two dimensions, `mesh` being one of them: q, k, v are `Shard(0)` on `mesh` and `Shard(1)`
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
    group = group_name(mesh)
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

        return heads_local(attend_local, q, k, v, sink, group)
    _check(q, k, v, sink, plan, mesh)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    return _Attend.apply(
        q, k, v, sink, plan.slices, plan.stages, plan.backward_stages, group, scale, softcap, deterministic
    )
