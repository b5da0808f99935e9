"""Named shapes of cross_entropy, shared by tests and benchmarks: M rows of V classes."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """M rows of V classes; `name` says where the shape comes from."""

    name: str
    M: int
    V: int


# tests: small, odd, empty and on both sides of every block boundary a launcher switches at
EDGES = (
    Shape("no_rows", 0, 64),
    Shape("one_class", 3, 1),
    Shape("odd", 5, 17),
    Shape("thousand", 9, 1000),
    Shape("narrow_tile", 4, 1024),
    Shape("past_narrow_tile", 3, 1025),
    Shape("prime", 3, 2999),
    Shape("wide_tile", 2, 4096),
    Shape("past_wide_tile", 3, 4097),
)

# benchmarks: model families by their vocabulary
MODELS = (
    Shape("smollm2", 256, 49_152),
    Shape("llama_3", 64, 128_256),
    Shape("gemma_2", 32, 256_000),
)

# a GPU also sees the shapes that a CPU would take seconds for
GPU = (
    Shape("smollm2_train", 8_192, 49_152),
    Shape("gpt2_odd", 8_192, 50_257),
    Shape("llama_3_train", 8_192, 128_256),
    Shape("qwen_train", 8_192, 151_936),
    Shape("gemma_2_train", 4_096, 256_000),
    Shape("widest", 2_048, 262_144),
)
