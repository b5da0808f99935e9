"""What from_pretrained reads besides a directory, and how: state_dicts, names, dtypes, patterns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from support.classes import CLASSES, build, config_of
from support.families import pair, tokens
from swathe.modeling.auto import AutoModelForCausalLM, model_class
from swathe.modeling.checkpoint.errors import CheckpointError
from swathe.modeling.errors import ConfigError
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
ONE_OF_EACH = ["LlamaForCausalLM", "GemmaForCausalLM", "MixtralModel", "BertForMaskedLM"]


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.mark.parametrize("name", CLASSES)
def test_a_state_dict_in_place_of_files(name: str) -> None:
    model = build(name)
    cls = type(model)
    again, info = cls.from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        output_loading_info=True,
        strict=True,
    )
    assert equal(bits(again), bits(model)) and not again.training
    assert not info["missing_keys"] and not info["unexpected_keys"]
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in again.parameters()), "copies, not the same memory"
    assert all(p.requires_grad for p in again.parameters())


def test_a_state_dict_is_checked_as_files_are() -> None:
    model = build("LlamaForCausalLM")
    state = model.state_dict()
    given: dict[str, Any] = {"config": model.config, "state_dict": state}
    half = AutoModelForCausalLM.from_pretrained(None, **given, dtype="float16")
    assert type(half) is LlamaForCausalLM and half.dtype == torch.float16
    body = model_class("llama", "base").from_pretrained(None, **given)
    assert equal(bits(body), bits(model.model))
    missing = {k: v for k, v in state.items() if "layers.1" not in k}
    with pytest.raises(CheckpointError, match=r"E_KEYS: state_dict: the weights do not fit"):
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=missing)
    holed = {**state, "lm_head.weight": torch.full((99, 64), torch.nan)}
    with pytest.raises(CheckpointError, match=r"E_NONFINITE: state_dict: 'lm_head.weight'"):
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=holed)


def test_what_cannot_be_a_source(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    on_meta = {k: v.to("meta") for k, v in state.items()}
    refused: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (tmp_path, {"state_dict": state}, ValueError, r"cannot be passed together with a model na"),
        (None, {"state_dict": state}, ValueError, r"got \['state_dict'\] of path, state_dict and"),
        (
            None,
            {"config": model.config},
            ValueError,
            r"or path=None with a state_dict and a config",
        ),
        (None, {}, ValueError, r"got \[\] of path"),
        (
            None,
            {"config": model.config, "state_dict": [1]},
            TypeError,
            "state_dict is a list; it m",
        ),
        (None, {"config": model.config, "state_dict": {"a": 1}}, TypeError, r"\['a'\] is a int"),
        (
            None,
            {"config": model.config, "state_dict": on_meta},
            TypeError,
            "not on the meta device",
        ),
        (tmp_path, {"config": {"vocab_size": 9}}, TypeError, r"config is a dict; it must be a Lla"),
        (
            tmp_path,
            {"config": config_of("mistral")},
            TypeError,
            "is a MistralConfig; it must be a ",
        ),
        (
            tmp_path,
            {"ignore_missing": "lm_head"},
            TypeError,
            r"one str; pass a list .* \['lm_head'",
        ),
        (tmp_path, {"ignore_unexpected": "x"}, TypeError, r"ignore_unexpected='x' is one str"),
        (tmp_path, {"strict": "body"}, ValueError, "strict is 'body'; allowed are 'head', True"),
        (tmp_path, {"tie": "keep"}, TypeError, r"no argument 'tie'.*; allowed: \["),
    ]
    for path, options, error, message in refused:
        with pytest.raises(error, match=message):
            LlamaForCausalLM.from_pretrained(path, **options)
    with pytest.raises(TypeError, match="leave open which class to load; give a path that has"):
        AutoModelForCausalLM.from_pretrained(None, state_dict=state)


DTYPES: list[tuple[Any, Any]] = [
    (torch.float16, torch.float16),
    ("float16", torch.float16),
    ("torch.bfloat16", torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (None, torch.float32),
    ("auto", torch.bfloat16),
]


@pytest.mark.parametrize(("asked", "expected"), DTYPES)
def test_dtypes_by_both_names(asked: Any, expected: torch.dtype, tmp_path: Path) -> None:
    build("LlamaForCausalLM").bfloat16().save_pretrained(tmp_path)
    for given in ({"dtype": asked}, {"torch_dtype": asked}, {"dtype": asked, "torch_dtype": asked}):
        if asked is None and "dtype" not in given:
            continue  # no alias was given
        model = LlamaForCausalLM.from_pretrained(tmp_path, **given)
        assert {p.dtype for p in model.parameters()} == {expected}
        assert model.config.dtype == expected
    if asked not in (None, "torch.bfloat16"):
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=asked)
        assert theirs.dtype == expected


def test_dtypes_that_are_none(tmp_path: Path) -> None:
    build("LlamaForCausalLM").bfloat16().save_pretrained(tmp_path)
    both = {"dtype": torch.float16, "torch_dtype": torch.float32}
    assert LlamaForCausalLM.from_pretrained(tmp_path, **both).dtype == torch.float16
    assert LlamaForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    for wrong in (torch.int8, torch.float8_e4m3fn, "half", "int8", 16):
        for name in ("dtype", "torch_dtype"):
            with pytest.raises(ConfigError, match=r"allowed: \['bfloat16', 'float16', 'float32', "):
                LlamaForCausalLM.from_pretrained(tmp_path, **{name: wrong})
    config = config_of("llama")
    assert config.dtype is None
    # without a dtype in config.json, that of the first stored tensor
    assert LlamaForCausalLM.from_pretrained(tmp_path, config=config).dtype == torch.bfloat16


class Picky(LlamaForCausalLM):
    """Parts that stay in float32."""

    _keep_in_fp32_modules: ClassVar[tuple[str, ...]] = ("q_proj",)
    _keep_in_fp32_modules_strict: ClassVar[tuple[str, ...]] = ("lm_head", "norm")
    _keys_to_ignore_on_save: ClassVar[tuple[str, ...]] = ("lm_head.weight",)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, {"q_proj", "lm_head", "norm"}),
        (torch.bfloat16, {"lm_head", "norm"}),
        (torch.float64, set()),
    ],
)
def test_parts_that_stay_in_fp32(dtype: torch.dtype, kept: set[str], tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    whole = Picky.from_pretrained(tmp_path, dtype=dtype)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]  # what is initialised follows too
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for model in (whole, Picky.from_pretrained(tmp_path, dtype=dtype)):
        for name, parameter in model.named_parameters():
            expected = dtype if kept.isdisjoint(name.split(".")) else torch.float32
            assert parameter.dtype == expected, name


def test_gpt_oss_keeps_its_norms_in_fp32_as_theirs(tmp_path: Path) -> None:
    theirs, _ = pair("gpt_oss")
    theirs.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        other = transformers.GptOssForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        model = model_class("gpt_oss", "causal_lm").from_pretrained(tmp_path, dtype=dtype)
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        assert dtypes == {name: p.dtype for name, p in other.named_parameters()}
        assert model(tokens()).logits.dtype == dtype


def test_names_that_are_not_saved(tmp_path: Path) -> None:
    model = Picky(config_of("llama"))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(model.state_dict()) - {"lm_head.weight"}
    again, info = Picky.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)


def test_what_is_saved_instead_and_by_whom(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    ones = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "ones", state_dict=ones)
    assert equal(load_file(tmp_path / "ones" / "model.safetensors"), ones)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file; give a directory to save"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(TypeError, match=r"no argument 'max_shard' \(did you mean 'max_shard_size'"):
        model.save_pretrained(tmp_path, max_shard="5GB")


@pytest.mark.parametrize("attn", ["eager", "sdpa", "triton"])
def test_each_attention_loads_and_gives_the_same(attn: str, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", attn_implementation="eager")
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=attn)
    assert f"attn={attn}" in repr(again) and "implementation" not in again.config.to_json_string()
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, **CLOSE)
    assert {row.backend for row in again.kernel_report().rows if row.op == "attention"} == {attn}
    for name in ("flash_attention_2", "flash_attention_3", "flex_attention"):
        with pytest.raises(ValueError, match=f'^Specified attn_implementation="{name}".*triton'):
            LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=name)


def test_casts_of_every_shape(tmp_path: Path) -> None:
    class Shapes(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.empty = torch.nn.Parameter(torch.ones(0, 7))
            self.scalar = torch.nn.Parameter(torch.tensor(2.5))
            self.register_buffer("count", torch.tensor([3, 4]))

    model = Shapes(config_of("llama")).double()
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        again = Shapes.from_pretrained(tmp_path, dtype=dtype, strict=True)
        expected = bits(model.to(dtype))
        assert equal(bits(again), expected) and again.count.dtype == torch.int64
        storages = {p.untyped_storage().data_ptr() for p in again.parameters() if p.numel()}
        assert len(storages) == sum(p.numel() > 0 for p in again.parameters())
        model = Shapes.from_pretrained(tmp_path, dtype=torch.float64)


@pytest.mark.parametrize("option", ["offload_state_dict", "low_cpu_mem_usage"])
def test_options_that_are_always_so(option: str, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    assert equal(bits(LlamaForCausalLM.from_pretrained(tmp_path, **{option: True})), bits(model))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_whole_and_in_shards_there_and_back(name: str, tmp_path: Path) -> None:
    model = build(name)
    theirs = getattr(transformers, name)
    for size in ("5GB", "40KB"):
        model.save_pretrained(tmp_path / size / "sub", max_shard_size=size)
        assert (size == "40KB") == (len(list((tmp_path / size / "sub").glob("*.safetensors"))) > 1)
        other = theirs.from_pretrained(tmp_path / size / "sub")
        other.save_pretrained(tmp_path / size / "theirs", max_shard_size=size)
        for again in (
            type(model).from_pretrained(tmp_path / size, subfolder="sub"),
            type(model).from_pretrained(tmp_path / size / "theirs"),
        ):
            assert equal(bits(again), bits(model))
