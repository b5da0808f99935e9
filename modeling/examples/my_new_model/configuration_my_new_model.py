"""MyNewModelConfig: Llama's fields, another default, and a field of its own."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.families.llama.configuration_llama import LlamaConfig


class MyNewModelConfig(LlamaConfig):
    """Configuration of a MyNewModel.

    The plans that say how a model is split over devices, `base_model_tp_plan` and
    `base_model_pp_plan`, are the decoders'; a model with other modules states its own.
    `new_param` shows how a field is added: config.json has it, no computation reads it.
    """

    model_type: ClassVar[str] = "my_new_model"

    mlp_bias: bool = True
    new_param: int = 0
