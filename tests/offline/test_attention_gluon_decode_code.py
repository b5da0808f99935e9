"""Every configuration of the Hopper kernels for few queries over a cache, as it is launched."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from support.gate import TRITON, covered, verify
from support.gluon_gate import GluonConfiguration, launched
from swathe.kernels.attention import _gluon_decode as decoding
from swathe.kernels.attention._gluon_blocks import boxes
from swathe.kernels.attention.mask import Mask

T, S, H, K = 4, 4096, 32, 2


def call(D: int, E: int, dtype: torch.dtype, given: tuple[str, ...]) -> None:
    """Decode 4 new tokens with the optional parts that are given."""
    heads = 1 if (D, E) == decoding.LATENT else K
    page = 128 if "pages" in given else S

    def made(rows: int, count: int, features: int) -> Tensor:
        return torch.zeros(2, rows, count, features, dtype=dtype).transpose(1, 2)

    q, k = made(T, H, D), made(page, heads, D)
    v = k[..., :E] if heads == 1 else made(page, heads, E)
    table = torch.zeros(2, S // page, dtype=torch.int32) if "pages" in given else None
    mask = Mask.cached(torch.tensor([S, S]), T)
    assert mask.places is not None
    sinks, alibi = (torch.zeros(H) if name in given else None for name in ("sinks", "alibi"))
    softcap = 30.0 if "softcap" in given else 0.0
    decoding.decode(
        q, k, v, *mask.bounds_int32(T, S, q.device), mask.places.int(), None, None, None, sinks,
        alibi, table, 0.125, softcap,
    )  # fmt: skip


def configuration(
    D: int, E: int, dtype: torch.dtype = torch.bfloat16, *given: str, spilled: int = 0
) -> GluonConfiguration:
    """q k^T from shared memory, p v from registers, all tiles masked."""
    latent, keys = (D, E) == decoding.LATENT, decoding.blocks(D, E).keys
    of_d = (512, 64) if latent else boxes(D)
    of_e = (256,) if latent else boxes(E)  # half of the values for each warpgroup
    matrix: dict[str, int] = {}
    for depth, name in (
        *((width, f"64x{keys}x16 SS") for width in of_d),
        *((keys, f"64x{width}x16 RS") for width in of_e),
    ):
        matrix[name] = matrix.get(name, 0) + depth // 16
    kernel = "attend_latent" if latent else "attend"
    marks = "".join(f"-{name}" for name in given)
    return GluonConfiguration(
        f"decode-{D}-{E}-{str(dtype).removeprefix('torch.')}{marks}",
        partial(launched, kernel, partial(call, D, E, dtype, given)),
        loops=2 if latent else 1,
        matrix=(matrix,),
        # one warpgroup's exponentials run beside the other's products, which no loop shows
        in_flight=0 if latent else 95,
        spilled=spilled,
    )


def shipped() -> Iterator[GluonConfiguration]:
    """Every row of the table, and every optional part."""
    for size in decoding.BLOCKS:
        yield configuration(size, size, spilled=64 * (size == 256))
    for D, E in ((80, 80), (96, 96), (192, 128)):
        yield configuration(D, E)
    yield configuration(128, 128, torch.float16)
    for name in ("pages", "sinks", "alibi", "softcap"):
        yield configuration(128, 128, torch.bfloat16, name)
    yield configuration(*decoding.LATENT, spilled=256)
    yield configuration(*decoding.LATENT, torch.bfloat16, "pages", spilled=256)


CONFIGURATIONS = list(shipped())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_shipped_code(configuration: GluonConfiguration) -> None:
    if configuration.label.startswith("decode-576") and TRITON != "3.6":
        pytest.skip("this Triton's ptxas keeps 17 values of a loop of 843 instructions in memory")
    verify("attention_gluon_decode", configuration, "sm_90")


def test_baseline_is_whole() -> None:
    assert covered("attention_gluon_decode", CONFIGURATIONS) == []
