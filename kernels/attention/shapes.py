"""Named shapes of attention, shared by tests and benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """B sequences, H query and K key heads, T queries and S keys, of D and E (v's) features.

    `name` says where the shape comes from.
    """

    name: str
    B: int
    H: int
    K: int
    T: int
    S: int
    D: int
    E: int


# tests: small, odd, empty and on both sides of the tiles' borders (16 features, 64 and 128 rows)
EDGES = (
    Shape("no_queries", 1, 2, 1, 0, 5, 16, 16),
    Shape("no_keys", 2, 2, 2, 3, 0, 16, 16),
    Shape("no_batch", 0, 2, 1, 3, 4, 16, 16),
    Shape("one_of_each", 1, 1, 1, 1, 1, 16, 16),
    Shape("odd_features", 1, 2, 1, 9, 13, 7, 5),
    Shape("one_query", 2, 2, 1, 1, 130, 40, 40),
    Shape("more_queries_than_keys", 1, 2, 2, 140, 37, 32, 32),
    Shape("tile_and_one", 1, 1, 1, 129, 65, 64, 64),
    Shape("phi_2", 1, 2, 2, 33, 63, 80, 80),
    Shape("phi_3", 1, 2, 1, 17, 70, 96, 96),
    Shape("head_112", 1, 2, 1, 40, 40, 112, 112),
    Shape("llama_8b_head", 1, 2, 1, 65, 97, 128, 128),
    Shape("head_160", 1, 1, 1, 20, 64, 160, 160),
    Shape("deepseek_v3_head", 1, 1, 1, 30, 66, 192, 128),
    Shape("gemma_head", 1, 1, 1, 34, 34, 256, 256),
)

# benchmarks: model families, decode (one token) to prefill
MODELS = (
    Shape("llama_1b", 1, 32, 8, 2048, 2048, 64, 64),
    Shape("llama_8b", 1, 32, 8, 2048, 2048, 128, 128),
    Shape("gemma_2_2b", 1, 8, 4, 2048, 2048, 256, 256),
    Shape("llama_8b_decode_4k", 16, 32, 8, 1, 4096, 128, 128),
    Shape("llama_8b_decode_32k", 16, 32, 8, 1, 32_768, 128, 128),
    Shape("qwen2_7b_decode_4k", 16, 28, 4, 1, 4096, 128, 128),
    Shape("llama_8b_speculate_4k", 4, 32, 8, 8, 4096, 128, 128),
    Shape("llama_8b_chunk_32k", 1, 32, 8, 512, 32_768, 128, 128),
)

# a GPU also sees the shapes that a CPU would take seconds for
GPU = (
    Shape("llama_8b_prefill_8k", 1, 32, 8, 8192, 8192, 128, 128),
    Shape("llama_8b_train", 4, 32, 8, 4096, 4096, 128, 128),
    Shape("heads_of_128", 2, 16, 16, 8192, 8192, 128, 128),
    Shape("llama_1b_train", 4, 32, 8, 4096, 4096, 64, 64),
    Shape("heads_of_64", 2, 32, 32, 8192, 8192, 64, 64),
    Shape("gemma_2_9b_train", 2, 16, 8, 4096, 4096, 256, 256),
    Shape("phi_3_mini_train", 4, 32, 32, 4096, 4096, 96, 96),
    Shape("phi_2_train", 4, 32, 32, 2048, 2048, 80, 80),
    Shape("qwen2_7b_train", 4, 28, 4, 4096, 4096, 128, 128),
    Shape("deepseek_v3_train", 1, 128, 128, 4096, 4096, 192, 128),
    Shape("llama_8b_prefill_32k", 1, 32, 8, 32_768, 32_768, 128, 128),
)
