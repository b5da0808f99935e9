"""MyNewModel2Config: Llama's fields and defaults for a model whose MLP has no biases."""

from __future__ import annotations

from typing import ClassVar

from swathe.modeling.errors import ConfigError
from swathe.modeling.families.llama.configuration_llama import LlamaConfig


class MyNewModel2Config(LlamaConfig):
    """Configuration of a MyNewModel2: `vocab_size` 32000, `hidden_act` "silu", as Llama's."""

    model_type: ClassVar[str] = "my_new_model_2"

    def validate(self) -> None:
        """As Llama's; `mlp_bias` is a field that came with it and must not ask for biases."""
        super().validate()
        if self.mlp_bias:
            raise ConfigError(
                "mlp_bias=True is not supported: the MLP of MyNewModel2 has no biases; the only "
                "value allowed is False"
            )
