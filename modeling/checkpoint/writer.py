"""Saving a checkpoint so that a crash at any moment leaves the old one or the new one, whole.

A checkpoint is several files and only one rename is atomic, so one file has to decide. It is
config.json: transformers and swathe read the weights that its `transformers_weights` names, if it
has one, and model.safetensors or its index otherwise. Over an existing checkpoint:

    1. stage    write the new weights (and index) under new names, flush them to the disk
    2. commit   rename a config.json over the old one that names the staged weights
    3. settle   link the staged weights to the usual names, replacing the old
    4. finish   rename the final config.json, without `transformers_weights`, over that one
    5. sweep    delete staged names, shards and an index that are no longer part of it

Until 2 the old checkpoint is untouched; from 2 on every reader gets the new one. In a directory
without a checkpoint the weights are renamed into place and config.json comes last.
An error before the commit deletes what was written; after it, the next save sweeps up.

A variant has weights of its own beside the others' (names.py) and shares config.json with them:
from 2 to 4, readers of every variant get the new weights. A save that finds another variant's left
there by a crash first does 3 for it, since from its own 2 on nothing would name them any more.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from swathe.modeling.checkpoint import json_object, names
from swathe.modeling.checkpoint.files import require_plain_name
from swathe.modeling.checkpoint.layout import POINTER
from swathe.modeling.checkpoint.serialize import (
    Shard,
    check_tensors,
    create,
    header_bytes,
    parse_size,
    split_into_shards,
    write_safetensors,
)
from swathe.modeling.checkpoint.transforms import WeightTransform, to_stored

_SLACK = 1 << 16  # config, index and directory entries


def save(
    directory: str | Path,
    *,
    config_json: str,
    tensors: Mapping[str, Tensor],
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    transforms: Sequence[WeightTransform] = (),
) -> list[Path]:
    """Write config.json and `tensors` in the Hugging Face layout; return the weight files.

    Shards have at most `max_shard_size` bytes of data ("5GB" is decimal, "5GiB" binary).
    `variant` is part of the weight files' names; those of other variants stay.
    `extra_files` (such as generation_config.json) are replaced one by one after the commit.
    `transforms` turn `tensors`, as the model has them, into what is stored.
    Raises ValueError (config_json, tensors, names), NotADirectoryError, BlockingIOError (another
    process is saving here), OSError (no space); the checkpoint that was there stays as it was.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, f"{directory} is a file; give a directory to save the checkpoint in"
        )
    names.require_variant(variant)
    config = _final_config(directory, config_json)
    extra = dict(extra_files or {})
    for name in extra:
        require_plain_name(name, file=directory, key="extra_files")
        if name == "config.json" or names.WeightFile.named(name):
            raise ValueError(f"extra_files has {name!r}, a name that save itself writes")
    check_tensors(tensors)
    shards = split_into_shards(to_stored(tensors, transforms), parse_size(max_shard_size))

    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    save_ = _Save(directory, config, extra, variant)
    try:
        with _only_writer(directory):
            save_.run(shards)
    except BaseException as error:
        if save_.is_committed():
            error.add_note(f"the new weights in {directory} are in place; save again to tidy up")
        else:
            save_.undo()
            if made:
                with suppress(OSError):
                    directory.rmdir()
        raise
    return [directory / name for name in save_.names]


class _Save:
    """One run of the protocol above; `created` lists the files to delete if it fails."""

    def __init__(
        self,
        directory: Path,
        config: str,
        extra: Mapping[str, str | bytes],
        variant: str | None,
    ):
        self.directory = directory
        self.variant = variant
        self.config = config
        self.extra = extra
        self.id = secrets.token_hex(6)
        self.fresh = True
        self.settling = False
        self.created: list[Path] = []
        self.names: list[str] = []

    def run(self, shards: list[Shard]) -> None:
        single, index = names.single(self.variant), names.index(self.variant)
        there = ("config.json", single, index)
        self.fresh = not any((self.directory / name).exists() for name in there)
        self._sweep(keep={*self._in_use()}, staged_only=True)
        self._settle_another()
        need = sum(len(header_bytes(s)) + sum(t.nbytes for t in s.values()) for s in shards)
        _require_space(self.directory, need + len(self.config) + _SLACK)

        count = len(shards)
        staged = names.shards(count, self.variant, self.id)
        self.names = names.shards(count, self.variant)
        for name, shard in zip(staged, shards, strict=True):
            self.created.append(self.directory / name)
            write_safetensors(self.directory / name, shard)
        if not self.fresh:
            self._commit(shards, staged)
            self.settling = True

        for old, new in zip(staged, self.names, strict=True):
            self._place(old, new)
        if count > 1:
            self._put(index, _index(shards, self.names))
        self._remove(single if count > 1 else index)
        for name, content in self.extra.items():
            self._put(name, content)
        _sync_directory(self.directory)
        self._put("config.json", self.config)
        _sync_directory(self.directory)
        self._sweep(keep={*self.names, index if count > 1 else single}, staged_only=False)

    def is_committed(self) -> bool:
        """Over an old checkpoint: does config.json, or did it ever, name the new weights?"""
        return self.settling or any(self.id in name for name in self._in_use())

    def undo(self) -> None:
        for path in self.created:
            path.unlink(missing_ok=True)

    def _commit(self, shards: list[Shard], staged: list[str]) -> None:
        pointer = staged[0]
        if len(staged) > 1:
            pointer = names.staged_index(self.variant, self.id)
            self._put(pointer, _index(shards, staged))
        _sync_directory(self.directory)
        config = {**json.loads(self.config), POINTER: pointer}
        self._put("config.json", json.dumps(config, indent=2) + "\n")
        _sync_directory(self.directory)

    def _put(self, name: str, content: str | bytes) -> None:
        """Replace a small file by rename, after its bytes have reached the disk."""
        temporary = self.directory / f".{name}.{self.id}.tmp"
        try:
            with create(temporary) as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            target = self.directory / name
            if not target.exists():
                self.created.append(target)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _place(self, old: str, new: str) -> None:
        """Give the staged file its usual name; over an existing checkpoint it keeps both names."""
        source, target = self.directory / old, self.directory / new
        if self.fresh:
            self.created.append(target)
            os.replace(source, target)
            return
        temporary = self.directory / f".{new}.{self.id}.tmp"
        try:
            try:
                os.link(source, temporary)
            except OSError:  # a file system without hard links
                with create(temporary) as copy, source.open("rb") as original:
                    shutil.copyfileobj(original, copy, 1 << 24)
                    copy.flush()
                    os.fsync(copy.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _remove(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def _pointer(self) -> tuple[str, names.WeightFile] | None:
        """What the present config.json points at, after an earlier crash: staged weights."""
        try:
            config = json.loads((self.directory / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        pointer = config.get(POINTER) if isinstance(config, dict) else None
        if not isinstance(pointer, str):
            return None
        found = names.WeightFile.named(pointer)
        return (pointer, found) if found and found.id else None

    def _in_use(self) -> Iterator[str]:
        """The staged files that the present config.json still needs."""
        found = self._pointer()
        if found:
            yield from (p.name for p in self.directory.glob(f"model-{found[1].id}*"))

    def _settle_another(self) -> None:
        """Step 3 for the staged weights of another variant, if config.json points at such."""
        found = self._pointer()
        if not found or found[1].variant == self.variant:
            return
        pointer, variant = found[0], found[1].variant
        single, index = names.single(variant), names.index(variant)
        if not pointer.endswith(".json"):
            self._place(pointer, single)
            self._remove(index)
            return
        content = json.loads((self.directory / pointer).read_bytes())
        staged = sorted(set(content["weight_map"].values()))
        usual = dict(zip(staged, names.shards(len(staged), variant), strict=True))
        for old, new in usual.items():
            self._place(old, new)
        content["weight_map"] = {key: usual[name] for key, name in content["weight_map"].items()}
        self._put(index, json.dumps(content, indent=2) + "\n")
        self._remove(single)

    def _sweep(self, *, keep: set[str], staged_only: bool) -> None:
        """Delete staged files that nothing needs, and stale ones of this variant."""
        for path in self.directory.iterdir():
            found = names.WeightFile.named(path.name)
            if not found or path.name in keep or (path.is_dir() and not path.is_symlink()):
                continue
            if found.id or (not staged_only and found.variant == self.variant):
                path.unlink(missing_ok=True)


def _final_config(directory: Path, config_json: str) -> str:
    config = json_object.parse(
        config_json.encode(), code="E_CONFIG", file=directory / "config.json", expected="an object"
    )
    if POINTER not in config:
        return config_json
    del config[POINTER]  # it named files of the checkpoint that this one replaces
    return json.dumps(config, indent=2) + "\n"


def _index(shards: list[Shard], names: list[str]) -> str:
    metadata = {
        "total_parameters": sum(t.numel() for shard in shards for t in shard.values()),
        "total_size": sum(t.nbytes for shard in shards for t in shard.values()),
    }
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _require_space(directory: Path, need: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{directory}: saving needs {need} bytes beside what is there, {free} are free; "
            "nothing was written. Free some space or save elsewhere",
        )


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory itself: it leaves no file and dies with the process."""
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                f"{directory}: another process is saving here; wait for it or save elsewhere",
            ) from error
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        yield
    finally:
        os.close(descriptor)
