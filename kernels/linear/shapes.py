"""Named shapes of linear, shared by tests: M rows of K features by weights of N_i rows."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """M rows of K features and weights (N_i, K); `name` says where the shape comes from."""

    name: str
    M: int
    K: int
    N: tuple[int, ...]
    biased: bool = False


# small, odd, empty, on both sides of vectors (16), of 4 rows and columns, of 64 columns and, for
# int8, of 256 rows
EDGES = (
    Shape("no_rows", 0, 24, (5,)),
    Shape("no_columns", 3, 24, (0, 5)),
    Shape("one_of_each", 1, 1, (1,)),
    Shape("under_a_vector", 1, 15, (3, 1), biased=True),
    Shape("a_vector_and_one", 2, 17, (4, 5)),
    Shape("two_vectors", 3, 32, (63,), biased=True),
    Shape("two_vectors_and_one", 4, 33, (64, 65)),
    Shape("five_rows", 5, 100, (66, 2, 7), biased=True),
    Shape("most_rows", 16, 64, (48, 16)),
    Shape("more_rows", 17, 64, (48, 16)),
    Shape("many_rows", 261, 33, (70, 5), biased=True),
    Shape("four_weights", 2, 576, (96, 32, 32, 64), biased=True),
    Shape("five_weights", 2, 64, (16, 8, 8, 8, 8)),
    Shape("smollm2_qkv", 1, 576, (576, 192, 192)),
    Shape("smollm2_mlp", 4, 576, (1536, 1536)),
    Shape("smollm2_down", 16, 1536, (576,)),
)
