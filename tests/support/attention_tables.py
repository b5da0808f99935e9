"""What two public test suites run attention on, as tables: our choice of rows, none of their code.

Source   Dao-AILab/flash-attention, tests/test_flash_attn.py and hopper/test_flash_attn.py;
         pytorch/pytorch, test/inductor/test_flex_attention.py and test_flex_decoding.py.

Left out: fp8, rotation and appending of keys inside the kernel, heads of more than 256 features,
score functions of the user (squares, trigonometry). Dropout is tested where its weights are known.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Variant = dict[str, Any]


class Table(NamedTuple):
    """Every head size (D, E) on every pair of lengths (T, S); heads (B, H, K) and variants drawn.

    In a variant, local stands for a window to both sides and chunked for chunks, of drawn sizes.
    """

    source: str
    dims: list[tuple[int, int]]
    lengths: list[tuple[int, int]]
    heads: list[tuple[int, int, int]]
    variants: list[Variant]
    dtypes: tuple[torch.dtype, ...] = (BF16, FP16)


def _same(*sizes: int) -> list[tuple[int, int]]:
    return [(n, n) for n in sizes]


def _crossed(*variants: Variant, **by: tuple[Any, ...]) -> list[Variant]:
    """Every variant with every value of every named column."""
    found = list(variants) or [{}]
    for name, values in by.items():
        found = [{**v, name: value} for v in found for value in values]
    return found


def _times(n: int, lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Rows as long as n such sequences."""
    return [(n * T, n * S) for T, S in lengths]


_ALIBI = ((), ("alibi of sequences",))
_FA_DIMS = _same(32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
_FA_HEADS = [(4, 6, 6), (4, 6, 2), (4, 6, 1)]
_FA_OUTPUT = [(113, 203), (128, 217), (113, 211), (108, 256), (256, 512), (512, 256),
              (1024, 1024), (1023, 1024), (1024, 1023), (2048, 2048)]  # fmt: skip
_FA_CAUSAL = [(1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (128, 217), (113, 211),
              (108, 256), (256, 512), (1023, 1024)]  # fmt: skip
_FA_SPLIT = [(3, 1024), (1, 339), (64, 800), (3, 799), (64, 2048), (16, 20_000), (128, 128),
             (256, 256)]  # fmt: skip
_FA_CACHE = [(1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048),
             (16, 20_000), (128, 128)]  # fmt: skip
_FA_RACE = [(1, 239), (239, 1), (3, 799), (799, 3), (1024, 128),
            *_same(97, 128, 200, 256, 257, 384, 512, 768, 1024)]  # fmt: skip
_SCORES = [
    *_crossed(causal=(False, True), local=(False, True), parts=_ALIBI),
    *_crossed({"softcap": 50.0, "amplitude": 50.0}, causal=(False, True), local=(False, True)),
]
_CAUSAL = _crossed({"causal": True}, local=(False, True))
_CACHED = {"parts": ("seq_lens",), "backward": False}

FLASH_ATTENTION = [
    Table(
        "flash-attention packed qkv",
        _FA_DIMS,
        _same(97, 128, 200, 384, 768, 1024, 1025, 2048),
        [(4, 9, 9)],
        _crossed({"layout": "one projection"}, causal=(False, True), local=(False, True),
                 parts=_ALIBI),
    ),
    Table(
        "flash-attention packed qkv in documents",
        _same(32, 59, 64, 80, 96, 128, 160, 192, 224, 256),
        _times(2, _same(97, 128, 200, 257, 384, 512, 768, 1025, 2048)),
        [(1, 6, 6)],
        _crossed({"documents": 5}, causal=(False, True), local=(False, True), parts=_ALIBI),
    ),
    Table("flash-attention output", _same(32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256),
          _FA_OUTPUT, _FA_HEADS, _SCORES),
    Table(
        "flash-attention output of documents",
        _same(32, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256),
        _times(2, [(1, 147), *_FA_OUTPUT]),
        [(1, H, K) for _, H, K in _FA_HEADS],
        [{**v, "documents": 4} for v in _SCORES],
    ),
    Table("flash-attention causal", _FA_DIMS, _FA_CAUSAL, [(8, 9, 9)], _CAUSAL),
    Table("flash-attention causal, swapped", _FA_DIMS, [(S, T) for T, S in _FA_CAUSAL],
          [(8, 9, 9)], _CAUSAL),
    Table("flash-attention causal documents", _FA_DIMS, _times(2, _FA_CAUSAL), [(1, 9, 9)],
          [{**v, "documents": 4} for v in _CAUSAL]),
    Table(
        "flash-attention causal pages", _FA_DIMS, _FA_CAUSAL, [(8, 9, 9)],
        [{**v, **_CACHED, "page": page} for v in _CAUSAL for page in (256, 512)],
    ),
    Table("flash-attention splits", _FA_DIMS, _FA_SPLIT, [(1, 12, 12)],
          _crossed(causal=(False, True), local=(False, True), parts=_ALIBI,
                   backward=(False, True))),
    Table(
        "flash-attention cache", _same(32, 59, 64, 80, 128, 256), _FA_CACHE,
        [(2, 6, 6), (2, 6, 3), (2, 6, 1)],
        _crossed(_CACHED, causal=(False, True), local=(False, True), page=(0, 256)), (FP16,),
    ),
    Table("flash-attention races", _FA_DIMS, _FA_RACE, [(60, 4, 4)],
          _crossed(causal=(False, True)), (FP16,)),
    Table("flash-attention overflow", _same(16, 32, 64), _same(1, 2, 5, 17, 128), [(2, 5, 5)],
          _crossed({"amplitude": 15.0}, causal=(False, True)), (FP16,)),
    Table("flash-attention strides", _same(64, 128), _same(97, 128, 200, 256), [(5, 2, 2)],
          _crossed({"layout": "batch inside"}, causal=(False, True))),
    Table(
        "flash-attention 3",
        [(64, 64), (64, 256), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)],
        [(1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128),
         (128, 217), (113, 211), (108, 256), (256, 512), (384, 256), (640, 128), (512, 256),
         (1024, 1024), (1023, 1024), (1024, 1023), (4096, 4096), (4224, 4224)],
        [(2, 6, 6), (2, 6, 2), (2, 6, 1)],
        _crossed({}, {"softcap": 15.0, "amplitude": 3.75}, causal=(False, True),
                 local=(False, True), chunked=(False, True)),
    ),
    Table(
        "flash-attention 3 documents",
        [(64, 64), (128, 128), (192, 128), (256, 256)],
        _times(2, [(1, 1), (1, 3), (2, 1), (511, 1), (3, 513), (64, 128), (128, 128), (256, 256),
                   (113, 203), (307, 256), (640, 128), (512, 256), (1024, 1024), (2048, 2048)]),
        [(1, 6, 6), (1, 6, 2), (1, 6, 1)],
        _crossed({"documents": 4}, causal=(False, True), local=(False, True),
                 chunked=(False, True)),
    ),
]  # fmt: skip

_ALL = (BF16, FP16, FP32)
_MODS = [
    {},
    {"amplitude": 2.0},
    {"causal": True},
    {"ahead": 0, "window": 100_000},
    {"parts": ("alibi",)},
    {"causal": True, "parts": ("alibi",)},
    {"parts": ("allowed",)},
    {"causal": True, "parts": ("prefix",)},
    {"causal": True, "window": 33},
    {"causal": True, "parts": ("end",)},
    *({"parts": (name,)} for name in ("bias", "bias of heads", "bias of rows", "bias of keys")),
]
_PAGES = [{**v, "parts": (*v.get("parts", ()), "seq_lens"), "backward": False, "page": page}
          for v in _MODS[:6] for page in (64, 128, 256)]  # fmt: skip

FLEX_ATTENTION = [
    Table("flex_attention", _same(16, 64, 64, 64, 64), [(2048, 2048), (1024, 2048), (2047, 2047),
          (64, 64), (512, 512), (1023, 1023)], [(4, 8, 8), (4, 4, 2), (4, 4, 1)], _MODS, _ALL),
    Table("flex_attention of groups", _same(64, 64, 64), [(256, 2048)], [(4, 32, 8)], _MODS, _ALL),
    Table("flex_attention head sizes", [(64, 32), (32, 64), *_same(17, 24, 94, 121)],
          [(128, 128), (2048, 2048), (1, 2048)], [(4, 8, 8), (4, 16, 8)], _MODS, _ALL),
    Table("flex_attention documents", _same(64, 64, 64), [(2048, 2048)], [(1, 8, 8)],
          _crossed(causal=(False, True), documents=(3, 8)), _ALL),
    Table("flex_attention strides", _same(16, 64), [(128, 128), (1024, 2048)],
          [(4, 8, 8), (2, 1, 1)],
          _crossed({"parts": ("alibi",)}, layout=("odd offset", "batch inside", "heads outside")),
          _ALL),
    Table("flex_decoding", [(64, 64), (64, 64), (64, 32), (32, 64)],
          [(1, 2048), (3, 2045), (4, 1024), (8, 2048)],
          [(4, 16, 1), (4, 8, 2), (4, 16, 16), (4, 16, 8)],
          [{**v, "backward": False} for v in [*_MODS, {"causal": True, "window": 1000}]], _ALL),
    Table("flex_decoding pages", [(64, 64), (64, 32)], [(1, 2048), (4, 1024), (8, 2048)],
          [(4, 16, 1), (4, 8, 2), (4, 16, 16)], _PAGES, _ALL),
]  # fmt: skip

TABLES = [*FLASH_ATTENTION, *FLEX_ATTENTION]
