"""Attention as torch sees it: schemas, fakes, and the autograd node around a backend's launchers.

A backend file offers `forward`, `backward`, `backward_bias` and `decode`; `fused(name, module)`
turns them into one differentiable function of (q, k, v, spec). Nothing here imports a backend
before its first call.

Saved     q, k, v, o, lse2, and what the mask and the scores are made of. lse2 is lse / log(2): the
          unit in which kernels work, so that nothing is rounded between forward and backward.
Autograd  first order only. Gradients for q, k, v, sinks and the bias, and through lse; slopes of
          ALiBi that require one are served by "eager". Caches in pages have none.
Stats     what the backward finds of rows and hands on: (B, H, 2, T rounded up to 128) fp32, lse2
          (inf where a row sees nothing) and delta.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swathe.kernels.attention.spec import AttentionSpec
from swathe.kernels.core.op import (
    Op,
    any_batched,
    apply,
    differentiating,
    gradient,
    operator,
    wants_gradient,
)
from swathe.kernels.core.rows import empty_as

_ROWS = (
    "Tensor first, Tensor last, Tensor? places, Tensor? keys, Tensor? allowed, Tensor? bias,"
    " Tensor? sinks, Tensor? alibi"
)
_NUMBERS = "Tensor? seed, float scale, float softcap, float dropout, bool padded"
_BIAS, _SINKS, _ALIBI = 5, 6, 7  # where they stand among _ROWS
DECODED = 64  # queries a call that the kernel for caches takes; more are a prefill
_ROUND = 128
_defined: set[str] = set()


def empty_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised o (B, T, H, E) and lse2 (B, H, T) in fp32."""
    B, H, T, _ = q.shape
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    return torch.empty(B, T, H, v.shape[3], dtype=q.dtype, device=q.device), lse


def empty_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dq, dk, dv, dense in the order of their inputs' memory, and Stats."""
    B, H, T, _ = q.shape
    span = (T + _ROUND - 1) // _ROUND * _ROUND
    stats = torch.empty(B, H, 2, span, dtype=torch.float32, device=q.device)
    return empty_as(q), empty_as(k), empty_as(v), stats


def strides_of(t: Tensor | None) -> tuple[int, ...]:
    """Strides of a mask or bias with as many dimensions, 0 where it is broadcast; None has four."""
    if t is None:
        return 0, 0, 0, 0
    return tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))


def _empty_bias(do: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, *rows: Any) -> Tensor:
    return torch.empty_like(rows[_BIAS], memory_format=torch.contiguous_format)


def fused(backend: str, module: str) -> Callable[..., Any]:
    """A differentiable attention over the launchers of `module`, named `backend` in traces."""
    _define(backend, module)
    forward, decode = operator(f"attention_fwd.{backend}"), operator(f"attention_decode.{backend}")

    def attention(
        q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec
    ) -> Tensor | tuple[Tensor, Tensor]:
        if wants_gradient(spec.alibi):
            raise ValueError(
                f"attention: alibi requires a gradient, which {backend!r} does not provide; detach "
                "it or choose implementation='eager'"
            )
        mask, T = spec.mask, q.shape[2]
        first, last = mask.bounds_int32(T, spec.keys_of(k), q.device)
        places = None if mask.places is None else mask.places.int().contiguous()
        sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
        alibi = None if spec.alibi is None else spec.alibi.float().contiguous()
        rows = (first, last, places, mask.keys, mask.allowed, mask.bias, sinks, alibi)
        scale, softcap = float(spec.scale), float(spec.softcap or 0.0)
        learns = differentiating(q, k, v, sinks, mask.bias)
        if spec.block_table is not None:
            if learns:
                raise ValueError(
                    "attention: a cache in pages (block_table) has no gradient; call it under "
                    "torch.no_grad(), or pass k and v whole"
                )
            found = decode(q, k, v, *rows, spec.block_table, scale, softcap)
        elif not learns and not spec.dropout and T <= DECODED and k.shape[2] > T:
            found = decode(q, k, v, *rows, None, scale, softcap)
        else:
            seed = torch.randint(2**62, (1,), device=q.device) if spec.dropout else None
            numbers = (seed, scale, softcap, float(spec.dropout), mask.padded)
            if learns:
                found = apply(_Attention, q, k, v, *rows, *numbers, backend)
            else:
                found = forward(q, k, v, *rows, *numbers)
        # numbers in place: dynamo takes a global float for an input
        return (found[0], found[1] * 0.6931471805599453) if spec.lse else found[0]

    return attention


def _define(backend: str, module: str) -> None:
    if backend in _defined:
        return
    _defined.add(backend)
    heads, out = "Tensor q, Tensor k, Tensor v", "(Tensor o, Tensor lse)"
    Op(
        f"attention_fwd({heads}, {_ROWS}, {_NUMBERS}) -> {out}",
        backend,
        module,
        "forward",
        empty_forward,
    )
    Op(
        f"attention_decode({heads}, {_ROWS}, Tensor? block_table, float scale, float softcap)"
        f" -> {out}",
        backend,
        module,
        "decode",
        empty_forward,
    )
    Op(
        f"attention_bwd(Tensor do, Tensor? dlse, {heads}, Tensor o, Tensor lse, {_ROWS},"
        f" {_NUMBERS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor stats)",
        backend,
        module,
        "backward",
        empty_backward,
    )
    Op(
        f"attention_bias_bwd(Tensor do, {heads}, Tensor stats, {_ROWS}, {_NUMBERS}) -> Tensor",
        backend,
        module,
        "backward_bias",
        _empty_bias,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *rows, backend = rest
        return operator(f"attention_fwd.{backend}")(q, k, v, *rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, scale, softcap, dropout, padded, ctx.backend = inputs
        ctx.numbers = (scale, softcap, dropout, padded)
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, *rows, o, lse = ctx.saved_tensors
        sinks, T = rows[_SINKS], q.shape[2]
        o_is_used = do is not None
        do = do if o_is_used else torch.zeros_like(o)
        dlse = None if dlse is None else dlse.contiguous()
        rest = (*rows, *ctx.numbers)
        dq, dk, dv, stats = gradient(
            f"attention_bwd.{ctx.backend}", do, dlse, q, k, v, o, lse, *rest
        )
        # lse does not depend on v: zeros would pass for a gradient
        dv = dv if o_is_used else None
        found: list[Tensor | None] = [dq, dk, dv, *[None] * (len(rows) + len(ctx.numbers) + 1)]
        if ctx.needs_input_grad[3 + _BIAS]:
            name = f"attention_bias_bwd.{ctx.backend}"
            found[3 + _BIAS] = gradient(name, do, q, k, v, stats, *rest)
        if sinks is not None and ctx.needs_input_grad[3 + _SINKS]:
            # the sink is a key whose value is 0 and whose logit nothing scales
            away = (sinks[:, None] * 1.4426950408889634 - lse) * 0.6931471805599453
            weight = torch.exp(away)
            found[3 + _SINKS] = -(weight * stats[:, :, 1, :T]).sum((0, 2))
        return tuple(found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if any_batched(in_dims[3:]):
            raise NotImplementedError(
                "attention: vmap over masks, biases, slopes or sinks is not provided by fused "
                "backends; allowed: vmap over q, k and v. Use implementation='eager' for the others"
            )
        B, n = _rows_of(args[0], in_dims[0]), info.batch_size
        # every sample's sequences stand among those of the batch
        heads = [_among_batch(t, dim, n) for t, dim in zip(args[:3], in_dims[:3], strict=True)]
        per_sequence = (*range(3, 3 + _SINKS), 3 + _ALIBI)
        rest = [
            _repeated(a, B, n) if i in per_sequence else a for i, a in enumerate(args[3:], start=3)
        ]
        found = apply(_Attention, *heads, *rest)
        return tuple(t.unflatten(0, (n, B)) for t in found), (0, 0)


def _rows_of(t: Tensor, dim: int | None) -> int:
    return t.shape[0] if dim is None else t.movedim(dim, 0).shape[1]


def _among_batch(t: Tensor, dim: int | None, n: int) -> Tensor:
    t = t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def _repeated(t: Tensor | None, B: int, n: int) -> Tensor | None:
    """What belongs to each of B sequences, for n times as many; slopes (H,) belong to all."""
    if t is None or t.shape[0] == 1 or t.dim() == 1:
        return t
    assert t.shape[0] == B
    return t.repeat(n, *[1] * (t.dim() - 1))
