"""Attention under measurement: prefill, training and decode, beside everyone else's kernels.

Bound by matrix products but for decode, which reads the cache once. Forms are masks; a window or
packed documents are timed on few shapes, decode forward only, since nobody learns there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from bench import attention_checks, long_attention
from bench.contenders import PEER_ERRORS, library
from bench.huge import ends_differ
from bench.long_attention import whole
from bench.subject import Function, Peer, Subject, Variant, each_once
from swathe.kernels.attention import contract
from swathe.kernels.attention.api import Mask, attention, resolve_attention
from swathe.kernels.attention.contract import spec_of
from swathe.kernels.attention.shapes import GPU, MODELS, Shape
from swathe.kernels.core.contract import Outputs, Problem
from swathe.kernels.core.registry import Choice

FORMS = ("causal", "full", "window", "packed")
WINDOW = 1024
TIMED = {
    "full": ("heads_of_128", "heads_of_64", "gemma_2_9b_train"),
    "window": ("llama_8b_prefill_8k", "gemma_2_9b_train"),
    "packed": ("llama_8b_train", "llama_1b_train"),
}
# each has tiles of its own
HEADS = ((64, 64), (128, 128), (256, 256), (192, 128), (80, 80), (96, 96))
PROBES = {f"{D}/{E}": Shape(f"probe_{D}_{E}", 1, 4, 2, 160, 160, D, E) for D, E in HEADS}
# prefill by groups of 3 and 8 query heads, and decode from a cache of 4k
CPU = tuple(
    Shape(f"prefill_{T}_of_{D}_by_{H // K}", 1, H, K, T, T, D, D)
    for D in (64, 128)
    for H, K in ((9, 3), (8, 1))
    for T in (128, 512, 2048, 4096)
) + tuple(
    Shape(f"decode_4k_of_{D}_by_{H // K}", 1, H, K, 1, 4096, D, D)
    for D in (64, 128)
    for H, K in ((9, 3), (32, 4))
)
LARGE = (
    Shape("large_64", 1, 8, 8, 2048, 2048, 64, 64),
    Shape("large_256", 1, 4, 2, 1024, 1024, 256, 256),
    Shape("large_80", 2, 4, 4, 1024, 1024, 80, 80),
    Shape("large_128", 2, 8, 2, 1024, 1024, 128, 128),
)
SCORES = 24 << 30  # bytes that a peer may spend on scores
SCORES_ON_CPU = 512 << 20  # more would take minutes


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lse: bool = True,
    causal: bool = False,
    window: int | None = None,
    implementation: str | Choice = "auto",
    **options: Any,
) -> Any:
    """The contract's function; with lse=False, what is timed: o alone, as models ask for it."""
    if lse:
        given: Any = {"causal": causal, "window": window, "implementation": implementation}
        return contract.attend(q, k, v, **given, **options)
    mask = Mask(causal=causal, window=window, rows_may_be_empty=False) if window else None
    return attention(q, k, v, mask, causal=causal, implementation=implementation, **options)


def draw(shape: Shape, dtype: torch.dtype, form: str, device: str, seed: int) -> Problem:
    """A form's mask over normal q, k and v; "packed": the batch end to end, in 4 B documents."""
    options: dict[str, Any] = {"lse": False, "causal": form != "full"}
    if form == "window":
        options["window"] = max(1, min(WINDOW, shape.T // 4))
    elif form == "packed":
        documents, length = 4 * shape.B, shape.B * shape.T
        shape = shape._replace(B=1, T=length, S=length)
        generator = torch.Generator(device).manual_seed(seed)
        inner = torch.randint(length + 1, (documents - 1,), generator=generator, device=device)
        ends = inner.new_tensor([0, length])
        options["cu_seqlens"] = torch.cat((ends, inner)).sort().values.int()
    drawn = contract.random(shape, dtype, seed=seed, device=device)
    return replace(drawn, options=options, arriving={"o": drawn.arriving["o"]})


def _both(of: Callable[[Problem], Outputs], problem: Problem) -> Outputs:
    if "lse" not in problem.options:
        return of(problem)
    return {name: t for name, t in of(whole(problem)).items() if name != "lse"}


def gold(problem: Problem) -> Outputs:
    """The contract's; of what is timed, a tile at a time."""
    timed = "lse" in problem.options
    return long_attention.gold(problem) if timed else contract.CONTRACT.gold(problem)


CONTRACT = replace(
    contract.CONTRACT,
    function=attend,
    gold=gold,
    baseline=partial(_both, contract.CONTRACT.baseline),
    magnitudes=partial(_both, contract.CONTRACT.magnitudes),
)


def too_large(problem: Problem) -> str | None:
    """Why code that forms the scores does not take a problem."""
    (B, H, T, _), S = problem.inputs["q"].shape, problem.inputs["k"].shape[2]
    needed = 4 * 2 * B * H * T * S
    most = SCORES_ON_CPU if problem.inputs["q"].device.type == "cpu" else SCORES
    return f"its scores would take {needed / 2**30:.3g} GiB" if needed > most else None


def served(name: str, function: Function, problem: Problem) -> Function:
    """The function, tried once; NotImplementedError with the reason where it refuses."""
    try:
        with torch.no_grad():
            function(**problem.inputs, **problem.options)
    except PEER_ERRORS as error:
        first_line = str(error).partition("\n")[0]
        raise NotImplementedError(f"{name} does not serve this: {first_line[:200]}") from error
    return function


def sdpa(name: str, backend: SDPBackend | None, problem: Problem) -> Function:
    """torch's scaled_dot_product_attention, of its own choice or with its kernel pinned."""
    if backend is SDPBackend.MATH and (reason := too_large(problem)):
        raise NotImplementedError(f"{name}: {reason}")
    q, k, _ = problem.inputs.values()
    T, S, options = q.shape[2], k.shape[2], problem.options
    given: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]}
    if "window" in options or "cu_seqlens" in options:
        given["attn_mask"] = spec_of(whole(problem)).mask.visible(T, S, q.device)
    elif options["causal"] and T == S:
        given["is_causal"] = True
    elif options["causal"] and T > 1:
        given["attn_mask"] = causal_lower_right(T, S)

    def call(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **given).transpose(1, 2)

    return served(name, call, problem)


def flex(problem: Problem) -> Function:
    """FlexAttention, compiled, with a block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, _ = problem.inputs.values()
    T, S, options = q.shape[2], k.shape[2], problem.options
    shift, window, borders = S - T, options.get("window", S), options.get("cu_seqlens")

    def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t + shift) & (s > t + shift - window)

    def seen_in_document(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (document[t] == document[s]) & (s <= t)

    block = None
    if borders is not None:
        document = torch.searchsorted(borders, torch.arange(T, device=q.device), right=True)
        block = create_block_mask(seen_in_document, None, None, T, S, device=q.device)
    elif options["causal"] and T > 1:
        block = create_block_mask(seen, None, None, T, S, device=q.device)
    # fresh for every cell: after a few shapes it would go on uncompiled
    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    given = {"block_mask": block, "enable_gqa": q.shape[1] != k.shape[1]}

    def call(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return compiled(q, k, v, **given).transpose(1, 2)

    return served("flex", call, problem)


def flash(name: str, module: ModuleType, problem: Problem) -> Function:
    """Dao's flash-attention: its kernel for caches where keys are more, else the plain one."""
    q, k, _ = problem.inputs.values()
    options, given = problem.options, {"causal": problem.options["causal"]}
    if "window" in options:
        given["window_size"] = (options["window"] - 1, 0)
    borders = options.get("cu_seqlens")
    cached = q.shape[2] < k.shape[2]
    function = module.flash_attn_with_kvcache if cached else module.flash_attn_func
    if borders is not None:
        longest = int(borders.diff().max())
        function = partial(
            module.flash_attn_varlen_func,
            **{"cu_seqlens_q": borders, "cu_seqlens_k": borders},
            **{"max_seqlen_q": longest, "max_seqlen_k": longest},
        )

    def call(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        rows = rows if borders is None else [t[0] for t in rows]
        found = function(*rows, **given)
        found = found[0] if isinstance(found, tuple) else found
        return found if borders is None else found[None]

    return served(name, call, problem)


def varlen(module: ModuleType, problem: Problem) -> Function:
    """torch's own kernel for packed documents."""
    borders = problem.options.get("cu_seqlens")
    if borders is None:
        raise NotImplementedError("varlen is for packed documents")
    longest = int(borders.diff().max())

    def call(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        rows = [t[0].transpose(0, 1) for t in (q, k, v)]
        shared = {"window_size": (-1, 0), "enable_gqa": q.shape[1] != k.shape[1]}
        return module.varlen_attn(*rows, borders, borders, longest, longest, **shared)[None]

    return served("varlen", call, problem)


def peers(device: str) -> list[Peer]:
    """torch's choice, and on a GPU each of its kernels, FlexAttention and flash-attention."""
    own = Peer("sdpa", partial(sdpa, "sdpa", None))
    if device != "cuda":
        return [own]
    pinned = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    return [
        own,
        *(Peer(name, partial(sdpa, name, backend)) for name, backend in pinned.items()),
        Peer("flex", flex),
        library("varlen", "torch.nn.attention.varlen", varlen),
        library("flash_attn 2", "flash_attn", partial(flash, "flash_attn 2")),
        library("flash_attn 3", "flash_attn_interface", partial(flash, "flash_attn 3")),
    ]


def choose(problem: Problem, name: str) -> Choice:
    """As a layer chooses."""
    q, k, v = problem.inputs.values()
    size = max(q.shape[3], v.shape[3])
    return resolve_attention(q, size, name, groups=q.shape[1] // k.shape[1])


def left_out(name: str, problem: Problem) -> str | None:
    """Eager code and its compilation, where scores do not fit, or torch would cheat."""
    if name == "compile":
        return "torch.compile turns eager attention into sdpa, which is measured"
    return too_large(problem)


def timed(shape: Shape, variant: Variant) -> bool:
    """Causal everywhere, decode forward only, the other masks on a few shapes."""
    if shape.T != shape.S:
        return variant.form == "causal" and not variant.backward
    return (
        variant.form == "causal" or shape.name in TIMED[variant.form] or shape.name in _TINY_NAMES
    )


def huge(backend: str, device: str, dry: bool) -> str:
    """Past 2^31 elements: sequences at both ends are those of a small call."""
    small, large = (33, 4, 2, 5, 5, 16, 16), (2057, 32, 8, 256, 256, 128, 128)
    problem = draw(Shape("huge", *(small if dry else large)), torch.bfloat16, "full", device, 7)
    return "; ".join(ends_differ(CONTRACT, backend, problem, ("o", "dq", "dk", "dv"))[1]) or "ok"


TINY = (Shape("tiny", 2, 4, 2, 9, 9, 16, 16), Shape("tiny_odd", 1, 3, 1, 12, 12, 24, 8))
_TINY_NAMES = tuple(shape.name for shape in TINY)

SUBJECT = Subject(
    CONTRACT,
    draw,
    partial(attend, implementation="eager"),
    peers,
    choose,
    gpu=(*GPU[:3], *MODELS[3:5], *GPU[3:], *MODELS[:3], *MODELS[5:]),
    cpu=CPU,
    tiny=TINY,
    probes=PROBES,
    probed=lambda s: f"{s.D}/{s.E}" if (s.D, s.E) in HEADS else "80/80",
    traffic=each_once,
    flops=long_attention.flops,
    forms=FORMS,
    timed=timed,
    left_out=left_out,
    second_look=("llama_1b",),
    host=("llama_8b_decode_4k", "llama_1b"),
    checked={"tile": Shape("tile", 2, 8, 2, 350, 350, 128, 128)},
    large=LARGE,
    huge=huge,
    more={name: partial(check, CONTRACT) for name, check in attention_checks.CHECKS.items()},
)
