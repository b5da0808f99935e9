"""Loading holds the model and one stored tensor: measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
# VmHWM is the most that the process has held; writing 5 starts it again
MEASURE = """
import json, re, sys
import torch
torch.set_num_threads(1)
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM
def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
small, large, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
LlamaForCausalLM.from_pretrained(small, progress=False, **options)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = LlamaForCausalLM.from_pretrained(large, progress=False, **options)
print(json.dumps({
    "grown": status("VmHWM") - before,
    "model": model.get_memory_footprint(),
    "largest": max(p.nbytes for p in model.parameters()),
}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="read from /proc")
@pytest.mark.parametrize(
    ("options", "shards"),
    [
        ({"dtype": "float32"}, "5GB"),
        ({"dtype": "bfloat16"}, "5GB"),
        ({"dtype": "bfloat16", "offload_state_dict": True}, "20MB"),
    ],
    ids=str,
)
def test_the_most_that_a_load_holds(options: dict[str, Any], shards: str, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(
        tmp_path / "large", max_shard_size=shards
    )
    few = LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "vocab_size": 50})
    LlamaForCausalLM(few).save_pretrained(tmp_path / "small")
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), json.dumps(options)]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["model"] > 80e6
    stored = found["largest"] * (2 if options["dtype"] == "bfloat16" else 1)  # they are fp32
    limit = found["model"] + stored + 8e6
    assert found["grown"] < limit, found
    assert limit < 1.25 * found["model"] + found["largest"], "the bound is a tight one"
