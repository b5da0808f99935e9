"""How transformers comes to swathe's attention, what is refused, and what steps in if asked to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

import swathe.hf
from support.families import TINY, tokens
from support.hf_attention import attention_of, example, made, padding
from swathe.kernels.core.device import interpreting
from swathe.kernels.core.errors import BackendUnavailable, UnsupportedFeature
from swathe.modeling.hf import attention
from swathe.modeling.hf.attention import FORWARDS, attention_options

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
ROOT = Path(__file__).parents[2]


def fresh(code: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


BEFORE = "import swathe.hf, sys, transformers"
AFTER = "import transformers.modeling_utils, swathe.hf, sys"


@pytest.mark.parametrize("order", [BEFORE, AFTER])
def test_both_names_are_there_whichever_is_imported_first(order: str) -> None:
    found = fresh(
        f"{order}\n"
        "print('transformers.modeling_utils' in sys.modules, 'torch' in sys.modules)\n"
        "from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils\n"
        "for each in (AttentionInterface(), AttentionMaskInterface()):\n"
        "    print({'swathe', 'triton'} <= set(each.valid_keys()))\n"
        "print(type(modeling_utils.__spec__.loader).__name__, modeling_utils.__loader__ is "
        "modeling_utils.__spec__.loader)\n"
        "print(sum(type(f).__name__ == '_Waiting' for f in sys.meta_path))"
    )
    early = ["False", "False"] if order == BEFORE else ["True", "True"]
    assert found == [*early, "True", "True", "SourceFileLoader", "True", "0"]


def test_from_pretrained_and_from_config(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    ids = tokens(3)
    expected = made("llama")(ids).logits
    auto = transformers.AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path, attn_implementation="swathe")
    assert loaded.config._attn_implementation == "swathe"
    torch.testing.assert_close(loaded(ids).logits, expected, **CLOSE)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    empty = auto.from_config(config, attn_implementation="triton")
    assert empty.config._attn_implementation == "triton"
    loaded.save_pretrained(tmp_path / "again")
    assert "swathe" not in (tmp_path / "again" / "config.json").read_text()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that call "swathe"."""
    found: list[nn.Module] = []

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append(module)
        return FORWARDS["swathe"](module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "swathe", spy)
    return found


def llava() -> Any:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TINY),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=98,
        vision_feature_layer=-1,
    )
    config._attn_implementation = "eager"
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("asked", "who"),
    [
        ({"text_config": "swathe", "vision_config": "eager"}, {"LlamaAttention"}),
        ({"text_config": "eager", "vision_config": "swathe"}, {"CLIPAttention"}),
        ("swathe", {"LlamaAttention", "CLIPAttention"}),
    ],
)
@torch.no_grad()
def test_a_dict_of_parts(asked: Any, who: set[str], calls: list[nn.Module]) -> None:
    model = llava()
    ids = tokens(2)
    ids[:, 2:6] = 98
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    expected = model(**given).logits
    model.set_attn_implementation(asked)
    torch.testing.assert_close(model(**given).logits, expected, **CLOSE)
    assert {type(module).__name__ for module in calls} == who


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_triton_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = BackendUnavailable("attention: backend 'triton' is not available: no GPU")

    def resolve(x: Tensor, size: int, name: str, **facts: Any) -> Any:
        if name == "triton":
            raise refusal
        return real(x, size, name, **facts)

    real = attention.resolve_attention
    monkeypatch.setattr(attention, "resolve_attention", resolve)
    monkeypatch.setattr(attention, "_chosen", {})
    ids = tokens(3)
    expected = made("llama")(ids).logits
    with attention_of(made("llama"), "triton") as model:
        message = f"attn_implementation='triton': {refusal}. Use attn_implementation='swathe'"
        with pytest.raises(BackendUnavailable, match=re.escape(message)):
            model(ids)
        with attention_options(fallback="sdpa"):
            torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        with pytest.raises(BackendUnavailable):
            model(ids)
    with attention_of(made("llama"), "swathe") as model:
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@torch.no_grad()
def test_attention_weights_are_refused_or_come_from_eager() -> None:
    ids = tokens(3)
    expected = made("gpt_oss")(ids, output_attentions=True).attentions
    name = "triton" if interpreting() else "swathe"
    with attention_of(made("gpt_oss"), name) as model:
        with pytest.raises(UnsupportedFeature, match=r"weights.*fallback='eager'"):
            model(ids, output_attentions=True)
        with attention_options(fallback="sdpa"), pytest.raises(UnsupportedFeature, match="sdpa"):
            model(ids, output_attentions=True)
        with attention_options(fallback="eager"):
            found = model(ids, output_attentions=True).attentions
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.skipif(not interpreting(), reason="compiled kernels are measured elsewhere")
def test_heads_beyond_the_kernels() -> None:
    heads = [torch.randn(1, 2, 3, 288) for _ in range(3)]
    with pytest.raises(UnsupportedFeature, match=r"288.*What works here: .*'sdpa'"):
        FORWARDS["triton"](nn.Module(), *heads)
    with attention_options(fallback="sdpa"):
        found, _ = FORWARDS["triton"](nn.Module(), *heads)
    expected = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_dropout_is_applied_by_what_has_it() -> None:
    model = made("bert")
    for module in model.modules():
        if hasattr(module, "dropout") and "SelfAttention" in type(module).__name__:
            module.dropout.p = 0.5
    ids = example("bert").inputs["input_ids"]
    try:
        with attention_of(model.train(), "swathe"):
            one, two = model(ids).logits, model(ids).logits
            assert not torch.allclose(one, two)
            assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    finally:
        made.cache_clear()


def test_unknown_keywords_are_refused() -> None:
    heads = [torch.randn(1, 2, 3, 16) for _ in range(3)]
    call = FORWARDS["swathe"]
    plain = call(nn.Module(), *heads)[0]
    known = {"position_ids": torch.arange(3)[None], "use_cache": True, "block_indices": None}
    assert torch.equal(call(nn.Module(), *heads, **known)[0], plain)
    with pytest.raises(TypeError, match=r"given 'block_indices', which .*ignore=\['block_ind"):
        call(nn.Module(), *heads, block_indices=torch.zeros(1))
    with attention_options(ignore=["block_indices"]):
        assert torch.equal(call(nn.Module(), *heads, block_indices=torch.zeros(1))[0], plain)
    with pytest.raises(TypeError, match="given 'block_indices'"):
        call(nn.Module(), *heads, block_indices=torch.zeros(1))


def test_options_hold_until_they_are_set_again() -> None:
    try:
        attention_options(fallback="eager")
        with attention_options():
            assert attention._options.fallback is None
        assert attention._options.fallback == "eager"
    finally:
        attention_options()
    with pytest.raises(ValueError, match=r"fallback='sdqa'.* 'sdpa'.* one of \['auto'"):
        attention_options(fallback="sdqa")
    assert attention._options == attention._Options()
    assert swathe.hf.attention_options is attention_options


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 5).bool(), r"\(1, 5\): it must have four dimensions .* 3 queries, 5 keys"),
        (torch.ones(1, 1, 3, 5).long(), r"of torch.int64 is not one that was made for 3 queries"),
        (torch.ones(1, 1, 3, 4).bool(), r"must\s+broadcast"),
    ],
)
def test_masks_that_do_not_fit(mask: Tensor, message: str) -> None:
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match=message):
        FORWARDS["swathe"](nn.Module(), q, k, k, mask)


def test_borders_of_documents_that_do_not_fit() -> None:
    q, k = torch.randn(2, 2, 3, 16), torch.randn(1, 2, 5, 16)
    borders = torch.tensor([0, 2, 3])
    for heads in ((q, q, q), (q[:1], k, k)):
        with pytest.raises(ValueError, match="packs documents into one row, but q has"):
            FORWARDS["swathe"](nn.Module(), *heads, cu_seq_lens_q=borders)


def test_attention_of_a_models_own() -> None:
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=2)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(config).eval()
    given = {"input_ids": tokens(3), "attention_mask": padding("left")}
    expected = model(**given).logits
    for name in ("swathe", "triton"):
        config._attn_implementation = name
        if name == "swathe":
            assert torch.equal(model(**given).logits, expected)
        else:
            with pytest.raises(ValueError, match=r"bloom: .* attention of its own .*'swathe'"):
                model(**given)
