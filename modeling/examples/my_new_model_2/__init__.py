"""MyNewModel2: Llama's configuration under Gemma's computation."""

from swathe.modeling.auto import register_model
from swathe.modeling.examples.my_new_model_2.configuration_my_new_model_2 import MyNewModel2Config
from swathe.modeling.examples.my_new_model_2.modeling_my_new_model_2 import (
    MyNewModel2ForSequenceClassification,
    MyNewModel2Model,
)

__all__ = [
    "MyNewModel2Config",
    "MyNewModel2ForSequenceClassification",
    "MyNewModel2Model",
    "register",
]


def register() -> None:
    """Make the Auto classes find the model. Raises ValueError where its model_type is taken."""
    register_model(
        MyNewModel2Config.model_type,
        MyNewModel2Config,
        {"base": MyNewModel2Model, "seq_cls": MyNewModel2ForSequenceClassification},
    )
