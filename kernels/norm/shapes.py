"""Named shapes of RMSNorm, shared by tests, benchmarks and the tuner: rows M by features N."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """M rows of N features; `name` says where the shape comes from."""

    name: str
    M: int
    N: int


# tests: small, odd, empty and on both sides of every block boundary a launcher switches at
EDGES = (
    Shape("no_rows", 0, 64),
    Shape("one_element", 1, 1),
    Shape("single_column", 37, 1),
    Shape("odd", 5, 37),
    Shape("head_64", 24, 64),
    Shape("many_tiles", 600, 130),
    Shape("prime", 3, 509),
    Shape("smollm2_135m", 17, 576),
    Shape("block_and_one", 7, 1025),
    Shape("llama_1b", 4, 2048),
    Shape("odd_row_limit", 2, 4095),
    Shape("row_limit", 2, 8192),
    Shape("past_row_limit", 3, 8200),
    Shape("wide_limit", 1, 16384),
    Shape("past_wide_limit", 2, 33001),
    Shape("widest_peer", 1, 65536),
    Shape("wider_than_peers", 1, 100_003),
)

# benchmarks: model families by their hidden size, decode (1 row) to training (16k rows)
MODELS = (
    Shape("smollm2_135m_decode", 1, 576),
    Shape("smollm2_135m", 2048, 576),
    Shape("llama_1b_decode", 1, 2048),
    Shape("llama_1b_batch", 16, 2048),
    Shape("llama_1b", 2048, 2048),
    Shape("llama_8b_decode", 1, 4096),
    Shape("llama_8b_batch", 16, 4096),
    Shape("llama_8b", 2048, 4096),
)

# a GPU also sees the shapes that a CPU would take seconds for
GPU = (
    Shape("qk_heads", 262_144, 128),
    Shape("small_hidden", 16_384, 1024),
    Shape("llama_1b_train", 16_384, 2048),
    Shape("llama_8b_train", 16_384, 4096),
    Shape("llama_8b_odd", 16_384, 4095),
    Shape("llama_70b_train", 8_192, 8192),
    Shape("llama_405b_train", 4_096, 16_384),
    Shape("wide", 2_048, 32_768),
    Shape("widest", 1_024, 65_536),
    Shape("few_rows", 256, 4096),
)
