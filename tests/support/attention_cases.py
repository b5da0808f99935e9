"""Numbered calls of attention over all its features: drawn ones, and those of peers' test suites.

    calls()              the whole list, the same on every machine
    smaller(call)        the call as an interpreter can afford it
    problem(call, seed)  its tensors

Rule of `smaller`: the shorter of T and S loses whole tiles (of `_tile` rows) from both until it is
at most a tile and a quarter, then the longer loses whole tiles until the difference is at most
that. So remainders, S - T's sign and equality stay. Two sequences at most, one where a pair of
tiles is full; at most two key heads, one where there are groups, of at most three query heads.
Pages shrink to 16 keys; windows and chunks wider than the keys take a remainder.
A GPU runs every call whole.
"""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from support.attention_tables import TABLES
from swathe.kernels.attention.contract import Drawn
from swathe.kernels.core.contract import Problem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Call(NamedTuple):
    """One call; `parts` are tensors of a mask or of scores: keys of _PARTS, and others below.

    documents: into how many the rows are packed. page: keys of a page, 0 for a cache in one piece.
    layout: how q, k and v lie in memory. amplitude: of the scores. backward: with gradients.
    """

    source: str
    B: int
    H: int
    K: int
    T: int
    S: int
    D: int
    E: int
    dtype: torch.dtype
    causal: bool = False
    window: int | None = None
    ahead: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    parts: tuple[str, ...] = ()
    documents: int = 0
    page: int = 0
    layout: str = "tokens outside"
    amplitude: float = 1.0
    backward: bool = True

    def __str__(self) -> str:
        source, *sizes = self[:8]
        dims = " ".join(f"{n}{size}" for n, size in zip("BHKTSDE", sizes, strict=True))
        options = zip(self._fields[9:], self[9:], strict=True)
        return f"{source}: {dims} {' '.join(f'{n}={v}' for n, v in options if v)}"


_LENGTHS = (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 47, 63, 64, 65, 70, 97, 127, 128, 129, 140)
_HEADS = ((1, 1), (2, 2), (2, 1), (4, 2), (3, 1), (4, 1), (6, 2))
_DIMS = (16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256)
_LAYOUTS = ("tokens outside", "heads outside", "one projection", "odd offset", "batch inside")


def drawn(number: int) -> Call:
    """Any features that go together."""
    draw = Random(f"attention {number}")

    def maybe(chance: float, value: Any, otherwise: Any = None) -> Any:
        return value if draw.random() < chance else otherwise

    H, K = draw.choice(_HEADS)
    T, S = draw.choice(_LENGTHS), draw.choice(_LENGTHS)
    S = maybe(0.4, T, S)
    D = draw.choice(_DIMS) if draw.random() < 0.85 else draw.randint(1, 256)
    E = maybe(0.85, D, draw.choice(_DIMS))
    D, E = maybe(0.04, (192, 128), (D, E))
    kind = draw.choice(("whole", "whole", "whole", "documents", "cache", "pages"))
    causal = draw.random() < 0.6
    parts = [name for name in ("keys", "allowed") if draw.random() < 0.12]
    parts += [name for name in ("sinks", "alibi") if draw.random() < 0.2]
    if draw.random() < 0.3:
        parts.append(draw.choice(BIASES))
    if kind == "whole":
        parts += [name for name in ("start", "end") if draw.random() < 0.2]
    if causal and kind == "whole" and draw.random() < 0.15:
        parts.append("prefix")
    if kind in ("cache", "pages"):
        parts.append("seq_lens")
    return Call(
        f"drawn {kind}",
        *(1 if kind == "documents" else draw.choice((1, 1, 2, 3)), H, K, T, S, D, E),
        DTYPES[number % 3],
        causal,
        window=maybe(0.25, draw.randint(1, 70)),
        ahead=None if causal else maybe(0.2, draw.randint(0, 50)),
        chunk=maybe(0.1, draw.randint(1, 50)),
        softcap=maybe(0.2, draw.choice((2.0, 15.0, 50.0))),
        parts=tuple(parts),
        documents=draw.randint(1, 5) if kind == "documents" else 0,
        page=draw.choice((16, 32, 64, 48)) if kind == "pages" else 0,
        layout=draw.choice(_LAYOUTS),
        amplitude=draw.choice((0.3, 1.0, 1.0, 1.0, 3.0)),
        backward=kind != "pages" and draw.random() < 0.85,
    )


def _tile(call: Call) -> int:
    wide = max(call.D, call.E)
    if call.dtype == torch.float32:
        return 64 if wide <= 128 else 32
    return 128 if wide <= 192 else 64


def smaller(call: Call) -> Call:
    """The call as the module's docstring says."""
    tile, T, S = _tile(call), call.T, call.S
    most = tile + tile // 4
    while min(T, S) > most:
        T, S = T - tile, S - tile
    while abs(T - S) > most:
        T, S = (T - tile, S) if T > S else (T, S - tile)
    B = min(call.B, 1 if tile * tile // 4 < T * S else 2)
    groups = call.H // call.K
    K = min(call.K, 2 if groups == 1 else 1)
    spans = {
        name: span if span is None or span <= S else 1 + span % max(S, 1)
        for name, span in (("window", call.window), ("ahead", call.ahead), ("chunk", call.chunk))
    }
    page = min(call.page, 16)
    return call._replace(B=B, H=K * min(groups, 3), K=K, T=T, S=S, page=page, **spans)


BIASES = ("bias", "bias of heads", "bias of rows", "bias of keys", "bias with holes")


def _bias(drawn: Drawn, name: str, B: int, H: int, T: int, S: int) -> Tensor:
    sizes = {
        "bias of heads": (1, H, T, S),
        "bias of rows": (B, 1, T, S),
        "bias of keys": (B, H, 1, S),
    }
    bias = drawn.normal(*sizes.get(name, (B, H, T, S)))
    if name == "bias with holes":
        bias = bias.masked_fill(drawn.share(0.3, B, H, T, S), -torch.inf)
    return bias.to(drawn.dtype)


def laid(t: Tensor, layout: str) -> Tensor:
    """The same numbers (B, heads, rows, features), otherwise in memory."""
    if layout == "heads outside":
        return t.contiguous()
    if layout == "one projection":
        return torch.cat((t, t, t), -1)[..., t.shape[3] : 2 * t.shape[3]]
    if layout == "odd offset":
        return torch.cat((t[..., :1], t), -1)[..., 1:]
    if layout == "batch inside":
        return t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    return t


def problem(call: Call, seed: int, device: str) -> Problem:
    """The tensors of a call."""
    drawn = Drawn(torch.Generator(device).manual_seed(seed), call.dtype, device)
    if call.page:  # whole pages
        call = call._replace(S=-(-call.S // call.page) * call.page)
    B, H, K, T, S, D, E = call[1:8]
    q = drawn.heads(B, H, T, D) * call.amplitude
    inputs = {"q": q, "k": drawn.heads(B, K, S, D), "v": drawn.heads(B, K, S, E)}
    inputs = {name: laid(t, call.layout) for name, t in inputs.items()}
    options = {n: getattr(call, n) for n in ("causal", "window", "ahead", "chunk", "softcap")}
    for name in call.parts:
        if name in BIASES:
            inputs["bias"] = _bias(drawn, name, B, H, T, S)
        elif name == "sinks":
            inputs["sinks"] = drawn.normal(H)
        else:
            options[name.removesuffix(" of sequences")] = _part(drawn, name, call)
    if call.documents:
        rows = drawn.borders(T, call.documents)
        whole = T == S and seed % 2 == 0
        options["cu_seqlens"] = rows if whole else (rows, drawn.borders(S, call.documents))
    if call.page:
        inputs["k"], inputs["v"], options["block_table"] = _paged(drawn, inputs, call)
    arriving = {"o": drawn.normal(B, T, H, E).to(call.dtype), "lse": drawn.normal(B, H, T)}
    return Problem(inputs, arriving, options, str(call))


def _part(drawn: Drawn, name: str, call: Call) -> Tensor:
    B, H, T, S = call.B, call.H, call.T, call.S

    def whole(low: int, high: int) -> Tensor:
        numbers = torch.rand(B, generator=drawn.generator, device=drawn.device)
        return low + (numbers * (high - low + 1)).int().clamp(max=high - low)

    if name == "start":
        return whole(0, S // 2)
    if name == "end":
        return whole(0, S)
    if name == "seq_lens":
        return whole(min(T, S // 2), S)
    if name == "prefix":
        return whole(0, S)
    if name == "keys":
        return drawn.share(0.7, B, S)
    if name == "allowed":
        return drawn.share(0.7, 1 if T % 2 else B, H if S % 2 else 1, T, S)
    if name == "alibi of sequences":
        return 0.3 * torch.rand(B, H, generator=drawn.generator, device=drawn.device)
    assert name == "alibi", name
    return 2.0 ** -torch.arange(2.0, 2 + H, device=drawn.device)


def _paged(drawn: Drawn, inputs: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in pages in a drawn order, two of them NaN, which nobody names."""
    B, each = call.B, call.S // call.page
    order = torch.randperm(B * each + 2, generator=drawn.generator, device=drawn.device)
    table = order[: B * each].view(B, each)
    caches = []
    for t in (inputs["k"], inputs["v"]):
        pages = t.unflatten(2, (each, call.page)).transpose(1, 2).flatten(0, 1)
        cache = t.new_full((len(order), *pages.shape[1:]), torch.nan)
        cache[table.view(-1)] = pages
        caches.append(cache)
    return caches[0], caches[1], table.int()


def of_peers() -> list[Call]:
    """A call for each head size and pair of lengths of each table, its other columns drawn."""
    found = []
    for table in TABLES:
        for index, ((D, E), (T, S)) in enumerate(product(table.dims, table.lengths)):
            draw = Random(f"{table.source} {index}")
            heads, given = draw.choice(table.heads), dict(draw.choice(table.variants))
            if given.pop("local", False):
                given |= {"window": 1 + draw.randrange(S), "ahead": draw.randrange(S)}
            if given.pop("chunked", False):
                given["chunk"] = 1 + draw.randrange(2 * S)
            if given.get("causal"):
                given["ahead"] = None
            found.append(Call(table.source, *heads, T, S, D, E, draw.choice(table.dtypes), **given))
    return found


def calls() -> list[Call]:
    """Every call, in an order in which any even spacing meets all kinds."""
    found = [drawn(number) for number in range(1200)] + of_peers()
    Random("order").shuffle(found)
    return found
