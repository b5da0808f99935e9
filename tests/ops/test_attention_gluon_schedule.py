"""The order in which programs take tiles of attention on Hopper: complete, and short.

`makespan` plays the persistent programs: each takes the next turn by a counter when it begins the
one it has. Work is counted in tiles of keys, OVERHEAD being what a tile of rows costs besides.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

import pytest

from support.gluon.twins import twin
from swathe.kernels.attention._gluon import section
from swathe.kernels.attention._gluon_blocks import SECTION

MULTIPROCESSORS = 132
OVERHEAD = 0.4
QUERIES = KEYS = 128
Turns = list[tuple[int, int]]


def turns(tiles: int, heads: int, width: int) -> Turns:
    """(row tile, head) of every turn."""
    place = twin("swathe.kernels.attention._gluon_tiles").place
    found = (place(turn, tiles, heads, width) for turn in range(tiles * heads))
    return [(int(tile.data), int(head.data)) for tile, head in found]


def ascending(tiles: int, heads: int) -> Turns:
    """The order of a plain grid."""
    return [(tile, head) for head in range(heads) for tile in range(tiles)]


def seen(tile: int, S: int, causal: bool) -> int:
    """Tiles of keys that a tile of rows sees."""
    last = min((tile + 1) * QUERIES, S) if causal else S
    return -(-last // KEYS)


def makespan(work: list[float], programs: int) -> float:
    """When the last program is done."""
    order = iter(range(len(work)))
    free = [(0.0, program, next(order)) for program in range(min(programs, len(work)))]
    heapify(free)
    end = 0.0
    while free:
        begin, program, turn = heappop(free)
        done = begin + work[turn] + OVERHEAD
        end = max(end, done)
        following = next(order, None)
        if following is not None:
            heappush(free, (done, program, following))
    return end


def efficiency(order: Turns, S: int, *, causal: bool = True) -> float:
    """Time that all multiprocessors would take if none ever waited, over that they take."""
    work = [float(seen(tile, S, causal)) for tile, _ in order]
    return sum(work) / MULTIPROCESSORS / makespan(work, MULTIPROCESSORS)


@pytest.mark.parametrize(
    ("tiles", "heads", "width"),
    [(1, 1, 1), (3, 5, 2), (4, 6, 6), (7, 3, 1), (2, 9, 4), (5, 8, 100)],
)
def test_every_tile_of_every_head_has_one_turn(tiles: int, heads: int, width: int) -> None:
    order = turns(tiles, heads, width)
    assert sorted(order) == [(tile, head) for tile in range(tiles) for head in range(heads)]
    for begin in range(0, heads, width):
        together = order[begin * tiles : (begin + width) * tiles]
        assert {head for _, head in together} == set(range(begin, min(begin + width, heads)))
        assert [tile for tile, _ in together] == sorted(
            (tile for tile, _ in together), reverse=True
        )


# causal self-attention of 16k tokens in all, 16 heads of 128
@pytest.mark.parametrize(
    ("S", "B", "least"),
    [(1024, 16, 0.86), (2048, 8, 0.92), (4096, 4, 0.95), (8192, 2, 0.97), (16_384, 1, 0.97)],
)
def test_multiprocessors_are_busy(S: int, B: int, least: float) -> None:
    tiles, heads = -(-S // QUERIES), 16 * B
    order = turns(tiles, heads, section(heads, 1, S, 256))
    found = efficiency(order, S)
    assert found >= least, found
    assert found > efficiency(ascending(tiles, heads), S)


def test_rows_that_all_see_the_same_lose_nothing_by_the_order() -> None:
    order = turns(32, 64, section(64, 1, 4096, 256))
    plain = efficiency(ascending(32, 64), 4096, causal=False)
    assert efficiency(order, 4096, causal=False) == pytest.approx(plain)


def test_sections_fit_into_the_cache_and_hold_whole_groups() -> None:
    for heads, groups, S, features in ((512, 4, 4096, 256), (32, 1, 131_072, 256), (64, 8, 10, 32)):
        width = section(heads, groups, S, features)
        of_keys = width // groups
        assert width == heads or width % groups == 0
        assert of_keys == 1 or of_keys * S * features * 2 <= SECTION
        assert width == heads or (of_keys + 1) * S * features * 2 > SECTION
