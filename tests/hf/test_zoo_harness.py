"""The zoo's own instruments: what is planted is found, what is built is never neutral."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support import hf_zoo_coverage
from support.hf_zoo import build
from support.hf_zoo_coverage import (
    LEFT,
    PASSED,
    UNDONE,
    WRONG,
    ZOO,
    Verdict,
    examine,
    judge,
    listed,
)
from support.hf_zoo_treatments import PLANTED, TREATMENTS, Treatment
from support.hf_zoo_types import UNBUILT

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, in 300 models
SAMPLE = ("llama", "gemma3_text", "gpt2", "qwen3_moe", "bert", "deepseek_v3")
MIXED = [(name, planted) for name in SAMPLE for planted in PLANTED]


@pytest.mark.parametrize(("name", "planted"), MIXED, ids=[f"{n}-{p}" for n, p in MIXED])
def test_a_planted_mistake_is_found(name: str, planted: str) -> None:
    verdict = examine(ZOO["causal"][name], PLANTED[planted])
    expected = UNDONE if planted == "not undone" else WRONG
    assert verdict.ending == expected, str(verdict)


@pytest.mark.parametrize("name", SAMPLE)
def test_no_treatment_passes(name: str) -> None:
    verdict = examine(ZOO["causal"][name], Treatment("nothing", lambda _: None, lambda _: None))
    assert verdict == Verdict(PASSED)


@pytest.mark.parametrize("name", ["llama", "mamba2", "qwen3_moe"])
def test_a_build_is_repeatable_and_rough(name: str) -> None:
    one, other = build(ZOO["causal"][name]), build(ZOO["causal"][name])
    for (path, weight), same in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(weight, same), path
        assert float(weight.detach().std()) > 0.05, f"{path} is near constant"


def test_every_causal_type_is_in_the_zoo() -> None:
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - UNBUILT.keys() == ZOO["causal"].keys()
    assert len(ZOO["causal"]) >= 130
    assert len(ZOO["multimodal"]) >= 10
    assert len(ZOO["encoder"]) >= 12


def test_what_is_listed_is_in_the_zoo() -> None:
    known = listed()
    if known.pop("transformers", None) != transformers.__version__:
        pytest.skip("the list is of another transformers")
    for kind, types in known.items():
        assert not types.keys() - ZOO[kind].keys(), f"{kind} types that are not built any more"


@pytest.mark.parametrize(
    ("verdict", "expected", "fails"),
    [
        (Verdict(PASSED), "passed", False),
        (Verdict(PASSED), None, False),
        (Verdict(PASSED), "wrong: by far", False),
        (Verdict(LEFT, "no softcap"), "left: in other words", False),
        (Verdict(LEFT, "no softcap"), "passed", True),
        (Verdict(LEFT, "no softcap"), None, True),
        (Verdict(WRONG, "off"), "left: no softcap", True),
        (Verdict(PASSED, note="3 patched, 1 left"), "passed: 3 patched, 0 left", False),
        (Verdict(PASSED, note="2 patched, 2 left"), "passed: 3 patched, 1 left", True),
    ],
)
def test_the_list_decides(
    verdict: Verdict, expected: str | None, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        hf_zoo_coverage, "listed", lambda: {"transformers": transformers.__version__}
    )
    assert (judge(verdict, expected) is not None) == fails


def test_how_much_is_patched_is_known_of_the_lists_transformers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hf_zoo_coverage, "listed", lambda: {"transformers": "another"})
    assert judge(Verdict(PASSED, note="2 patched, 2 left"), "passed: 3 patched, 1 left") is None
    assert judge(Verdict(WRONG, "off"), "passed: 3 patched, 1 left") is not None


def test_types_that_lack_a_run_say_why() -> None:
    named = {*TREATMENTS["sdpa"].runs, "gradients", "steady rounding"}
    for entries in ZOO.values():
        for entry in entries.values():
            assert entry.lacks.keys() <= named and all(entry.lacks.values()), entry
