"""What is the right answer? Dense attention in fp64 with lse, sink, softcap and gradients, and the bar an
implementation must meet. For tests and tools only: it holds every score at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from magi_attention.mask import Mask


class Attention(NamedTuple):
    """Outputs, and gradients where they were asked for. dsink is None without a sink."""

    out: Tensor  # [tq, hq, dv]
    lse: Tensor  # [tq, hq] natural log
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dsink: Tensor | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor,
    *,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype | None = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Dense attention, differentiable in q, k, v and sink, through out and through lse.

    A row without keys has out 0 and sends zero gradients to q, k and v; its lse is that of the sink alone, -inf
    without one.

    Args:
        q: [tq, hq, d]; k: [tk, hk, d]; v: [tk, hk, dv]; hq a multiple of hk.
        mask: a `Mask`, or bool [tq, tk] with True where a row sees a key.
        sink: [num_sinks, hq], natural-log logits that take part in every row's softmax and have no value.
        softmax_scale: factor on q . k; 1 / sqrt(d) by default.
        softcap: c > 0 turns a scaled score s into c * tanh(s / c).
        dtype: precision of the products; statistics are fp32 or wider. fp64 is the reference, the inputs' own dtype
            (None) the same formula as plain PyTorch would run it.

    Returns:
        out [tq, hq, dv] in `dtype`, and lse [tq, hq] in fp32, or fp64 where `dtype` is fp64.
    """
    dtype = q.dtype if dtype is None else dtype
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = (mask.dense() if isinstance(mask, Mask) else mask).to(q.device)
    if allowed.shape != (q.shape[0], k.shape[0]):
        raise ValueError(f"mask must be [{q.shape[0]}, {k.shape[0]}] for these q and k, got {list(allowed.shape)}")
    num_groups = q.shape[1] // k.shape[1]
    qh = q.to(dtype).transpose(0, 1)  # [hq, tq, d]
    kh = k.to(dtype).transpose(0, 1).repeat_interleave(num_groups, 0)  # [hq, tk, d]
    vh = v.to(dtype).transpose(0, 1).repeat_interleave(num_groups, 0)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale

    scores = ((qh @ kh.mT) * scale).to(statistics)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sink is not None:
        sinks = sink.to(statistics).T[:, None].expand(-1, q.shape[0], -1)  # [hq, tq, num_sinks]
        scores = torch.cat([scores, sinks], dim=2)
    scores = torch.cat([scores, scores.new_full((*scores.shape[:2], 1), -torch.inf)], dim=2)  # amax needs one column
    peak = scores.detach().amax(dim=2, keepdim=True)
    weights = torch.exp(scores - peak.masked_fill(peak == -torch.inf, 0))

    # Constants stand in for the rows that have neither keys nor a sink before the division and the logarithm, so that
    # no NaN enters the backward.
    empty = peak == -torch.inf  # [hq, tq, 1]
    total = weights.sum(dim=2, keepdim=True).masked_fill(empty, 1)
    weights = (weights / total)[..., : k.shape[0]].to(dtype)
    out = (weights @ vh).transpose(0, 1)
    lse = (peak + torch.log(total)).masked_fill(empty, -torch.inf)[..., 0].T
    return out, lse


def attention_and_grads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    dtype: torch.dtype | None = torch.float64,
) -> Attention:
    """`attention`, and the gradients of sum(dout * out) + sum(dlse * lse); everything in the precision of the formula.

    dout: [tq, hq, dv]; dlse: [tq, hq] or None. The -inf of rows without keys counts for nothing.
    """
    cast = q.dtype if dtype is None else dtype
    wide = torch.float64 if cast == torch.float64 else torch.float32
    inputs = [x.detach().to(cast).requires_grad_() for x in (q, k, v)]
    if sink is not None:
        inputs.append(sink.detach().to(wide).requires_grad_())
    return run_with_grads(
        lambda q, k, v, *sink: attention(
            q, k, v, mask, sink=sink[0] if sink else None, softmax_scale=softmax_scale, softcap=softcap, dtype=cast
        ),
        inputs,
        dout,
        dlse,
    )


def run_with_grads(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], dout: Tensor, dlse: Tensor | None = None
) -> Attention:
    """(out, lse) of `function(*inputs)` and the gradients of its inputs q, k, v and, where it is the fourth, sink."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    outputs, gradients = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs.append(lse)
        gradients.append(dlse.to(lse.dtype))
    dq, dk, dv, *dsink = torch.autograd.grad(outputs, inputs, gradients)
    return Attention(out.detach(), lse.detach(), dq, dk, dv, dsink[0] if dsink else None)


def assert_accurate(
    name: str,
    actual: Tensor,
    exact: Tensor,
    same_precision: Tensor,
    *,
    factor: float = 2.0,
    through: Tensor | None = None,
) -> None:
    """The error contract: max |actual - exact| <= factor * max |same_precision - exact| + floor.

    `exact` is the fp64 reference, `same_precision` the plain formula in the precision under test. Where the plain
    formula is exact by luck, the floor still allows the largest value to be rounded once to `actual`'s dtype and its
    sum to be taken in another order (2e-6 of it; 1e-13 for fp64), and the largest of `through`: what it changes that
    `actual`'s inputs were rounded in between. Infinities have to stand in the same places, and NaN nowhere.

    Raises:
        AssertionError: with both errors.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    got, want, plain = (x.detach().to("cpu", torch.float64) for x in (actual, exact, same_precision))
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite]), f"{name}: infinities differ from the reference"
    assert bool(got[finite].isfinite().all()), f"{name}: not finite where the reference is"
    if not bool(finite.any()):
        return
    error = (got - want)[finite].abs().max().item()
    plain_error = (plain - want)[finite].abs().max().item()
    order = 1e-13 if actual.dtype == torch.float64 else 2e-6
    floor = (torch.finfo(actual.dtype).eps / 2 + order) * want[finite].abs().max().item()
    if through is not None:
        floor += through.abs().max().item()
    assert error <= factor * plain_error + floor, (
        f"{name}: max error {error:.3e} against fp64, allowed {factor:g} * {plain_error:.3e} (the plain formula in the "
        f"same precision) + {floor:.3e}"
    )


def assert_attention(
    function: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    factor: float = 2.0,
) -> None:
    """`assert_accurate` for out, lse and every gradient of `function(q, k, v[, sink]) -> (out, lse)` in the inputs'
    dtype.

    The options describe what `function` computes; it is called without them. Gradients are compared in the dtype of
    their input.

    Example:
        >>> assert_attention(lambda q, k, v: torch.ops.magi.ffa.slices(q, k, v, mask.slices), q, k, v, mask, dout, dlse)
    """
    options = {"sink": sink, "softmax_scale": softmax_scale, "softcap": softcap}
    actual = run_with_grads(function, [q, k, v] if sink is None else [q, k, v, sink], dout, dlse)
    exact = attention_and_grads(q, k, v, mask, dout, dlse, **options)  # type: ignore[arg-type]
    plain = attention_and_grads(q, k, v, mask, dout, dlse, **options, dtype=None)  # type: ignore[arg-type]
    # A backward reads the out that the forward rounded, which the plain formula keeps in fp32 or recomputes: delta =
    # sum(dout * out) moves, and gradients with it as they would with an lse gradient of that size. It shows where few
    # keys and heads add up.
    moved = (dout.to(exact.out) * (exact.out.to(q.dtype).to(exact.out) - exact.out)).sum(-1)
    through = attention_and_grads(q, k, v, mask, torch.zeros_like(dout), moved, **options)  # type: ignore[arg-type]
    for name, got, want, same, change in zip(Attention._fields, actual, exact, plain, through):
        if want is not None:
            assert got is not None and same is not None
            assert_accurate(name, got, want, same, factor=factor, through=change if name.startswith("d") else None)
