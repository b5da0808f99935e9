"""The families' public classes by name; a family's modules are imported when one is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swathe.modeling.families.bert.configuration_bert import BertConfig
    from swathe.modeling.families.bert.modeling_bert import (
        BertForMaskedLM,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
    )
    from swathe.modeling.families.gemma.configuration_gemma import GemmaConfig
    from swathe.modeling.families.gemma.modeling_gemma import (
        GemmaForCausalLM,
        GemmaForSequenceClassification,
        GemmaForTokenClassification,
        GemmaModel,
    )
    from swathe.modeling.families.gemma2.configuration_gemma2 import Gemma2Config
    from swathe.modeling.families.gemma2.modeling_gemma2 import (
        Gemma2ForCausalLM,
        Gemma2ForSequenceClassification,
        Gemma2ForTokenClassification,
        Gemma2Model,
    )
    from swathe.modeling.families.gemma3_text.configuration_gemma3_text import Gemma3TextConfig
    from swathe.modeling.families.gemma3_text.modeling_gemma3_text import (
        Gemma3ForCausalLM,
        Gemma3TextForSequenceClassification,
        Gemma3TextModel,
    )
    from swathe.modeling.families.gpt_oss.configuration_gpt_oss import GptOssConfig
    from swathe.modeling.families.gpt_oss.modeling_gpt_oss import (
        GptOssForCausalLM,
        GptOssForSequenceClassification,
        GptOssForTokenClassification,
        GptOssModel,
    )
    from swathe.modeling.families.llama.configuration_llama import LlamaConfig
    from swathe.modeling.families.llama.modeling_llama import (
        LlamaForCausalLM,
        LlamaForQuestionAnswering,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
        LlamaModel,
    )
    from swathe.modeling.families.mistral.configuration_mistral import MistralConfig
    from swathe.modeling.families.mistral.modeling_mistral import (
        MistralForCausalLM,
        MistralForQuestionAnswering,
        MistralForSequenceClassification,
        MistralForTokenClassification,
        MistralModel,
    )
    from swathe.modeling.families.mixtral.configuration_mixtral import MixtralConfig
    from swathe.modeling.families.mixtral.modeling_mixtral import (
        MixtralForCausalLM,
        MixtralForQuestionAnswering,
        MixtralForSequenceClassification,
        MixtralForTokenClassification,
        MixtralModel,
    )
    from swathe.modeling.families.phi3.configuration_phi3 import Phi3Config
    from swathe.modeling.families.phi3.modeling_phi3 import (
        Phi3ForCausalLM,
        Phi3ForSequenceClassification,
        Phi3ForTokenClassification,
        Phi3Model,
    )
    from swathe.modeling.families.qwen2.configuration_qwen2 import Qwen2Config
    from swathe.modeling.families.qwen2.modeling_qwen2 import (
        Qwen2ForCausalLM,
        Qwen2ForQuestionAnswering,
        Qwen2ForSequenceClassification,
        Qwen2ForTokenClassification,
        Qwen2Model,
    )
    from swathe.modeling.families.qwen3.configuration_qwen3 import Qwen3Config
    from swathe.modeling.families.qwen3.modeling_qwen3 import (
        Qwen3ForCausalLM,
        Qwen3ForQuestionAnswering,
        Qwen3ForSequenceClassification,
        Qwen3ForTokenClassification,
        Qwen3Model,
    )
    from swathe.modeling.families.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from swathe.modeling.families.qwen3_moe.modeling_qwen3_moe import (
        Qwen3MoeForCausalLM,
        Qwen3MoeForQuestionAnswering,
        Qwen3MoeForSequenceClassification,
        Qwen3MoeForTokenClassification,
        Qwen3MoeModel,
    )

_HOME = {
    "BertConfig": "bert.configuration_bert",
    "BertForMaskedLM": "bert.modeling_bert",
    "BertForQuestionAnswering": "bert.modeling_bert",
    "BertForSequenceClassification": "bert.modeling_bert",
    "BertForTokenClassification": "bert.modeling_bert",
    "BertModel": "bert.modeling_bert",
    "Gemma2Config": "gemma2.configuration_gemma2",
    "Gemma2ForCausalLM": "gemma2.modeling_gemma2",
    "Gemma2ForSequenceClassification": "gemma2.modeling_gemma2",
    "Gemma2ForTokenClassification": "gemma2.modeling_gemma2",
    "Gemma2Model": "gemma2.modeling_gemma2",
    "Gemma3ForCausalLM": "gemma3_text.modeling_gemma3_text",
    "Gemma3TextConfig": "gemma3_text.configuration_gemma3_text",
    "Gemma3TextForSequenceClassification": "gemma3_text.modeling_gemma3_text",
    "Gemma3TextModel": "gemma3_text.modeling_gemma3_text",
    "GemmaConfig": "gemma.configuration_gemma",
    "GemmaForCausalLM": "gemma.modeling_gemma",
    "GemmaForSequenceClassification": "gemma.modeling_gemma",
    "GemmaForTokenClassification": "gemma.modeling_gemma",
    "GemmaModel": "gemma.modeling_gemma",
    "GptOssConfig": "gpt_oss.configuration_gpt_oss",
    "GptOssForCausalLM": "gpt_oss.modeling_gpt_oss",
    "GptOssForSequenceClassification": "gpt_oss.modeling_gpt_oss",
    "GptOssForTokenClassification": "gpt_oss.modeling_gpt_oss",
    "GptOssModel": "gpt_oss.modeling_gpt_oss",
    "LlamaConfig": "llama.configuration_llama",
    "LlamaForCausalLM": "llama.modeling_llama",
    "LlamaForQuestionAnswering": "llama.modeling_llama",
    "LlamaForSequenceClassification": "llama.modeling_llama",
    "LlamaForTokenClassification": "llama.modeling_llama",
    "LlamaModel": "llama.modeling_llama",
    "MistralConfig": "mistral.configuration_mistral",
    "MistralForCausalLM": "mistral.modeling_mistral",
    "MistralForQuestionAnswering": "mistral.modeling_mistral",
    "MistralForSequenceClassification": "mistral.modeling_mistral",
    "MistralForTokenClassification": "mistral.modeling_mistral",
    "MistralModel": "mistral.modeling_mistral",
    "MixtralConfig": "mixtral.configuration_mixtral",
    "MixtralForCausalLM": "mixtral.modeling_mixtral",
    "MixtralForQuestionAnswering": "mixtral.modeling_mixtral",
    "MixtralForSequenceClassification": "mixtral.modeling_mixtral",
    "MixtralForTokenClassification": "mixtral.modeling_mixtral",
    "MixtralModel": "mixtral.modeling_mixtral",
    "Phi3Config": "phi3.configuration_phi3",
    "Phi3ForCausalLM": "phi3.modeling_phi3",
    "Phi3ForSequenceClassification": "phi3.modeling_phi3",
    "Phi3ForTokenClassification": "phi3.modeling_phi3",
    "Phi3Model": "phi3.modeling_phi3",
    "Qwen2Config": "qwen2.configuration_qwen2",
    "Qwen2ForCausalLM": "qwen2.modeling_qwen2",
    "Qwen2ForQuestionAnswering": "qwen2.modeling_qwen2",
    "Qwen2ForSequenceClassification": "qwen2.modeling_qwen2",
    "Qwen2ForTokenClassification": "qwen2.modeling_qwen2",
    "Qwen2Model": "qwen2.modeling_qwen2",
    "Qwen3Config": "qwen3.configuration_qwen3",
    "Qwen3ForCausalLM": "qwen3.modeling_qwen3",
    "Qwen3ForQuestionAnswering": "qwen3.modeling_qwen3",
    "Qwen3ForSequenceClassification": "qwen3.modeling_qwen3",
    "Qwen3ForTokenClassification": "qwen3.modeling_qwen3",
    "Qwen3Model": "qwen3.modeling_qwen3",
    "Qwen3MoeConfig": "qwen3_moe.configuration_qwen3_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe.modeling_qwen3_moe",
    "Qwen3MoeForQuestionAnswering": "qwen3_moe.modeling_qwen3_moe",
    "Qwen3MoeForSequenceClassification": "qwen3_moe.modeling_qwen3_moe",
    "Qwen3MoeForTokenClassification": "qwen3_moe.modeling_qwen3_moe",
    "Qwen3MoeModel": "qwen3_moe.modeling_qwen3_moe",
}

__all__ = [
    "BertConfig",
    "BertForMaskedLM",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "Gemma2Config",
    "Gemma2ForCausalLM",
    "Gemma2ForSequenceClassification",
    "Gemma2ForTokenClassification",
    "Gemma2Model",
    "Gemma3ForCausalLM",
    "Gemma3TextConfig",
    "Gemma3TextForSequenceClassification",
    "Gemma3TextModel",
    "GemmaConfig",
    "GemmaForCausalLM",
    "GemmaForSequenceClassification",
    "GemmaForTokenClassification",
    "GemmaModel",
    "GptOssConfig",
    "GptOssForCausalLM",
    "GptOssForSequenceClassification",
    "GptOssForTokenClassification",
    "GptOssModel",
    "LlamaConfig",
    "LlamaForCausalLM",
    "LlamaForQuestionAnswering",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaModel",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
    "MixtralConfig",
    "MixtralForCausalLM",
    "MixtralForQuestionAnswering",
    "MixtralForSequenceClassification",
    "MixtralForTokenClassification",
    "MixtralModel",
    "Phi3Config",
    "Phi3ForCausalLM",
    "Phi3ForSequenceClassification",
    "Phi3ForTokenClassification",
    "Phi3Model",
    "Qwen2Config",
    "Qwen2ForCausalLM",
    "Qwen2ForQuestionAnswering",
    "Qwen2ForSequenceClassification",
    "Qwen2ForTokenClassification",
    "Qwen2Model",
    "Qwen3Config",
    "Qwen3ForCausalLM",
    "Qwen3ForQuestionAnswering",
    "Qwen3ForSequenceClassification",
    "Qwen3ForTokenClassification",
    "Qwen3Model",
    "Qwen3MoeConfig",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeForQuestionAnswering",
    "Qwen3MoeForSequenceClassification",
    "Qwen3MoeForTokenClassification",
    "Qwen3MoeModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
