"""A patched model among its neighbours: copies, checkpoints, hooks, graphs, PEFT, accelerate."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.hf_patching import BACKEND, counted, tiny, token_ids
from swathe.modeling.hf.patching import mlps, norms
from swathe.modeling.hf.patching import patch as engine
from swathe.modeling.hf.patching.patch import patch, unpatch

# transformers and peft ask each other for names that are to go
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

KERNELS = ((norms, "rms_norm"), (mlps, "gated_mlp_act"))
EACH = 7  # calls of a kernel in one forward of two layers: five norms, two MLPs


@pytest.fixture(autouse=True)
def _norms_and_mlps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FINDERS", (norms.find, mlps.find))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ready()  # proves what is proven once in a process, before calls are counted
    return counted(monkeypatch, *KERNELS)


def ready(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(family, dtype)
    assert len(patch(model, backend=BACKEND).patched) >= EACH
    return model


def loss(model: Any) -> Tensor:
    ids = token_ids()
    found: Tensor = model(ids, labels=ids, use_cache=False).loss
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(ours: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    assert ours.keys() == own.keys()
    for name, found in ours.items():
        torch.testing.assert_close(found, own[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_copy_is_patched_and_has_parameters_and_a_ledger_of_its_own(calls: list[str]) -> None:
    model = ready()
    other = copy.deepcopy(model)
    calls.clear()
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert other(token_ids()).logits.abs().max() == 0 and len(calls) == EACH
    assert model(token_ids()).logits.abs().max() > 0
    unpatch(other)
    assert type(other.model.norm) is type(tiny("llama").model.norm)
    assert type(model.model.norm) is not type(other.model.norm)
    calls.clear()
    loss(other)
    assert calls == []
    loss(model)
    assert len(calls) == EACH


def test_pickle_keeps_the_patch(calls: list[str]) -> None:
    model = ready()
    made = pickle.loads(pickle.dumps(model))
    assert torch.equal(loss(made), loss(model)) and len(calls) == 2 * EACH
    assert type(made.model.norm) is type(model.model.norm)
    unpatch(made)
    assert type(made.model.norm) is type(tiny("llama").model.norm)


def test_another_process_reads_what_torch_save_wrote(tmp_path: Path) -> None:
    model = ready()
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "import swathe\n"
        "assert 'already' in swathe.patch(model).note\n"
        "ids = torch.arange(3, 15)[None]\n"
        "ours = model(ids).logits\n"
        "swathe.unpatch(model)\n"
        "torch.testing.assert_close(model(ids).logits, ours)\n"
    )
    root = Path(__file__).parents[2]
    run = [sys.executable, "-c", code]
    made = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr


def test_the_checkpoint_never_knows(tmp_path: Path) -> None:
    model, other = ready(), tiny("llama")
    assert list(model.state_dict()) == list(other.state_dict())
    assert repr(model) == repr(other)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in other.named_modules()]
    model.save_pretrained(tmp_path / "ours")
    other.save_pretrained(tmp_path / "own")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    read = type(other).from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(loss(read), loss(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert b"swathe" not in buffer.getvalue()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, calls: list[str]) -> None:
    model, other = ready().train(), tiny("llama").train()
    own = gradients(other)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(gradients(model), own)
    assert len(calls) == EACH + 6  # the layers' once more


def test_one_graph() -> None:
    model, other = ready().train(), tiny("llama").train()
    own = gradients(other)
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled_other = torch.compile(other, fullgraph=True, backend="aot_eager")
    same({"loss": loss(compiled)}, {"loss": loss(model)})
    assert counter.frame_count == 1
    names = [str(n.target) for g in counter.graphs for n in g.graph.nodes]
    if BACKEND == "cpp":
        assert sum("autograd_function_apply" in name for name in names) == EACH
    model.zero_grad()
    loss(compiled).backward()
    same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, own)
    same({"loss": loss(compiled_other)}, {"loss": loss(other)})
    assert counter.frame_count == 1


def test_hooks_run_and_hidden_states_are_kept() -> None:
    model, other, seen = ready(), tiny("llama"), []
    layer = model.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp, layer.mlp.gate_proj, layer.mlp.act_fn):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        module.register_full_backward_hook(lambda module, *_: seen.append("backward"))
    same(gradients(model), gradients(other))
    assert sorted(seen) == sorted(
        ["LlamaRMSNorm", "LlamaMLP", "Linear", "SiLUActivation", *["backward"] * 4]
    )
    wanted = {"output_hidden_states": True, "output_attentions": True}
    other.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    ours, own = model(token_ids(), **wanted), other(token_ids(), **wanted)
    assert len(ours.hidden_states) == len(own.hidden_states) == 3
    assert len(ours.attentions) == len(own.attentions) == 2
    torch.testing.assert_close(ours.hidden_states, own.hidden_states)


def test_generate() -> None:
    model, other = ready(), tiny("llama")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    for implementation in ("dynamic", "static"):
        found = model.generate(token_ids(), cache_implementation=implementation, **options)
        own = other.generate(token_ids(), cache_implementation=implementation, **options)
        assert torch.equal(found, own)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "qwen3"])
def test_autocast_gives_what_it_gave(family: str) -> None:
    model, other, ids = tiny(family), tiny(family), token_ids()
    patch(model, backend=BACKEND)
    with torch.autocast("cpu", torch.bfloat16):
        ours, own = model(ids), other(ids)
    assert ours.logits.dtype == own.logits.dtype
    torch.testing.assert_close(ours.logits.float(), own.logits.float(), rtol=0.03, atol=0.03)
    hidden = [m for m in model.modules() if "Norm" in type(m).__name__]
    theirs = [m for m in other.modules() if "Norm" in type(m).__name__]
    for norm, plain in zip(hidden, theirs, strict=True):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, norm.weight.shape[0], dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16):
                a, b = norm(x), plain(x)
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


def test_lora_over_a_patched_mlp_and_under_it(calls: list[str]) -> None:
    peft = pytest.importorskip("peft")
    given = {"target_modules": ["gate_proj", "down_proj"], "modules_to_save": ["norm"]}
    config = peft.LoraConfig(r=2, init_lora_weights=False, **given)

    def wrapped(model: nn.Module) -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    own = wrapped(tiny("llama"))
    expected = gradients(own)
    assert any("lora_A" in name for name in expected)
    before = wrapped(ready())
    calls.clear()
    same(gradients(before), expected)
    assert len(calls) == EACH
    after = wrapped(tiny("llama"))
    assert len(patch(after, backend=BACKEND).patched) >= EACH
    same(gradients(after), expected)
    assert "already" in patch(before).note
    unpatch(before)
    calls.clear()
    same(gradients(before), expected)
    assert calls == []  # in no copy that modules_to_save made either


def hooks_on(model: nn.Module, seen: list[str]) -> Callable[[], None]:
    hooks = pytest.importorskip("accelerate.hooks")

    class Counting(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return args, kwargs

    kinds = ("Norm", "MLP")
    hooked = [m for m in model.modules() if type(m).__name__.endswith(kinds)]
    for module in hooked:
        hooks.add_hook_to_module(module, Counting())

    def remove() -> None:
        for module in hooked:
            hooks.remove_hook_from_module(module)

    return remove


def test_hooks_of_accelerate_from_before(calls: list[str]) -> None:
    model, seen, own = tiny("llama"), [], loss(tiny("llama"))
    remove = hooks_on(model, seen)
    before = [(m, dict(vars(m))) for m in model.modules()]
    patch(model, backend=BACKEND)
    torch.testing.assert_close(loss(model), own)
    assert len(calls) == len(seen) == EACH
    unpatch(model)
    for module, own_dict in before:
        assert all(vars(module)[name] is value for name, value in own_dict.items())
    assert torch.equal(loss(model), own) and len(calls) == EACH and len(seen) == 2 * EACH
    patch(model, backend=BACKEND)
    remove()
    loss(model)
    assert len(calls) == 2 * EACH and len(seen) == 2 * EACH
    unpatch(model)
    assert torch.equal(loss(model), own) and len(calls) == 2 * EACH


def test_hooks_of_accelerate_from_after(calls: list[str]) -> None:
    model, seen, own = ready(), [], loss(tiny("llama"))
    remove = hooks_on(model, seen)
    torch.testing.assert_close(loss(model), own)
    assert len(calls) == len(seen) == EACH
    unpatch(model)
    assert torch.equal(loss(model), own) and len(calls) == EACH and len(seen) == 2 * EACH
    remove()
    assert torch.equal(loss(model), own) and len(calls) == EACH


def test_frozen_weights_and_inference_mode(calls: list[str]) -> None:
    model = ready()
    model.requires_grad_(False)
    with torch.inference_mode():
        model(token_ids())
    assert len(calls) == EACH
    model.model.embed_tokens.requires_grad_(True)
    assert set(gradients(model)) == {"model.embed_tokens.weight"}


def test_a_class_changed_after_the_patch_is_not_taken_back_silently() -> None:
    model = ready()
    layer = model.model.layers[0]
    layer.mlp.__class__ = type("Sharded", (type(layer.mlp),), {})
    before = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="cannot unpatch a Sharded: its class was changed"):
        unpatch(model)
    assert [type(m) for m in model.modules()] == before


def test_a_model_of_transformers_is_never_swapped() -> None:
    from swathe.modeling.hf.patching.swaps import Undo, fused_class, why_not_swapped

    model = tiny("llama")
    assert "PreTrainedModel" in str(why_not_swapped(model.model))
    with pytest.raises(TypeError, match="is a PreTrainedModel"):
        fused_class(type(model.model), lambda self: None, op="none")
    with pytest.raises(TypeError, match="changes instances"):
        Undo().set(type(model), "forward", None)
