"""How attention is cut: pieces of head sizes, tiles by head size, dtype and GPU, and who gets TMA.

A tile's size never depends on lengths or on the batch, so that a row's bits do not either. The
numbers are those that compile without a spill (tests/offline) and keep the most exponentials in
flight beside the matrix units; none has been timed yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swathe.kernels.core.device import arch, chosen_by_device


class Blocks(NamedTuple):
    """Tiles of a launch: queries, keys, the warps that work on them, and tiles under way."""

    queries: int
    keys: int
    warps: int
    stages: int


# the widest head of a row, in elements: tiles of the forward, of dq, and of dk and dv
_WGMMA = {
    64: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 128, 8, 3)),
    128: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 128, 8, 3)),
    192: (Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2)),
    256: (Blocks(128, 16, 8, 2), Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2)),
}
# where tensor memory leaves 128 registers a thread
_BLACKWELL_BACKWARD_Q = {128: Blocks(64, 64, 4, 2)}
_MMA = {
    64: (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    128: (Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2), Blocks(16, 64, 4, 2)),
    192: (Blocks(64, 16, 4, 2), Blocks(32, 32, 4, 2), Blocks(16, 32, 4, 2)),
    256: (Blocks(16, 32, 4, 2), Blocks(64, 16, 8, 2), Blocks(16, 32, 4, 2)),
}
# AMD's waves of 64 lanes hold 512 registers each, their multiprocessors 64 KB of shared memory
_MFMA = {
    64: (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2)),
    128: (Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(32, 64, 4, 2)),
    192: (Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(16, 32, 4, 2)),
    256: (Blocks(32, 16, 4, 2), Blocks(64, 16, 8, 2), Blocks(16, 32, 4, 2)),
}
# fp32 outside the matrix units
_FMA = {
    128: (Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)),
    256: (Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
# tiles of a generation, and the widest piece of a head
_TABLES = {
    "mma": (_MMA, 64), "mfma": (_MFMA, 64), "hopper": (_WGMMA, 256), "blackwell": (_WGMMA, 256)
}  # fmt: skip


class Cut(NamedTuple):
    """How heads of one pair of sizes are cut: pieces of either, tiles of the three kernels."""

    of_d: tuple[int, ...]
    of_e: tuple[int, ...]
    exact: bool
    forward: Blocks
    backward_q: Blocks
    backward_kv: Blocks


_cuts: dict[tuple[int, int, torch.dtype, torch.device, bool], Cut] = {}
chosen_by_device(_cuts.clear)


def cut(q: Tensor, v: Tensor, dense: bool) -> Cut:
    """The cut for heads like q (..., D) and v (..., E).

    `dense`: every weight of a tile has a number of its own, from a mask, a bias or dropout.
    """
    key = q.shape[-1], v.shape[-1], q.dtype, q.device, dense
    found = _cuts.get(key)
    if found is None:
        found = _cuts[key] = cut_for(*key[:3], generation(q.device), dense)
    return found


def cut_for(D: int, E: int, dtype: torch.dtype, generation: str, dense: bool = False) -> Cut:
    """The cut for D and E features on one generation of GPUs."""
    if dtype == torch.float32:
        table, most = _FMA, 32
    else:
        table, most = _TABLES[generation]
    of_d, of_e = pieces(D, most), pieces(E, most)
    wide = max(sum(of_d), sum(of_e))
    row = next(width for width in table if wide <= width)
    forward, backward_q, backward_kv = table[row]
    if generation == "blackwell" and table is _WGMMA:
        backward_q = _BLACKWELL_BACKWARD_Q.get(row, backward_q)
    if dense:
        forward, backward_q = _fewer_keys(forward), _fewer_keys(backward_q)
        backward_kv = _fewer_pairs(backward_kv)
    exact = sum(of_d) == D and sum(of_e) == E
    return Cut(of_d, of_e, exact, forward, backward_q, backward_kv)


def _fewer_keys(block: Blocks) -> Blocks:
    # a tile of a mask or bias is loaded by addresses, two registers each; dropout draws as many
    return block._replace(keys=max(block.keys // 2, 16))


def _fewer_pairs(block: Blocks) -> Blocks:
    if block.queries >= 64:
        return block._replace(queries=block.queries // 2)
    return block._replace(keys=max(block.keys // 2, 16))


def pieces(D: int, most: int = 256) -> tuple[int, ...]:
    """Powers of two from 16 to `most` that D features fill: 80 = 64 + 16."""
    rest, found = -(-D // 16) * 16, []
    while rest:
        found.append(min(most, 1 << (rest.bit_length() - 1)))
        rest -= found[-1]
    return tuple(found)


def generation(device: torch.device) -> str:
    """Whose matrix units a GPU has: "hopper", "blackwell" (sm_100), AMD's "mfma", else "mma"."""
    if device.type == "cpu":
        return "hopper"  # an interpreter is quicker with few wide pieces
    capability = arch(device)
    if capability is None:
        return "mfma"
    return "hopper" if 90 <= capability < 100 else "blackwell" if 100 <= capability < 120 else "mma"


def tiles_by_tma(*streams: Tensor) -> bool:
    """Whether the TMA can copy tiles of these (batch, heads, rows, features) into shared memory.

    From Hopper on, for heads that are one power of two, at addresses and strides of 16 bytes.
    """
    device = streams[0].device
    if (
        device.type == "cpu"
        or generation(device) not in ("hopper", "blackwell")
        or streams[0].dtype == torch.float32
    ):
        return False
    return all(fits_tma(t) for t in streams)


def fits_tma(t: Tensor) -> bool:
    """Whether one (batch, heads, rows, features) has sizes, address and strides for the TMA."""
    step = 16 // t.element_size()
    return (
        pieces(t.shape[3]) == (t.shape[3],)
        and t.numel() > 0
        and t.data_ptr() % 16 == 0
        and t.stride(3) == 1
        and all(stride > 0 and stride % step == 0 for stride in t.stride()[:3])
    )
