"""A patched model spread over two gloo processes by FSDP2, and by transformers' tp_plan="auto"."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

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


@pytest.mark.parametrize(
    "model_type, first, backend",
    [
        ("llama", "patch", "auto"),
        ("llama", "patch", "eager"),
        ("llama", "fully_shard", "eager"),
        ("qwen3", "patch", "auto"),
    ],
)
def test_fsdp_takes_the_step_of_one_process(
    model_type: str, first: str, backend: str, tmp_path: Path
) -> None:
    one = sharded_models.trained(training(model_type), sharded_models.rows())
    both = on_two(sharded_models.fsdp, tmp_path, model_type, first, backend)
    found = [result["found"] for result in both]
    losses = [result.pop("loss") for result in found]
    torch.testing.assert_close(sum(losses) / 2, one.pop("loss"))
    for result in found:
        assert_equal(result, one)
    for result in both:
        rows = result["report"]["rows"]
        ops = {row["op"] for row in rows if row["action"] == "patched"}
        if first == "patch":
            assert {"rms_norm", "gated_mlp_act", "residual_norm"} <= ops
            assert "its class was changed again" in result["refusal"]
        else:
            assert not result["refusal"]
            norms = [row["reason"] for row in rows if row["op"] == "rms_norm"]
            assert norms and all("DTensor" in reason for reason in norms)


@pytest.mark.skipif(
    find_spec("transformers.distributed") is None, reason="this transformers shards otherwise"
)
@pytest.mark.parametrize("first", ["patch", "creation", "tensor parallelism"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_tensor_parallelism_gives_what_one_process_gives(
    model_type: str, first: str, tmp_path: Path
) -> None:
    model = training(model_type)
    model.save_pretrained(tmp_path / "model")
    one = sharded_models.outcome(model)
    for result in on_two(sharded_models.tensor_parallel, tmp_path, model_type, first):
        assert_equal(result["own"], one, 1e-4)
        assert_equal(result["found"], one, 1e-4)
        assert any(row["action"] == "patched" for row in result["report"]["rows"])
