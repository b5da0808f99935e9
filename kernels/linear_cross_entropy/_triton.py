"""Linear layer and cross-entropy by chunks of rows: the logits (M, V) never exist as a whole.

    x    = hidden W^T + bias                       one chunk of C rows, fp32
    loss, p                                        kernels/core/logits.py
    dx   = round(dx_exact)                         hidden's dtype, for the matrix units
    rest = dx_exact[m, label[m]] - dx[m, label[m]]
    dh   = dx W + rest * W[label]                  fp32
    dW   = dx^T hidden,  dW[label[m]] += rest[m] * hidden[m]      fp32, over all chunks
    db   = sum_m(dx),    db[label[m]] += rest[m]

Shapes   M rows, K features, V classes.  hidden: (..., K).  weight: (V, K).  bias: (V,).
Rounding logits stay in fp32.  dx is rounded for the matrix product, and what that takes from its
         largest element is put back.  Gradients are kept in fp32 and rounded once, when the
         arriving gradient is known.
Chunks   of C rows: as many as keep a chunk's buffers within the fp32 gradient of the weight
         (6CV <= 4VK bytes), at least 1024 and at most 4096; every chunk reads and writes that
         gradient once, so fewer rows would leave the matrix units waiting for memory.
Memory   M*K*4 for dh, V*K*4 for dW, C*V*4 for logits and, below fp32, C*V*2 for dx and C*K*6 for
         what is put back; with a frozen weight only dh and the chunk, without gradients C*V*4.
Traffic  a chunk's logits are written once and read twice (with a bias, read and written once more),
         dx is written once and read twice.
Order    chunks take their turns; products are cuBLAS's, sums over rows of one label torch's
         index_put_ (sorted, no atomics on CUDA): reruns are bit-equal.
Source   Hsu et al. 2024, arXiv:2410.10989 (Liger), whose chunks are smaller, whose dW is summed in
         hidden's dtype and whose host waits for the number of labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from swathe.kernels.core.logits import write_gradients, write_losses
from swathe.kernels.core.losses import empty_losses

LEAST_ROWS, MOST_ROWS, STEP = 1024, 4096, 256
# fp16 rounds dx below 2^-14 to few digits: there it is made larger, its products smaller again
GAIN = {torch.float16: 256.0}
Numbers = tuple[int, float, float, float, float]
Needs = tuple[bool, bool, bool]


def rows_a_chunk(K: int, asked: int) -> int:
    """Rows of a chunk for K features; `asked` of 0 leaves it to the rule above."""
    return asked or min(max(2 * K // 3 // STEP * STEP, LEAST_ROWS), MOST_ROWS)


def widens(a: Tensor) -> bool:
    """Whether torch multiplies two matrices like `a` into fp32 at once: on CUDA and ROCm."""
    return a.device.type in ("cuda", "meta") and a.dtype != torch.float32


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, in fp32."""
    if widens(a):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def multiply_add(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a b, in fp32."""
    if widens(a):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


class _Chunks:
    """The rows of one call by chunks, and the buffers that the chunks share."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: int
    ) -> None:
        V, K = weight.shape
        self.hidden, self.labels = hidden.reshape(-1, K), labels.reshape(-1)
        self.weight, self.bias = weight, bias
        self.rows = min(rows_a_chunk(K, rows), self.labels.numel())
        self.logits = torch.empty(self.rows, V, dtype=torch.float32, device=hidden.device)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.labels.numel(), max(self.rows, 1)):
            at = slice(start, min(start + self.rows, self.labels.numel()))
            logits = self.logits[: at.stop - start]
            multiply(self.hidden[at], self.weight.t(), logits)
            if self.bias is not None:
                logits.add_(self.bias)
            yield at, logits


class _Gradients:
    """fp32 sums of the gradients that are needed, chunk by chunk."""

    def __init__(self, chunks: _Chunks, needs: Needs) -> None:
        self.chunks, (V, K) = chunks, chunks.weight.shape
        M, dtype, device = chunks.labels.numel(), chunks.hidden.dtype, chunks.hidden.device
        sizes = ((M, K), (V, K), (V,))
        self.needs = needs
        self.dh, self.dw, self.db = (
            torch.empty(size if need else (0,), dtype=torch.float32, device=device)
            for size, need in zip(sizes, needs, strict=True)
        )
        self.narrow = None
        if dtype != torch.float32:
            self.narrow = torch.empty(chunks.rows, V, dtype=dtype, device=device)
            self.rest = torch.empty(chunks.rows, dtype=torch.float32, device=device)
        if M == 0:
            self.dw.zero_()
            self.db.zero_()

    def add(
        self,
        at: slice,
        logits: Tensor,
        arriving: Tensor,
        saved: tuple[Tensor, Tensor],
        numbers: Numbers,
    ) -> None:
        """Add the gradients of one chunk, whose logits are overwritten."""
        labels, n = self.chunks.labels[at], at.stop - at.start
        dx, rest = logits, None
        if self.narrow is not None:
            dx, rest = self.narrow[:n], self.rest[:n]
        write_gradients(arriving, logits, labels, saved, numbers, dx, rest)
        need_hidden, need_weight, need_bias = self.needs
        hidden = self.chunks.hidden[at]
        if need_hidden:
            multiply(dx, self.chunks.weight, self.dh[at])
        if need_weight:
            (multiply if at.start == 0 else multiply_add)(dx.t(), hidden, self.dw)
        if need_bias and at.start == 0:
            torch.sum(dx, 0, dtype=torch.float32, out=self.db)
        elif need_bias:
            self.db.add_(dx.sum(0, dtype=torch.float32))
        if rest is not None:
            self._put_back(at, labels, rest, hidden)

    def _put_back(self, at: slice, labels: Tensor, rest: Tensor, hidden: Tensor) -> None:
        V = self.chunks.weight.shape[0]
        # rows without a label have a rest of 0, which goes anywhere, but not all to one place
        anywhere = torch.arange(labels.numel(), device=labels.device) % V
        index = torch.where((labels >= 0) & (labels < V), labels.long(), anywhere)
        need_hidden, need_weight, need_bias = self.needs
        column = rest[:, None]
        if need_hidden:
            self.dh[at].addcmul_(column, self.chunks.weight.index_select(0, index).float())
        if need_weight:
            self.dw.index_put_((index,), column * hidden, accumulate=True)
        if need_bias:
            self.db.index_put_((index,), rest, accumulate=True)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, peak and log_sum of every row, in labels' shape."""
    found = empty_losses(hidden, labels)
    flat = tuple(t.view(-1) for t in found)
    numbers = (ignore_index, smoothing, softcap, scale, z_loss)
    with _plain(hidden):
        chunks = _Chunks(hidden, weight, bias, labels, chunk_rows)
        for at, logits in chunks:
            losses, peak, log_sum = (t[at] for t in flat)
            write_losses(logits, chunks.labels[at], numbers, losses, peak, log_sum)
    return found


def forward_total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
    chunk_rows: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of all losses and its gradients in fp32; those that are not needed are empty."""
    losses, peak, log_sum = (t.view(-1) for t in empty_losses(hidden, labels))
    numbers = (ignore_index, smoothing, softcap, scale, z_loss)
    one = torch.full((), _gain(hidden.dtype), dtype=torch.float32, device=hidden.device)
    with _plain(hidden):
        chunks = _Chunks(hidden, weight, bias, labels, chunk_rows)
        gradients = _Gradients(chunks, needs)
        for at, logits in chunks:
            saved = peak[at], log_sum[at]
            write_losses(logits, chunks.labels[at], numbers, losses[at], *saved)
            gradients.add(at, logits, one, saved, numbers)
    dh = gradients.dh.view(hidden.shape) if needs[0] else gradients.dh
    return losses.sum(), dh, gradients.dw, gradients.db


def backward_total(
    arriving: Tensor,
    dh: Tensor,
    dw: Tensor,
    db: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients times the one that arrives, rounded once to the dtype of their inputs.

    Of the inputs only that dtype is used; a second derivative meets them and raises.
    """
    dtype = hidden.dtype
    with _plain(hidden):
        factor = arriving / _gain(dtype)
        return _rounded(factor, dh, dtype), _rounded(factor, dw, dtype), _rounded(factor, db, dtype)


def backward(
    arriving: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    smoothing: float,
    softcap: float,
    scale: float,
    z_loss: float,
    chunk_rows: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients where one arrives for each row: the logits are multiplied out once more."""
    numbers = (ignore_index, smoothing, softcap, scale, z_loss)
    arriving = arriving.reshape(-1)
    # a loss divided by its tokens would push dx below what fp16 can hold
    top = arriving.abs().amax() if arriving.numel() else arriving.new_ones(())
    top = torch.where((top > 0) & top.isfinite(), top, 1.0)
    weights = arriving / top * _gain(hidden.dtype)
    with _plain(hidden):
        chunks = _Chunks(hidden, weight, bias, labels, chunk_rows)
        gradients = _Gradients(chunks, needs)
        for at, logits in chunks:
            saved = peak.view(-1)[at], log_sum.view(-1)[at]
            gradients.add(at, logits, weights[at], saved, numbers)
    dh = gradients.dh.view(hidden.shape) if needs[0] else gradients.dh
    return backward_total(top, dh, gradients.dw, gradients.db, hidden, weight, bias)


@contextmanager
def _plain(x: Tensor) -> Iterator[None]:
    # a graph may call an operator with gradients on or under autocast: not what its products want
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def _gain(dtype: torch.dtype) -> float:
    return GAIN.get(dtype, 1.0)


def _rounded(factor: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)
