"""Shapes of calls on the heads of q and k, and the edges that every op on heads is tested at."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """B sequences of S tokens, H query and Hk key heads of D features, R of them rotated.

    Hk = 0 is a call without keys; `name` says where the shape comes from.
    """

    name: str
    B: int
    S: int
    H: int
    Hk: int
    D: int
    R: int


# empty, odd, with features past the pairs, and heads as models have them
EDGES = (
    Shape("no_tokens", 2, 0, 3, 1, 16, 16),
    Shape("no_batch", 0, 5, 3, 1, 16, 16),
    Shape("one_pair", 1, 1, 1, 1, 2, 2),
    Shape("odd_half", 1, 5, 3, 1, 6, 6),
    Shape("tail_of_one", 2, 3, 1, 2, 7, 6),
    Shape("one_pair_of_many", 1, 3, 2, 1, 33, 2),
    Shape("queries_alone", 2, 3, 7, 0, 64, 64),
    Shape("phi_2", 2, 9, 3, 3, 80, 32),
    Shape("head_80", 1, 17, 2, 1, 80, 80),
    Shape("head_96", 1, 5, 3, 1, 96, 96),
    Shape("head_112", 1, 4, 7, 1, 112, 112),
)
