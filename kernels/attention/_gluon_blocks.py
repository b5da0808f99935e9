"""How attention is cut for Hopper's kernels in Gluon: boxes of heads, and tiles by head size.

The numbers are those whose machine code keeps every exponential in flight without a spill in a loop
(tests/offline) and whose shared memory fits; none has been timed yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

# of the L2 cache, which is 50 MB: keys and values that heads in flight may hold there
SECTION = 32 << 20
QUERIES = 128  # of a tile
_ROOM = 232_448 - 1024  # bytes of shared memory, less barriers and what aligns tiles
# registers that a thread starts with where there are twelve warps, those of one that computes, and
# of one that copies
REGISTERS, COMPUTE, COPY = 168, 240, 24


class ForwardBlocks(NamedTuple):
    """Tiles of the forward for heads of up to D and E features.

    keys: of a tile, beside 128 queries. stages: tiles under way. shared: o leaves through q's
    memory, where there is no room beside it.
    """

    D: int
    E: int
    keys: int
    stages: int
    shared: bool


FORWARD = (
    ForwardBlocks(64, 64, 128, 3, False),
    ForwardBlocks(96, 96, 128, 3, False),
    ForwardBlocks(128, 128, 128, 2, False),
    ForwardBlocks(160, 160, 128, 2, True),
    ForwardBlocks(192, 128, 128, 2, True),
    ForwardBlocks(192, 192, 64, 3, True),
    ForwardBlocks(256, 256, 64, 2, True),
)


@lru_cache(maxsize=64)
def boxes(D: int) -> tuple[int, ...]:
    """Widths of one or two boxes that hold D features, powers of two from 16 on: 80 = 64 + 16.

    Past D they are zeros that cost as much as features: 112 is one box of 128, not 64 + 32 + 16.
    """
    whole = max(16, 1 << (D - 1).bit_length())
    most = max(16, 1 << (D.bit_length() - 1))
    rest = max(16, 1 << max(D - most - 1, 0).bit_length())
    return (whole,) if most >= D or most + rest >= whole else (most, rest)


@lru_cache(maxsize=64)
def forward_blocks(D: int, E: int) -> ForwardBlocks:
    """Tiles of the forward for heads of D and E features, of at most 256."""
    of_d, of_e = boxes(D), boxes(E)
    wide = (sum(of_d), sum(of_e))
    for row in FORWARD:
        # o leaves through the boxes of q if its own are as wide
        made = row._replace(shared=row.shared and of_d[: len(of_e)] == of_e)
        if wide[0] <= row.D and wide[1] <= row.E and _bytes(*wide, made) <= _ROOM:
            return made
    raise AssertionError((D, E))


def _bytes(d: int, e: int, block: ForwardBlocks) -> int:
    """Shared memory of q, o, k and v."""
    rows = QUERIES * (d if block.shared else d + e)
    return 2 * (rows + block.stages * block.keys * (d + e))
