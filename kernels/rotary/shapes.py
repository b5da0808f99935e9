"""Named shapes of rotary, shared by tests, benchmarks and the tuner."""

from __future__ import annotations

from swathe.kernels.core import head_shapes
from swathe.kernels.core.head_shapes import Shape

# tests: small, odd, empty and on both sides of every block boundary a launcher switches at
EDGES = (
    *head_shapes.EDGES,
    Shape("many_heads", 1, 3, 40, 8, 64, 64),
    Shape("groups_of_heads", 1, 40, 24, 3, 16, 16),
    Shape("tile_and_one", 1, 33, 1, 1, 64, 64),
    Shape("glm4", 1, 5, 4, 2, 128, 64),
    Shape("llama_8b", 2, 6, 4, 2, 128, 128),
    Shape("gemma", 1, 4, 4, 1, 256, 256),
    Shape("past_256", 1, 2, 2, 1, 320, 320),
    Shape("past_a_tile", 1, 2, 1, 1, 2100, 2100),
)

# benchmarks: model families, decode (one token) to prefill
MODELS = (
    Shape("smollm2_135m_decode", 1, 1, 9, 3, 64, 64),
    Shape("llama_8b_decode", 16, 1, 32, 8, 128, 128),
    Shape("llama_1b_prefill", 1, 2048, 32, 8, 64, 64),
    Shape("llama_8b_prefill", 1, 2048, 32, 8, 128, 128),
)

# a GPU also sees the shapes that a CPU would take seconds for
GPU = (
    Shape("llama_1b_train", 8, 2048, 32, 8, 64, 64),
    Shape("llama_8b_train", 4, 4096, 32, 8, 128, 128),
    Shape("llama_70b_train", 2, 4096, 64, 8, 128, 128),
    Shape("gemma_7b_train", 2, 4096, 16, 16, 256, 256),
    Shape("glm4_train", 2, 4096, 32, 2, 128, 64),
    Shape("phi_2_train", 4, 2048, 32, 32, 80, 32),
    Shape("odd_heads_train", 4, 2048, 40, 7, 96, 96),
)
