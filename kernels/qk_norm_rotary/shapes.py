"""Named shapes of qk_norm_rotary, shared by tests, benchmarks and the tuner."""

from __future__ import annotations

from swathe.kernels.core import head_shapes
from swathe.kernels.core.head_shapes import Shape

# tests: small, odd, empty and on both sides of every block boundary a launcher switches at
EDGES = (
    *head_shapes.EDGES,
    Shape("many_heads", 1, 2, 24, 3, 32, 32),
    Shape("tile_and_one", 1, 33, 2, 1, 64, 64),
    Shape("glm4", 1, 5, 4, 2, 128, 64),
    Shape("qwen3", 2, 6, 4, 2, 128, 128),
    Shape("gemma3", 1, 4, 4, 1, 256, 256),
    Shape("past_256", 1, 2, 2, 1, 320, 320),
    Shape("more_tiles_than_programs", 1, 17, 4, 2, 1024, 1024),
)

# benchmarks: model families, decode (one token) to prefill
MODELS = (
    Shape("qwen3_0.6b_decode", 1, 1, 16, 8, 128, 128),
    Shape("qwen3_0.6b", 1, 2048, 16, 8, 128, 128),
    Shape("qwen3_8b_decode", 16, 1, 32, 8, 128, 128),
    Shape("qwen3_8b", 1, 2048, 32, 8, 128, 128),
    Shape("gemma3_1b", 1, 2048, 4, 1, 256, 256),
)

# a GPU also sees the shapes that a CPU would take seconds for
GPU = (
    Shape("qwen3_0.6b_train", 8, 2048, 16, 8, 128, 128),
    Shape("qwen3_8b_train", 4, 4096, 32, 8, 128, 128),
    Shape("qwen3_235b_train", 1, 8192, 64, 4, 128, 128),
    Shape("gemma3_12b_train", 2, 4096, 16, 8, 256, 256),
    Shape("glm4_train", 2, 4096, 32, 2, 128, 64),
    Shape("head_80_train", 4, 2048, 32, 32, 80, 80),
    Shape("head_96_train", 4, 2048, 32, 8, 96, 96),
)
