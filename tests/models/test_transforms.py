"""Weight transforms are exact both ways, and transformers reads what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from swathe.modeling.checkpoint.assembly import Assembly
from swathe.modeling.checkpoint.reader import Checkpoint, load_into
from swathe.modeling.checkpoint.transforms import (
    Concatenate,
    Joined,
    Split,
    Transpose,
    WeightTransform,
    to_stored,
)
from swathe.modeling.checkpoint.writer import save
from swathe.modeling.config import PreTrainedConfig
from swathe.modeling.layers.moe import MIXTRAL_TRANSFORMS, QWEN_MOE_TRANSFORMS
from swathe.modeling.model import PreTrainedModel

FUSED_QKV = WeightTransform(
    "attn.qkv.weight",
    ("attn.q.weight", "attn.k.weight", "attn.v.weight"),
    (Split(dim=0, sizes=(4, 2, 2)),),
)
# (transforms, shapes of the parameters, names in the file)
CASES: dict[str, tuple[Sequence[WeightTransform], dict[str, tuple[int, ...]], set[str]]] = {
    "none": ((), {"a": (2, 3)}, {"a"}),
    "renamed": ((WeightTransform("old.w", "new.w"),), {"x.new.w": (3,)}, {"x.old.w"}),
    "numbered": (
        (WeightTransform("h.{layer}.c.w", "layers.{layer}.m.w"),),
        {"layers.0.m.w": (2,), "layers.12.m.w": (2,)},
        {"h.0.c.w", "h.12.c.w"},
    ),
    "stacked": (
        (WeightTransform("mlp.{expert}.w", "mlp.w"),),
        {"l.0.mlp.w": (3, 2, 5)},
        {f"l.0.mlp.{e}.w" for e in range(3)},
    ),
    "gate and up": (
        QWEN_MOE_TRANSFORMS,
        {"mlp.experts.gate_up_proj": (2, 6, 5), "mlp.experts.down_proj": (2, 5, 3)},
        {f"mlp.experts.{e}.{w}_proj.weight" for e in range(2) for w in ("gate", "up", "down")},
    ),
    "unequal parts": (
        (WeightTransform(("a.w", "b.w"), "ab.w", (Concatenate(dim=-1, sizes=(1, 3)),)),),
        {"ab.w": (2, 4)},
        {"a.w", "b.w"},
    ),
    "joined by columns, transposed": (
        (WeightTransform(("e.{i}.a", "e.{i}.b"), "e.ab", (Transpose(), Concatenate(dim=2))),),
        {"e.ab": (3, 4, 6)},
        {f"e.{i}.{w}" for i in range(3) for w in "ab"},
    ),
    "cut": (
        (FUSED_QKV,),
        {f"l.{i}.attn.{p}.weight": (4 if p == "q" else 2, 3) for i in range(2) for p in "qkv"},
        {"l.0.attn.qkv.weight", "l.1.attn.qkv.weight"},
    ),
    "cut, transposed": (
        (WeightTransform("c.w", ("a.w", "b.w"), (Transpose(0, 1), Split(dim=0))),),
        {"a.w": (3, 5), "b.w": (3, 5)},
        {"c.w"},
    ),
}  # fmt: skip
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.itemsize])


def noise(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern at all, NaNs with payloads and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(dtype)


def read_back(
    stored: Mapping[str, Tensor | Joined],
    wanted: Mapping[str, Tensor],
    transforms: Sequence[WeightTransform],
) -> dict[str, Tensor]:
    """What loading makes of stored tensors, given in any order."""
    assembly = Assembly(wanted, list(stored), transforms, "")
    assert {k: v.shape for k, v in assembly.wanted.items()} == {
        k: v.shape for k, v in stored.items()
    }
    for key in sorted(stored, reverse=True):
        value = stored[key]
        whole = value.assemble() if isinstance(value, Joined) else value.clone()
        assembly.place(key, whole, lambda name: "cpu")
    return assembly.parameters


@pytest.mark.parametrize("case", CASES)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8]),
    seed=st.integers(0, 2**31),
)
def test_inverse_is_exact(case: str, dtype: torch.dtype, seed: int) -> None:
    transforms, shapes, names = CASES[case]
    given_ = {name: noise(shape, dtype, seed + i) for i, (name, shape) in enumerate(shapes.items())}
    stored = to_stored(given_, transforms)
    assert set(stored) == names
    found = read_back(stored, given_, transforms)
    assert found.keys() == given_.keys()
    for name, value in given_.items():
        assert found[name].dtype == dtype and found[name].is_contiguous()
        assert torch.equal(bits(found[name]), bits(value)), name


def test_what_goes_where() -> None:
    gate_up = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    stored = to_stored({"mlp.experts.gate_up_proj": gate_up}, QWEN_MOE_TRANSFORMS)
    assert list(stored) == [
        f"mlp.experts.{e}.{w}_proj.weight" for e in range(2) for w in ("gate", "up")
    ]
    for e in range(2):
        assert torch.equal(stored[f"mlp.experts.{e}.gate_proj.weight"], gate_up[e, :2])
        assert torch.equal(stored[f"mlp.experts.{e}.up_proj.weight"], gate_up[e, 2:])
        view = stored[f"mlp.experts.{e}.up_proj.weight"]
        assert view.untyped_storage().data_ptr() == gate_up.untyped_storage().data_ptr()
    q, k, v = torch.ones(4, 3), torch.ones(2, 3) * 2, torch.ones(2, 3) * 3
    parts = {"attn.q.weight": q, "attn.k.weight": k, "attn.v.weight": v}
    (joined,) = to_stored(parts, [FUSED_QKV]).values()
    assert isinstance(joined, Joined)
    assert (joined.shape, joined.nbytes, joined.itemsize) == ((8, 3), 96, 4)
    assert joined.assemble()[:, 0].tolist() == [1, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("max_shard_size", [10**9, 200])
@pytest.mark.parametrize("case", [case for case in CASES if case != "none"])
def test_files(tmp_path: Path, case: str, max_shard_size: int) -> None:
    transforms, shapes, names = CASES[case]
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save(tmp_path, config_json="{}", tensors=tensors, transforms=transforms,
         max_shard_size=max_shard_size)  # fmt: skip
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == names
    found = read_back({n: checkpoint.read(n) for n in checkpoint.tensors}, tensors, transforms)
    for name, value in tensors.items():
        assert torch.equal(found[name], value)


@pytest.mark.parametrize(
    ("tensors", "transforms", "message"),
    [
        ({"a.w": (2,), "b.w": (2,)}, [WeightTransform("b.w", "a.w")], "would be stored as 'b.w'"),
        ({"attn.q.weight": (4, 3)}, [FUSED_QKV], r"stored in one tensor with \['attn.k.weight'"),
        ({"ab": (3, 2)}, [WeightTransform(("a", "b"), "ab", (Concatenate(0),))], "cannot be cut"),
        (
            {"ab": (3, 2)},
            [WeightTransform(("a", "b"), "ab", (Concatenate(0, (1, 1)),))],
            r"\(3, 2\) cannot be cut into \(1, 1\)",
        ),
    ],
)
def test_what_cannot_be_stored(tensors: Any, transforms: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_stored({name: torch.ones(shape) for name, shape in tensors.items()}, transforms)


def test_parts_of_one_stored_tensor_have_one_dtype() -> None:
    parts = {f"attn.{p}.weight": torch.ones(n, 3) for p, n in (("q", 4), ("k", 2), ("v", 2))}
    parts["attn.v.weight"] = parts["attn.v.weight"].half()
    with pytest.raises(ValueError, match=r"\['float16', 'float32'\]; convert them to one dtype"):
        to_stored(parts, [FUSED_QKV])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("a", "b"), ("c", "d"), (Concatenate(0), Split(0))), "one side must be one tensor"),
        ((("a", "b"), "c"), "2 sources and 0 Concatenate"),
        (("a", "c", (Concatenate(0),)), "1 sources and 1 Concatenate"),
        (("a", ("c", "d")), "2 targets and 0 Split"),
        (("a", "c", (Split(0),)), "1 targets and 1 Split"),
        (("a.{i}", ("c", "d"), (Split(0),)), "at most one more"),
        (("a.{i}.{j}", "c"), "at most one more"),
        (("a", "c.{i}"), "every number of a target"),
        ((("a.{i}", "b.{j}"), "c", (Concatenate(0),)), "sources with the same numbers"),
        (((), "c"), "sources with the same numbers"),
        ((("a", "b"), "c", (Concatenate(0, (1, 2, 3)),)), "give one size a tensor"),
    ],
)
def test_wrong_declarations(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightTransform(*arguments)


class FusedConfig(PreTrainedConfig):
    model_type: ClassVar[str] = "fused_for_test"
    hidden_size: int = 3


class Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q = nn.Linear(hidden, 4, bias=False)
        self.k = nn.Linear(hidden, 2, bias=False)
        self.v = nn.Linear(hidden, 2, bias=False)


class Fused(PreTrainedModel):
    config_class = FusedConfig
    base_model_prefix = ""
    _weight_transforms = (FUSED_QKV, WeightTransform("head.{i}.w", "heads"))

    def __init__(self, config: FusedConfig) -> None:
        super().__init__(config)
        self.attn = Attention(config.hidden_size)
        self.heads = nn.Parameter(torch.randn(2, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


@pytest.mark.parametrize("max_shard_size", ["1GB", 64])
def test_models_declare_them(tmp_path: Path, max_shard_size: Any) -> None:
    model = Fused(FusedConfig())
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert set(Checkpoint.open(tmp_path).tensors) == {"attn.qkv.weight", "head.0.w", "head.1.w"}
    again, info = Fused.from_pretrained(tmp_path, output_loading_info=True)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not info["missing_keys"] and not info["unexpected_keys"]


TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}


def mixtral() -> tuple[type[Any], Any]:
    config = transformers.MixtralConfig(**TINY, num_hidden_layers=2, num_local_experts=11)
    return transformers.MixtralForCausalLM, config


def qwen3_moe() -> tuple[type[Any], Any]:
    config = transformers.Qwen3MoeConfig(
        **TINY,
        num_hidden_layers=3,
        head_dim=8,
        moe_intermediate_size=8,
        num_experts=4,
        mlp_only_layers=[1],
    )
    return transformers.Qwen3MoeForCausalLM, config


FAMILIES = {"mixtral": (mixtral, MIXTRAL_TRANSFORMS), "qwen3_moe": (qwen3_moe, QWEN_MOE_TRANSFORMS)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "3KB"])
def test_transformers_checkpoints_there_and_back(
    tmp_path: Path, family: str, dtype: torch.dtype, shard: str
) -> None:
    make, transforms = FAMILIES[family]
    cls, config = make()
    torch.manual_seed(0)
    theirs = cls(config).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    checkpoint = Checkpoint.open(tmp_path / "theirs")
    memory = theirs.state_dict()
    assert set(checkpoint.tensors) != set(memory)

    # into modules with the names that transformers' have in memory
    with torch.device("meta"):
        model = cls(config)
    load_into(model, checkpoint, dtype=None, device="cpu", tied={}, prefix="model", strict=True,
              transforms=transforms)  # fmt: skip
    found = model.state_dict()
    assert list(found) == list(memory)
    for name, value in memory.items():
        assert found[name].dtype == dtype and torch.equal(found[name], value), name

    files = save(tmp_path / "ours", config_json=(tmp_path / "theirs/config.json").read_text(),
                 tensors=found, transforms=transforms, max_shard_size=shard)  # fmt: skip
    assert (len(files) > 1) == (shard == "3KB")
    ours = {name: value for file in files for name, value in load_file(file).items()}
    assert set(ours) == set(checkpoint.tensors)
    for name, value in ours.items():
        assert torch.equal(value, checkpoint.read(name)), name

    again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in again.state_dict().items():
        assert torch.equal(value, memory[name]), name
