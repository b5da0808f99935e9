"""Named shapes of gated_mlp_act, shared by tests and benchmarks: M tokens by N features each."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """M rows of N gates and as many ups; `name` says where the shape comes from."""

    name: str
    M: int
    N: int


# tests: small, odd, empty and on both sides of every width at which a launcher changes its tile
EDGES = (
    Shape("no_rows", 0, 64),
    Shape("no_features", 3, 0),
    Shape("one_element", 1, 1),
    Shape("single_column", 37, 1),
    Shape("under_a_segment", 150, 7),
    Shape("odd", 5, 37),
    Shape("under_64", 17, 63),
    Shape("at_64", 17, 64),
    Shape("under_512", 5, 511),
    Shape("at_512", 5, 512),
    Shape("under_a_tile", 3, 2047),
    Shape("at_a_tile", 2, 2048),
    Shape("past_a_tile", 2, 2049),
    Shape("gpt_oss", 2, 2880),
    Shape("prime", 3, 4099),
)
# enough elements for a pool where an option needs no shapes of its own
FEW = (Shape("few_odd", 9, 519), Shape("few", 16, 384))

# benchmarks: model families by their intermediate size, decode (1 row) to training (16k rows)
MODELS = (
    Shape("smollm2_135m_decode", 1, 1536),
    Shape("smollm2_135m", 2048, 1536),
    Shape("llama_1b_decode", 1, 8192),
    Shape("llama_1b", 2048, 8192),
    Shape("llama_8b_decode", 1, 14_336),
    Shape("llama_8b_batch", 16, 14_336),
    Shape("llama_8b", 2048, 14_336),
)

# a GPU also sees the shapes that a CPU would take seconds for
GPU = (
    Shape("gpt_oss_20b", 16_384, 2880),
    Shape("gemma3_4b_train", 8192, 10_240),
    Shape("llama_1b_train", 16_384, 8192),
    Shape("llama_8b_train", 8192, 14_336),
    Shape("llama_8b_odd", 8192, 14_335),
    Shape("llama_70b_train", 8192, 28_672),
    Shape("gemma_7b_train", 4096, 24_576),
    Shape("widest", 2048, 65_536),
    Shape("wider_than_peers", 1024, 131_072),
)
