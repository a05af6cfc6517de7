"""How does a context-parallel group attend where query rows move too? `AttendWithGuests`, the other loop of `attend`.

A rank computes its own rows and those that visit it (guests), with its own keys and with the keys that travel to it.
Guests arrive while it computes own rows with own keys; in every stage they come first, so that what they found is on its
way home while the last stage's own rows are computed. Order is a data edge (`after`), as in attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magi_attention.dist.comm import group_cast, group_reduce, wait
from magi_attention.ops import accumulation_dtype, sink_gradient
from magi_attention.plan import Guests, Stage

__all__ = ["AttendWithGuests"]

_ops = torch.ops.magi
# Before torch 2.13 a traced autograd function that returns a tensor it also saved gives wrong gradients without a word.
RETURN_COPIES = torch.__version__ < "2.13"


class AttendWithGuests(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, sink, slices, stages, backward_stages, guests, group, softmax_scale, softcap, deterministic
    ):
        kv = torch.cat([k, v], dim=2)

        def attend_keys(rows, keys, slices, partial, after, sink=None):
            return _ops.ffa_fwd(
                rows,
                keys[..., : k.shape[2]],
                keys[..., k.shape[2] :],
                slices,
                sink=sink,
                out_prev=partial[0],
                lse_prev=partial[1],
                softmax_scale=softmax_scale,
                softcap=softcap,
                out_dtype=accumulation_dtype(q.dtype),
                after=after,
            )

        coming = _cast(q, guests, group, [])
        flying = [_cast(kv, stages[0], group, [coming])]
        own = attend_keys(q, kv, slices, (None, None), [coming, *flying])
        visiting = wait(coming)
        found = attend_keys(visiting, kv, guests.slices, (None, None), flying)
        for stage, following in zip(stages, (*stages[1:], None)):
            if following is not None:
                coming = _cast(kv, following, group, flying)
                keys = wait(*flying)
                found = attend_keys(visiting, keys, stage.guest_slices, found, [coming])
            else:
                keys = wait(*flying)
                found = attend_keys(visiting, keys, stage.guest_slices, found, [])
                coming = _return([found[0], found[1][..., None]], guests, group, [keys])
            own = attend_keys(q, keys, stage.slices, own, [coming], sink=sink if following is None else None)
            flying = [coming]
        out, lse = own
        out, lse = _merge_returned(out, lse, wait(*flying), guests.send_ranges)
        out = out.to(q.dtype)

        ctx.save_for_backward(q, k, v, sink, slices, out, lse)
        ctx.stages, ctx.guests, ctx.group = backward_stages, guests, group
        ctx.softmax_scale, ctx.softcap, ctx.deterministic = softmax_scale, softcap, deterministic
        return (out.clone(), lse.clone()) if RETURN_COPIES else (out, lse)

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink, slices, out, lse = ctx.saved_tensors
        stages, guests, group = ctx.stages, ctx.guests, ctx.group
        kv = torch.cat([k, v], dim=2)
        accumulator = accumulation_dtype(q.dtype)

        def grads_of_keys(rows, keys, slices, dq, after):
            q, dout, lse, delta = rows
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
                grad_dtype=accumulator,
                after=after,
            )

        rows_coming = _cast(torch.cat([q, dout], dim=2), guests, group, [dout])
        delta = _ops.ffa_delta(dout, out, dlse)
        numbers_coming = _cast(torch.stack([lse, delta], dim=-1), guests, group, [rows_coming])
        flying = [_cast(kv, stages[0], group, [dout, numbers_coming])]
        own = q, dout, lse, delta
        dq, dk, dv = grads_of_keys(own, kv, slices, None, [rows_coming, numbers_coming, *flying])
        rows, numbers = wait(rows_coming), wait(numbers_coming)
        visiting = (
            rows[..., : q.shape[2]],
            rows[..., q.shape[2] :],
            numbers[..., 0].contiguous(),
            numbers[..., 1].contiguous(),
        )
        found, dk_more, dv_more = grads_of_keys(visiting, kv, guests.slices, None, flying)
        dkv = torch.cat([dk + dk_more, dv + dv_more], dim=2)
        launched = flying
        returning: list[Tensor] = []
        for stage, following in zip(stages, (*stages[1:], None)):
            if following is not None:
                coming = _cast(kv, following, group, [dout, *launched, found])
                keys = wait(*flying)
                found, dk_more, dv_more = grads_of_keys(
                    visiting, keys, stage.guest_slices, found, [coming, *returning[-1:]]
                )
            else:
                keys = wait(*flying)
                found, dk_more, dv_more = grads_of_keys(visiting, keys, stage.guest_slices, found, returning[-1:])
                coming = _return([found], guests, group, [dout, *launched])
            dq, dk, dv = grads_of_keys(own, keys, stage.slices, dq, [coming, *returning[-1:]])
            launched = [
                group_reduce([dk + dk_more, dv + dv_more], stage.splits, group, stage.send_rows.shape[0], [coming])
            ]
            returning += launched
            flying = [coming]
        dq = dq + _ops.range_scatter_reduce(wait(*flying), guests.send_ranges, dq.shape[0])
        for stage, arrived in zip(stages, returning):
            dkv = dkv + _ops.range_scatter_reduce(wait(arrived), stage.send_ranges, dkv.shape[0])

        dk, dv = dkv.to(k.dtype).split([k.shape[2], v.shape[2]], dim=2)
        dsink = None if sink is None else sink_gradient(sink, lse, delta)
        return dq.to(q.dtype), dk, dv, dsink, None, None, None, None, None, None, None, None


def _cast(x: Tensor, to: Stage | Guests, group: str, after: list[Tensor]) -> Tensor:
    return group_cast(x, to.send_ranges, to.splits, group, to.recv_rows.shape[0], after)


def _return(parts: list[Tensor], guests: Guests, group: str, after: list[Tensor]) -> Tensor:
    return group_reduce(parts, guests.splits, group, guests.send_rows.shape[0], after)


def _merge_returned(out: Tensor, lse: Tensor, returned: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Own rows' partial results with those that come back from other ranks, any number for each row.

    Args:
        out, lse: `[rows, heads, v_dim]` and `[rows, heads]` in the accumulation dtype.
        returned: `[n, heads, v_dim + 1]`, out and lse side by side.
        ranges: int32 `[m, 2]`, the rows of `out` that they belong to, range after range.
    """
    at = _ops.range_gather(torch.arange(lse.shape[0], device=lse.device), ranges, returned.shape[0])
    at = at[:, None].expand(-1, lse.shape[1])
    lse_returned = returned[..., -1]
    most = lse.scatter_reduce(0, at, lse_returned, "amax")
    # A row that nobody gave a key has no largest logit; anything finite will do, since its weights are 0.
    most = torch.where(most == float("-inf"), 0.0, most)
    weight = torch.exp(lse - most)
    weight_returned = torch.exp(lse_returned - most.gather(0, at))[..., None]
    weighted = torch.cat([returned[..., :-1] * weight_returned, weight_returned], dim=-1)
    total = _ops.range_scatter_reduce(weighted, ranges, out.shape[0])
    share = weight + total[..., -1]
    out = (out * weight[..., None] + total[..., :-1]) / torch.where(share == 0, 1.0, share)[..., None]
    return out, most + torch.log(share)
