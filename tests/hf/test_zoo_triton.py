"""A few types of the zoo on Triton's kernels alone, attention among them; interpreted on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from support.hf_zoo_coverage import PASSED, ZOO, examine
from support.hf_zoo_treatments import TRITON

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    # "error:::swathe" would hit what transformers tells the caller of a forward, which is ours here
    pytest.mark.filterwarnings("error::UserWarning:swathe"),
]
# how many modules, the head and its loss among them, run a Triton kernel; gemma2 has a softcap and
# windows, gpt_oss sinks and windows
TYPES = {
    ("causal", "llama"): 12,
    ("causal", "gemma2"): 16,
    ("causal", "gpt_oss"): 10,
    ("encoder", "bert"): 10,
}


@pytest.mark.parametrize(("kind", "name"), TYPES, ids=[name for _, name in TYPES])
def test_is_the_same_model(kind: str, name: str, record_property: Any) -> None:
    verdict = examine(ZOO[kind][name], TRITON)
    record_property("zoo", [kind, name, TRITON.name, *verdict])
    assert verdict.ending == PASSED, verdict
    assert int(verdict.note.split()[0]) == TYPES[kind, name], verdict
