"""MyNewModel: pre-norm layers, grouped rotary attention, a gated MLP with biases."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.decoder import CausalLM, DecoderModel, DecoderPreTrainedModel
from swathe.modeling.examples.my_new_model.configuration_my_new_model import MyNewModelConfig
from swathe.modeling.heads import ForSequenceClassification
from swathe.modeling.layers.norm import RMSNorm


class MyNewModelPreTrainedModel(DecoderPreTrainedModel):
    """What the body and the models with a head have in common."""

    config: MyNewModelConfig
    config_class: ClassVar[type[PreTrainedConfig]] = MyNewModelConfig

    def _init_weights(self, module: nn.Module) -> None:
        # what the base class does, written out in the guide's style as the place for rules of one's
        # own; writing to all of a module is safe, since loaded parameters are put back afterwards
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()
        elif isinstance(module, RMSNorm):
            # the norm knows which weight changes nothing: not 1 where it scales by 1 + weight
            module.reset_parameters()


class MyNewModelModel(MyNewModelPreTrainedModel, DecoderModel):
    """The body: token ids to normed hidden states."""


class MyNewModelForCausalLM(MyNewModelPreTrainedModel, CausalLM):
    """The body and a head over the vocabulary."""

    body_class: ClassVar[type[DecoderModel]] = MyNewModelModel


class DropoutLinear(nn.Linear):
    """A linear layer behind dropout, stored as a linear layer is."""

    def __init__(self, in_features: int, out_features: int, bias: bool, rate: float) -> None:
        super().__init__(in_features, out_features, bias)
        self.rate = rate

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return super().forward(nn.functional.dropout(input, self.rate, self.training))


class MyNewModelForSequenceClassification(ForSequenceClassification, MyNewModelPreTrainedModel):
    """The body and a classifier of sequences, on the last real token of each."""

    body_class = MyNewModelModel

    def __init__(self, config: MyNewModelConfig) -> None:
        super().__init__(config)
        # a module of one's own takes the place of the head's, under the name in the checkpoint
        self.score = DropoutLinear(
            config.hidden_size, config.num_labels, False, config.classifier_dropout
        )
