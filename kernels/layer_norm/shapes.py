"""Named shapes of layer_norm, shared by tests, benchmarks and the tuner: rows M by features N."""

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
    Shape("bert_base", 17, 768),
    Shape("block_and_one", 7, 1025),
    Shape("odd_row_limit", 2, 4095),
    Shape("row_limit", 2, 4096),
    Shape("past_row_limit", 3, 4200),
    Shape("whole_row_limit", 1, 8192),
    Shape("wide_limit", 1, 16_384),
    Shape("past_wide_limit", 2, 33_001),
    Shape("widest_peer", 1, 65_536),
)

# benchmarks: model families by their hidden size, one sequence to training
MODELS = (
    Shape("bert_base", 512, 768),
    Shape("gpt2_decode", 1, 768),
    Shape("gpt2_xl", 1024, 1600),
    Shape("opt_6_7b_decode", 1, 4096),
    Shape("opt_6_7b", 2048, 4096),
)

# a GPU also sees the shapes that a CPU would take seconds for
GPU = (
    Shape("bert_base_train", 32_768, 768),
    Shape("vit_large_train", 50_432, 1024),
    Shape("gpt2_xl_train", 16_384, 1600),
    Shape("opt_6_7b_train", 16_384, 4096),
    Shape("odd_train", 16_384, 4095),
    Shape("gpt3_175b_train", 4096, 12_288),
    Shape("wide_train", 2048, 32_768),
    Shape("widest_train", 1024, 65_536),
)
