"""Named shapes of linear_cross_entropy: M rows of K features, V classes."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """M rows of K features and V classes; `name` says where the shape comes from."""

    name: str
    M: int
    K: int
    V: int


# tests: small, odd, empty and on both sides of the row kernels' tiles
EDGES = (
    Shape("no_rows", 0, 8, 40),
    Shape("one_of_each", 1, 1, 1),
    Shape("odd", 7, 5, 17),
    Shape("thousand", 70, 64, 1000),
    Shape("past_narrow_tile", 33, 128, 1025),
    Shape("past_wide_tile", 40, 96, 4097),
    Shape("prime", 20, 48, 4099),
)

# benchmarks: model families by their hidden size and vocabulary
MODELS = (
    Shape("smollm2_135m", 256, 576, 49_152),
    Shape("llama_1b", 64, 2048, 128_256),
)

# a GPU also sees the shapes that a CPU would take seconds for
GPU = (
    Shape("smollm2_135m_train", 8_192, 576, 49_152),
    Shape("llama_1b_train", 8_192, 2048, 128_256),
    Shape("llama_8b_train", 8_192, 4096, 128_256),
    Shape("qwen_7b_train", 8_192, 3584, 152_064),
    Shape("gemma_2_9b_train", 4_096, 3584, 256_000),
)
