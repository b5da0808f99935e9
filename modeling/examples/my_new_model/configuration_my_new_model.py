"""MyNewModelConfig: Llama's fields, another default, and a field of its own."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.config_fields import Range
from swathe.modeling.families.llama.configuration_llama import LlamaConfig


class MyNewModelConfig(LlamaConfig):
    """Configuration of a MyNewModel.

    The plans that say how a model is split over devices, `base_model_tp_plan` and
    `base_model_pp_plan`, are the decoders'; a model with other modules states its own.
    `classifier_dropout` is the rate of dropout before the classifier of sequences. `new_param` is
    the least that a field can be: config.json has it, no computation reads it.
    """

    model_type: ClassVar[str] = "my_new_model"
    ranges: ClassVar[dict[str, Range]] = {"classifier_dropout": (0, 1)}

    mlp_bias: bool = True
    new_param: int = 0
    classifier_dropout: float = 0.0
