"""Which files make up the weights of a checkpoint directory, and do they agree with each other?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swathe.modeling.checkpoint import json_object, names
from swathe.modeling.checkpoint.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointWarning,
    listing,
)
from swathe.modeling.checkpoint.files import (
    CONFIG_CAP,
    read_small,
    require_plain_name,
    resolve_inside,
)
from swathe.modeling.checkpoint.header import Header, TensorInfo, read_header

POINTER = "transformers_weights"
INDEX_CAP = 64 * 2**20
_INDEX_SHAPE = "an object with 'weight_map': {tensor name: file name}"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_layout(directory: Path, variant: str | None = None) -> tuple[list[Header], dict[str, Any]]:
    """Every weight file of `directory`, validated, and the index's metadata.

    config.json may name the file to read in `transformers_weights`, as transformers allows; else
    it is model.safetensors or model.safetensors.index.json, with the variant's name in them
    (names.py). Raises CheckpointError, ValueError for a variant that is no part of a file name.
    """
    names.require_variant(variant)
    name = _explicit_name(directory) or _default_name(directory, variant)
    if name.endswith(".json"):
        return _sharded(directory, name)
    return [read_header(resolve_inside(directory, name), directory / name)], {}


def _explicit_name(directory: Path) -> str | None:
    path = directory / "config.json"
    if not path.exists():
        return None
    data = read_small(resolve_inside(directory, "config.json"), CONFIG_CAP, "E_CONFIG")
    config = json_object.parse(
        data, code="E_CONFIG", file=path, expected="a JSON object", constants=True
    )
    name = config.get(POINTER)
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            "E_CONFIG",
            f"{path}: {POINTER} is {name!r}; it must name a .safetensors or "
            ".safetensors.index.json file beside config.json",
            file=path,
            key=POINTER,
        )
    require_plain_name(name, file=path, key=POINTER)
    return name


def _present(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _default_name(directory: Path, variant: str | None) -> str:
    single, index = names.single(variant), names.index(variant)
    has_single, has_index = _present(directory / single), _present(directory / index)
    if has_single and has_index:
        shards = set(_weight_map(directory, index)[0].values())
        if any(_present(directory / shard) for shard in shards - {single}):
            raise CheckpointError(
                "E_AMBIGUOUS",
                f"{directory}: holds both {single} and {index} with its shards; delete the ones "
                "that are out of date",
                file=directory / single,
            )
        warnings.warn(
            f"{directory / index} is out of date (none of its shards exist) and is ignored; "
            f"{single} is read. Delete the index.",
            CheckpointWarning,
            stacklevel=2,
        )
    if has_single:
        return single
    if has_index:
        return index
    raise _nothing_to_read(directory, variant)


def _nothing_to_read(directory: Path, variant: str | None) -> CheckpointError:
    """What is there instead: other variants, pickles, or something else altogether."""
    single, index = names.single(variant), names.index(variant)
    there = sorted(p.name for p in directory.iterdir())
    found = [names.WeightFile.named(name) for name in there]
    others = sorted({f.variant for f in found if f and not f.id}, key=str)
    if others:
        return CheckpointNotFound(
            "E_MISSING_FILE",
            f"{directory}: has neither {single} nor {index}; the weights there can be read with "
            + " or ".join(f"variant={other!r}" for other in others),
            file=directory / single,
        )
    pickles = [name for name in there if name.endswith(_PICKLES)]
    if pickles:
        given = "dir" if variant is None else f"dir, variant={variant!r}"
        return CheckpointError(
            "E_PICKLE",
            f"{directory}: has only pickled weights ({listing(pickles, limit=4)}); only "
            ".safetensors is read, because unpickling can run code. If you trust it, convert with "
            f"transformers: AutoModelForCausalLM.from_pretrained({given}).save_pretrained({given})",
            file=directory / pickles[0],
        )
    return CheckpointNotFound(
        "E_MISSING_FILE",
        f"{directory}: has neither {single} nor {index}; it holds "
        f"{listing(there, limit=8) or 'nothing'}. Give the directory that has them, or save a "
        "model here with save_pretrained",
        file=directory / single,
    )


def _weight_map(directory: Path, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    path = directory / name
    data = read_small(resolve_inside(directory, name), INDEX_CAP, "E_INDEX")
    index = json_object.parse(data, code="E_INDEX", file=path, expected=_INDEX_SHAPE)
    weight_map, metadata = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "E_INDEX", f"{path}: 'weight_map' is missing or empty; expected {_INDEX_SHAPE}",
            file=path, key="weight_map",
        )  # fmt: skip
    for key, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                "E_INDEX",
                f"{path}: {key!r} maps to {shard!r}; expected {_INDEX_SHAPE}",
                file=path,
                key=key,
            )
    for shard, key in {shard: key for key, shard in weight_map.items()}.items():
        require_plain_name(shard, file=path, key=key)
        if not shard.endswith(".safetensors"):
            code = "E_PICKLE" if shard.endswith(_PICKLES) else "E_INDEX"
            raise CheckpointError(
                code,
                f"{path}: {key!r} lies in {shard!r}; only .safetensors files are read. "
                "Convert the checkpoint with transformers' save_pretrained",
                file=path,
                key=key,
            )
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _sharded(directory: Path, index: str) -> tuple[list[Header], dict[str, Any]]:
    weight_map, metadata = _weight_map(directory, index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not _present(directory / shard)]
    if missing:
        raise CheckpointNotFound(
            "E_MISSING_SHARD",
            f"{directory / index}: {len(missing)} of {len(shards)} shards are missing: "
            f"{listing(missing)}; download them again",
            file=directory / missing[0],
        )
    real = {shard: resolve_inside(directory, shard) for shard in shards}
    headers = [read_header(path, directory / shard) for shard, path in real.items()]
    _check_against_index(headers, weight_map, directory / index)
    own = names.WeightFile.named(index)
    stray = sorted(
        p.name
        for p in directory.glob("model*-of-*.safetensors")
        if p.name not in real and own is not None and names.WeightFile.named(p.name) == own
    )
    if stray:
        warnings.warn(
            f"{directory}: {listing(stray)} is not named in {index} and is ignored",
            CheckpointWarning,
            stacklevel=2,
        )
    return headers, metadata


def _check_against_index(headers: list[Header], weight_map: Mapping[str, str], index: Path) -> None:
    found: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.tensors.items():
            if name in found:
                raise CheckpointError(
                    "E_DUPKEY",
                    f"tensor {name!r} is in both {found[name].file} and {info.file}; "
                    "a name may appear once, so one of the shards is out of date",
                    file=info.file,
                    key=name,
                )
            found[name] = info
    wrong = [
        *(f"{name} (not in {shard})" for name, shard in weight_map.items()
          if name not in found or found[name].file.name != shard),
        *(f"{name} (in {info.file.name}, not in the index)" for name, info in found.items()
          if name not in weight_map),
    ]  # fmt: skip
    if wrong:
        raise CheckpointError(
            "E_INDEX_MISMATCH",
            f"{index}: the index and the shards disagree on {len(wrong)} tensors: {listing(wrong)}"
            "; they come from different checkpoints, so download or save them again",
            file=index,
            key=wrong[0].partition(" (")[0],
        )
