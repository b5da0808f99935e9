"""MyNewModel: Llama's computation with biases in the MLP and one more field."""

from swathe.modeling.auto import register_model
from swathe.modeling.examples.my_new_model.configuration_my_new_model import MyNewModelConfig
from swathe.modeling.examples.my_new_model.modeling_my_new_model import (
    MyNewModelForCausalLM,
    MyNewModelForSequenceClassification,
    MyNewModelModel,
)

__all__ = [
    "MyNewModelConfig",
    "MyNewModelForCausalLM",
    "MyNewModelForSequenceClassification",
    "MyNewModelModel",
    "register",
]


def register() -> None:
    """Make the Auto classes find the model. Raises ValueError where its model_type is taken."""
    register_model(
        MyNewModelConfig.model_type,
        MyNewModelConfig,
        {
            "base": MyNewModelModel,
            "causal_lm": MyNewModelForCausalLM,
            "seq_cls": MyNewModelForSequenceClassification,
        },
    )
