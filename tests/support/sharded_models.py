"""What two processes do with one tiny model, and what each of them found; run by spawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from support.hf_around import training
from support.tiny_causal import batch
from swathe.modeling.hf.patching.api import patch as creating
from swathe.modeling.hf.patching.patch import patch, unpatch

PROCESSES = 2


def on_two(work: Callable[..., dict[str, Any]], folder: Path, *args: Any) -> list[dict[str, Any]]:
    """What `work(rank, folder, *args)` returned in each of two gloo processes."""
    torch.multiprocessing.spawn(_run, (work, folder, args), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def _run(rank: int, work: Callable[..., dict[str, Any]], folder: Path, args: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    try:
        torch.save(work(rank, folder, *args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rows(rank: int | None = None) -> dict[str, torch.Tensor]:
    """Two rows of tokens with as many labels each; the one of `rank`."""
    ids = batch()["input_ids"]
    ids = ids if rank is None else ids[rank : rank + 1]
    return {"input_ids": ids, "labels": ids.clone()}


def trained(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss, gradients and parameters of one step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        found[f"{name}.grad"] = whole(p.grad)
    optimizer.step()
    return found | {name: whole(p) for name, p in model.named_parameters()}


def whole(t: torch.Tensor) -> torch.Tensor:
    """The tensor that all processes hold together."""
    full = t.full_tensor() if isinstance(t, DTensor) else t
    return full.detach().clone()


def fsdp(rank: int, folder: Path, cases: tuple[tuple[str, str, str], ...]) -> dict[Any, Any]:
    """What `_fsdp` finds, by case."""
    return {case: _fsdp(rank, *case) for case in cases}


def _fsdp(rank: int, model_type: str, first: str, backend: str) -> dict[str, Any]:
    """One step of a model that fully_shard spreads, patched before or after."""
    model = training(model_type)
    report = patch(model, backend=backend) if first == "patch" else None
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if report is None:
        report = patch(model, backend=backend)
    result: dict[str, Any] = trained(model, rows(rank))
    refusal = ""
    try:
        unpatch(model)
    except RuntimeError as error:
        refusal = str(error)
    return {"found": result, "report": report.to_dict(), "refusal": refusal}


def tensor_parallel(rank: int, folder: Path, cases: tuple[tuple[str, str], ...]) -> dict[Any, Any]:
    """What `_tensor_parallel` finds, by case."""
    return {case: _tensor_parallel(folder / case[0], *case) for case in cases}


def _tensor_parallel(folder: Path, model_type: str, first: str) -> dict[str, Any]:
    """Logits, loss and gradients of a model that tp_plan="auto" spreads, with a patch or without.

    `first` is "creation" for `swathe.patch(model_type)`, else it is patched after loading.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    config = DistributedConfig(tp_size=PROCESSES, tp_plan="auto")

    def loaded() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, distributed_config=config
        ).train()

    plain = loaded()
    if first == "creation":
        with creating(model_type) as creation:
            model = loaded()
        ((_, report),) = creation.reports
    else:
        model = loaded()
        report = patch(model)
    return {"found": outcome(model), "own": outcome(plain), "report": report.to_dict()}


def by_hand(rank: int, folder: Path, cases: tuple[tuple[str, str, str], ...]) -> dict[Any, Any]:
    """What `_by_hand` finds, by case."""
    return {case: _by_hand(*case) for case in cases}


def _by_hand(model_type: str, plan: str, backend: str) -> dict[str, Any]:
    """Logits, loss and gradients of a model that a plan of ours spreads, patched before or never.

    "found" is of the patched model, "own" of one without a patch, "undone" of the first one,
    unpatched; a text is the error that was raised instead.
    """
    result = {}
    for name in ("found", "own"):
        model = training(model_type)
        if name == "found":
            patch(model, backend=backend)
        model = SPREAD[plan](model)
        result[name] = _tried(model)
        if name == "found":
            unpatch(model)
            result["undone"] = _tried(model)
    return result


def _tried(model: Any) -> dict[str, torch.Tensor] | str:
    model.zero_grad()
    try:
        return outcome(model)
    except RuntimeError as error:
        return str(error)


def _torchs(model: Any, **layouts: Any) -> Any:
    """torch's parallelize_module: heads and features of MLPs, the vocabulary of embedding and head.

    `layouts` are the embedding's.
    """
    mesh = init_device_mesh("cpu", (PROCESSES,))
    split, joined = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, Any] = {f"mlp.{name}_proj": split for name in ("gate", "up")}
    plan["mlp.down_proj"] = joined
    if not hasattr(model.model.layers[0].self_attn, "q_norm"):  # of whose gradient each has a part
        plan |= {f"self_attn.{name}_proj": split for name in "qkv"}
        plan["self_attn.o_proj"] = joined
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    ends: dict[str, Any] = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    if layouts:
        return parallelize_module(
            model, mesh, {**ends, "model.embed_tokens": RowwiseParallel(**layouts)}
        )
    weight = distribute_tensor(model.model.embed_tokens.weight.detach(), mesh, [Replicate()])
    model.model.embed_tokens.weight = torch.nn.Parameter(weight)
    return parallelize_module(model, mesh, ends)


def _transformers(model: Any) -> Any:
    """What from_pretrained does with tp_plan="auto", on a model that has its weights."""
    from transformers.distributed.configuration_utils import DistributedConfig

    config, _, mesh = model.prepare_distribute_model(
        DistributedConfig(tp_size=PROCESSES, tp_plan="auto"), None
    )
    return model.maybe_distribute_model(model, config, mesh)


SPREAD: dict[str, Callable[[Any], Any]] = {
    "torch": lambda model: _torchs(model, input_layouts=Replicate()),
    "no layout": _torchs,
    "transformers": _transformers,
}


def outcome(model: Any) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient of a step on both rows."""
    output = model(**rows(), use_cache=False)
    output.loss.backward()
    found = {"logits": output.logits[:], "loss": output.loss}
    found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: whole(t) for name, t in found.items()}
