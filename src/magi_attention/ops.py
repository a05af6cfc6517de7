"""Which ops are under `torch.ops.magi`? Loads the compiled library; gives each its fake, autograd and FLOP formula.

Schemas are in csrc/ops/schemas.cpp. Per op this file holds, in order: the fake (shapes and dtypes while tracing,
SymInt-clean), the gradient, and the FLOP count.

| op | differentiable |
|---|---|
| `ffa`, `ffa.slices`, `ffa_max_logits` | in q, k, v and sink, through out and through lse |
| `range_gather`, `range_scatter_reduce`, `merge_partials` | yes |
| `ffa_fwd`, `ffa_bwd`, `ffa_delta` | no: raw kernels, which raise where a gradient would be needed |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from magi_attention.mask import Mask, slice_areas

__all__ = ["accumulation_dtype", "area_of", "flex_attend", "raise_if_grad", "sink_gradient"]


def _load(library: str) -> Path:
    path = Path(__file__).parent / "lib" / library
    if not path.exists():
        raise ImportError(
            f"magi_attention's compiled library is missing: {path}. The source tree is not importable; "
            "install the package with `pip install --no-build-isolation .` (see README)."
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"{path} does not load into torch {torch.__version__} (needs torch >= 2.11): {error}"
        ) from error
    return path


_load("libmagi.so")
if torch.version.cuda is not None:
    from magi_attention import jit

    jit.attach(_load("libmagi_cuda.so"))
_ops = torch.ops.magi
_library = torch.library.Library("magi", "IMPL")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of lse, delta, sink and partial results: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def raise_if_grad(op: torch._ops.OpOverload, instead: str) -> None:
    """Makes a raw kernel refuse inputs that require a gradient, which it would otherwise lose silently."""
    kernel = op._op  # OpOverload.__call__ adds nothing to it

    def refuse(*args: Any, **kwargs: Any) -> None:
        for name, value in [*zip((a.name for a in op._schema.arguments), args), *kwargs.items()]:
            tensors = value if isinstance(value, list) else [value]
            if name != "after" and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
                raise RuntimeError(
                    f"{op.name()} is a raw kernel and not differentiable, but {name} requires a gradient: {instead}"
                )

    def autograd(*args: Any, **kwargs: Any) -> Any:
        # Runs on every eager call: names are looked up only where something requires a gradient.
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs):
            refuse(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args, **kwargs)

    _library.impl(op.name().removeprefix("magi::"), autograd, "Autograd")


def differentiate(op: torch._ops.OpOverload, backward: Callable, setup_context: Callable) -> None:
    """`torch.library.register_autograd` with a short way for calls that need no gradient, which is a host's most.

    `backward` and `setup_context` are as there. A call without gradients saves 6 us of 33 (a 2-core virtual machine).
    """
    kernel = op._op
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    positional = [a.name for a in op._schema.arguments if not a.kwarg_only]
    options = {a.name: a.default_value for a in op._schema.arguments if a.kwarg_only}

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *values: Any) -> Any:
            *args, given = values
            args += [defaults[name] for name in positional[len(args) :]]  # the dispatcher leaves defaults out
            with torch._C._AutoDispatchBelowAutograd():
                output = kernel(*args, **given)
            keywords = {"keyword_only_inputs": {**options, **given}} if options else {}
            setup_context(ctx=ctx, inputs=tuple(args), output=output, **keywords)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return *backward(ctx, *gradients), None

    def autograd(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Differentiable.apply(*args, kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return kernel(*args, **kwargs)

    _library.impl(op.name().removeprefix("magi::"), autograd, "Autograd")


# ---------------------------------------------------------------- ffa


def _ffa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    k_ranges: Tensor,
    attn_type_map: Tensor,
    *,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    slices = _ops.band_slices(q_ranges, k_ranges, attn_type_map)
    return _ops.ffa.slices(
        q,
        k,
        v,
        slices,
        sink,
        softmax_scale=softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
    )


# ffa on typed slices IS ffa.slices on their bands: it differentiates, traces and shards through that one.
_library.impl("ffa", _ffa, "CompositeImplicitAutograd")


@torch.library.register_fake("magi::band_slices")
def _(q_ranges, k_ranges, attn_type_map):
    return q_ranges.new_empty((q_ranges.shape[0], 6))


def _forward_fake(q: Tensor, v: Tensor, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return (
        q.new_empty((tokens, heads, v.shape[2]), dtype=out_dtype),
        q.new_empty((tokens, heads), dtype=accumulation_dtype(q.dtype)),
    )


@torch.library.register_fake("magi::ffa.slices")
def _(q, k, v, slices, sink=None, *, softmax_scale=None, softcap=0.0, deterministic=False, sm_margin=0):
    return _forward_fake(q, v)


@torch.library.register_fake("magi::ffa_max_logits")
def _(q, k, v, slices, sink=None, *, softmax_scale=None, softcap=0.0, deterministic=False, sm_margin=0):
    return *_forward_fake(q, v), q.new_empty(q.shape[1], dtype=accumulation_dtype(q.dtype))


def _ffa_fwd_fake(
    q,
    k,
    v,
    slices,
    *,
    sink=None,
    out_prev=None,
    lse_prev=None,
    softmax_scale,
    softcap=0.0,
    sm_margin=0,
    out_dtype=None,
    after=None,
):
    return _forward_fake(q, v, out_dtype)


torch.library.register_fake("magi::ffa_fwd")(_ffa_fwd_fake)


@torch.library.register_fake("magi::ffa_fwd_max_logits")
def _(q, *args, **kwargs):
    return *_ffa_fwd_fake(q, *args, **kwargs), q.new_empty(q.shape[1], dtype=accumulation_dtype(q.dtype))


@torch.library.register_fake("magi::ffa_bwd")
def _(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    slices,
    *,
    dq_prev=None,
    out=None,
    dlse=None,
    softmax_scale,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
    grad_dtype=None,
    after=None,
):
    return tuple(t.new_empty(t.shape, dtype=grad_dtype) for t in (q, k, v))


@torch.library.register_fake("magi::ffa_delta")
def _(dout, out, dlse=None):
    return out.new_empty(out.shape[:2], dtype=accumulation_dtype(out.dtype))


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of sink logits `[s_sink, heads]` from lse (sink included) and delta, both `[tokens, heads]`.

    A sink takes the share exp(sink - lse) of a row's softmax and gives it the value 0, so
    d_sink = -sum_rows exp(sink - lse) * delta.
    """
    share = torch.exp(sink[:, None] - lse)  # [s_sink, tokens, heads]
    # A sink of -inf has no share, and a row whose lse is -inf has no sink: both exponents are -inf - (-inf).
    return -(torch.nan_to_num(share, nan=0.0, posinf=0.0) * delta).sum(1)


def _ffa_setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    q, k, v, slices, sink = inputs
    out, lse, *rest = output
    ctx.mark_non_differentiable(*rest)  # max_logits
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, slices, sink, out, lse)
    ctx.options = keyword_only_inputs


def _ffa_backward(ctx, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None):
    q, k, v, slices, sink, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None, None
    dout = torch.zeros_like(out) if dout is None else dout
    options = dict(ctx.options)
    scale = options.pop("softmax_scale")
    options["softmax_scale"] = q.shape[2] ** -0.5 if scale is None else scale
    if sink is not None and ctx.needs_input_grad[4]:
        delta = _ops.ffa_delta(dout, out, dlse)
        dsink = sink_gradient(sink, lse, delta)
        dq, dk, dv = _ops.ffa_bwd(dout, q, k, v, lse, delta, slices, **options)
    else:
        dsink = None
        dq, dk, dv = _ops.ffa_bwd(dout, q, k, v, lse, None, slices, out=out, dlse=dlse, **options)
    return dq, dk, dv, None, dsink


for _op in (_ops.ffa.slices, _ops.ffa_max_logits.default):
    differentiate(_op, _ffa_backward, _ffa_setup_context)

for _op in (_ops.ffa_fwd.default, _ops.ffa_fwd_max_logits.default, _ops.ffa_bwd.default, _ops.ffa_delta.default):
    raise_if_grad(_op, "call torch.ops.magi.ffa or magi_attention.attend, or detach it")


def area_of(q: Tensor, k: Tensor, slices: Tensor) -> int:
    """Allowed cells: from the slices where their values can be read, else every cell (while tracing)."""
    if isinstance(slices, torch._subclasses.FakeTensor) or slices.is_meta:
        return q.shape[0] * k.shape[0]
    return int(slice_areas(slices).sum())


def _forward_flops(q, k, v, slices, *args, out_val=None, **kwargs) -> int:
    return 2 * area_of(q, k, slices) * q.shape[1] * (q.shape[2] + v.shape[2])


def _backward_flops(dout, q, k, v, lse, delta, slices, *args, out_val=None, **kwargs) -> int:
    # Five products: S and dP again, then dV, dQ and dK.
    return 2 * area_of(q, k, slices) * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])


register_flop_formula([_ops.ffa, _ops.ffa_fwd, _ops.ffa_max_logits, _ops.ffa_fwd_max_logits], get_raw=True)(
    _forward_flops
)
register_flop_formula(_ops.ffa_bwd, get_raw=True)(_backward_flops)


# ---------------------------------------------------------------- rows


@torch.library.register_fake("magi::range_gather")
def _(x, ranges, total):
    return x.new_empty((total, *x.shape[1:]))


@torch.library.register_fake("magi::range_scatter_reduce")
def _(y, ranges, rows, op="sum"):
    return y.new_empty((rows, *y.shape[1:]))


def _gather_setup_context(ctx, inputs, output) -> None:
    x, ranges, _ = inputs
    ctx.save_for_backward(ranges)
    ctx.rows = x.shape[0]


def _gather_backward(ctx, dy: Tensor):
    (ranges,) = ctx.saved_tensors
    return _ops.range_scatter_reduce(dy, ranges, ctx.rows), None, None


def _scatter_setup_context(ctx, inputs, output) -> None:
    y, ranges, _, ctx.op = inputs
    ctx.save_for_backward(ranges)
    ctx.total = y.shape[0]


def _scatter_backward(ctx, dx: Tensor):
    (ranges,) = ctx.saved_tensors
    if ctx.op == "mean":
        ones = dx.new_ones((ctx.total, 1), dtype=torch.float32)
        count = _ops.range_scatter_reduce(ones, ranges, dx.shape[0]).reshape(-1, *[1] * (dx.ndim - 1))
        dx = (dx / count.clamp(min=1)).to(dx.dtype)
    return _ops.range_gather(dx, ranges, ctx.total), None, None, None


differentiate(_ops.range_gather.default, _gather_backward, _gather_setup_context)
differentiate(_ops.range_scatter_reduce.default, _scatter_backward, _scatter_setup_context)


# ---------------------------------------------------------------- merging


@torch.library.register_fake("magi::merge_partials")
def _(out, lse, out_i, lse_i):
    return out.new_empty(out.shape), lse.new_empty(lse.shape)


def _merge_setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _merge_backward(ctx, dout: Tensor, dlse: Tensor):
    out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors

    def partial(out_i: Tensor, lse_i: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.where(lse_i == float("-inf"), 0.0, torch.exp(lse_i - lse))
        moved = (dout.to(lse.dtype) * (out_i.to(lse.dtype) - out.to(lse.dtype))).sum(-1)
        return (share[..., None] * dout).to(out_i.dtype), share * (dlse + moved)

    return *partial(out_a, lse_a), *partial(out_b, lse_b)


differentiate(_ops.merge_partials.default, _merge_backward, _merge_setup_context)


# ---------------------------------------------------------------- one device


def flex_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    sink: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    return_max_logits: bool = False,
) -> tuple[Tensor, ...]:
    """Exact attention of q over k and v under `mask`, on one device.

    Args:
        q: queries `[mask.total_q, heads, head_dim]`, float16, bfloat16, float32 or float64; any strides with a
            contiguous last dimension are read in place. On CUDA float16 or bfloat16, head_dim and v_dim multiples of 8
            up to 256.
        k, v: keys `[mask.total_k, kv_heads, head_dim]` and values `[mask.total_k, kv_heads, v_dim]`, same dtype;
            `heads` is a multiple of `kv_heads`.
        mask: which cells are allowed. Rows that it leaves without keys give out 0, lse -inf and zero gradients.
        sink: natural-log logits `[s_sink, heads]` that join each row's softmax with the value 0; float32 (float64 for
            float64 q).
        softmax_scale: factor on q k^T, `head_dim ** -0.5` by default.
        softcap: c > 0 replaces each scaled score s by c tanh(s / c); 0 leaves it.
        deterministic: gradients that are bitwise equal from run to run (outputs always are).
        return_max_logits: also find the largest logit of each head; on CUDA this takes a slower kernel.

    Returns:
        out `[mask.total_q, heads, v_dim]` in the dtype of q, and lse `[mask.total_q, heads]`, the natural log of the
        softmax denominator (sink included), float32 (float64 for float64 q). Gradients flow through both. On request
        also max_logits `[heads]` in the dtype of lse, the largest scaled and capped score of an allowed cell (sinks are
        none), -inf where there is no cell; not differentiable.

    Raises:
        ValueError: q, k or v do not have the mask's lengths.
        RuntimeError: any other disagreement of shapes, dtypes or devices; the message names the argument.

    Example:
        >>> q, k, v = (torch.randn(4096, h, 64) for h in (8, 2, 2))
        >>> out, lse = flex_attend(q, k, v, Mask.varlen([0, 1000, 4096], window=(255, 0)))
    """
    for name, tensor, total in (("q", q, mask.total_q), ("k", k, mask.total_k), ("v", v, mask.total_k)):
        if tensor.shape[0] != total:
            raise ValueError(f"{name} must have the mask's {total} rows, got shape {list(tensor.shape)}")
    return (_ops.ffa_max_logits.default if return_max_logits else _ops.ffa.slices)(
        q,
        k,
        v,
        mask.slices.to(q.device),
        sink,
        softmax_scale=softmax_scale,
        softcap=softcap,
        deterministic=deterministic,
    )
