"""A patched model spread over two gloo processes: by FSDP2, tp_plan="auto", and plans by hand."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch

from support import sharded_models
from support.hf_around import training
from support.hf_patching import assert_equal
from support.sharded_models import on_two

pytestmark = [
    pytest.mark.multi,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the mesh is of CPUs"),
]

_NEWER = find_spec("transformers.distributed.tensor_parallel") is not None
FSDP = (
    ("llama", "patch", "auto"),
    ("llama", "patch", "eager"),
    ("llama", "fully_shard", "eager"),
    ("qwen3", "patch", "auto"),
)
TENSORS = tuple(product(("llama", "qwen3"), ("creation", "tensor parallelism")))
HAND = tuple(product(("llama", "qwen3"), sharded_models.SPREAD, ("auto", "eager")))


@pytest.fixture(scope="module")
def spread_by_fsdp(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_two(sharded_models.fsdp, tmp_path_factory.mktemp("fsdp"), FSDP)


@pytest.fixture(scope="module")
def spread_by_tensors(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    if not _NEWER:
        pytest.skip("this transformers shards otherwise")
    folder = tmp_path_factory.mktemp("tensors")
    for model_type in dict(TENSORS):
        training(model_type).save_pretrained(folder / model_type)
    return on_two(sharded_models.tensor_parallel, folder, TENSORS)


@pytest.fixture(scope="module")
def spread_by_hand(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    cases = [case for case in HAND if case[1] != "transformers" or _NEWER]
    return on_two(sharded_models.by_hand, tmp_path_factory.mktemp("hand"), tuple(cases))


@pytest.mark.parametrize("case", FSDP, ids="-".join)
def test_fsdp_takes_the_step_of_one_process(
    case: tuple[str, str, str], spread_by_fsdp: list[Any]
) -> None:
    one = sharded_models.trained(training(case[0]), sharded_models.rows())
    both = [found[case] for found in spread_by_fsdp]
    losses = torch.stack([result["found"].pop("loss") for result in both])
    torch.testing.assert_close(losses.mean(), one.pop("loss"))
    for result in both:
        assert_equal(result["found"], one)
        rows = result["report"]["rows"]
        ops = {row["op"] for row in rows if row["action"] == "patched"}
        if case[1] == "patch":
            assert {"rms_norm", "gated_mlp_act", "residual_norm"} <= ops
            assert "its class was changed again" in result["refusal"]
        else:
            norms = [row for row in rows if row["op"] == "rms_norm"]
            assert norms and all("DTensor" in row["reason"] for row in norms)


@pytest.mark.parametrize("case", TENSORS, ids="-".join)
def test_tensor_parallelism_gives_what_one_process_gives(
    case: tuple[str, str], spread_by_tensors: list[Any]
) -> None:
    one = sharded_models.outcome(training(case[0]))
    for found in spread_by_tensors:
        result = found[case]
        assert_equal(result["own"], one, 1e-4)
        assert_equal(result["found"], one, 1e-4)
        assert any(row["action"] == "patched" for row in result["report"]["rows"])


@pytest.mark.parametrize("case", HAND, ids="-".join)
def test_a_plan_by_hand_after_the_patch_gives_what_it_gives_without(
    case: tuple[str, str, str], spread_by_hand: list[Any]
) -> None:
    model_type, plan, _ = case
    if case not in spread_by_hand[0]:
        pytest.skip("this transformers shards otherwise")
    one = sharded_models.outcome(training(model_type))
    for both in spread_by_hand:
        found = both[case]
        if plan == "no layout":  # torch refuses plain tokens for a DTensor, patched or not
            assert "embedding.default got mixed" in found["own"]
            assert found["found"] == found["undone"] == found["own"]
            continue
        assert_equal(found["own"], one, 1e-4)
        assert_equal(found["found"], one, 1e-4)
        assert_equal(found["undone"], found["own"], 0.0)
