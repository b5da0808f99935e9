"""Which files a checkpoint may make us open: regular files inside its own directory, no others."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from swathe.modeling.checkpoint.errors import CheckpointError, CheckpointNotFound

CONFIG_CAP = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one version of a file from the next one under the same name."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def require_plain_name(name: str, *, file: Path, key: str) -> None:
    """Refuse a file name, found in `file` under `key`, that is more than a name."""
    plain = (
        name not in ("", ".", "..")
        and not any(bad in name for bad in ("/", "\\", ":"))
        and name.isprintable()
        and len(name.encode("utf-8", "surrogatepass")) <= 255
    )
    if not plain:
        raise CheckpointError(
            "E_PATH",
            f"{file}: file name {name!r} for {key!r} must be a plain file name in the same "
            "directory (no '/', '\\', '..', ':', control characters, at most 255 bytes); "
            "download the checkpoint again from a source you trust",
            file=file,
            key=key,
        )


def resolve_inside(directory: Path, name: str, *, key: str | None = None) -> Path:
    """The real path of `directory / name`; links may only lead where checkpoints keep their files.

    That is the directory itself, and for a `snapshots/<revision>` directory of the Hugging Face
    cache the `blobs` folder beside `snapshots`. Raises CheckpointError (E_PATH, E_NOTFILE).
    """
    path = directory / name
    try:
        real = Path(os.path.realpath(path, strict=True))
    except FileNotFoundError as error:
        raise CheckpointNotFound(
            "E_MISSING_FILE", f"{path}: does not exist, or is a dangling link", file=path, key=key
        ) from error
    except OSError as error:
        raise CheckpointError(
            "E_PATH", f"{path}: cannot be resolved ({error.strerror})", file=path, key=key
        ) from error
    home = Path(os.path.realpath(directory))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(
            "E_PATH",
            f"{path}: resolves outside the checkpoint, to {real}; files must lie in {home} (or in "
            "the blobs folder of a Hugging Face cache); copy the file into the directory",
            file=path,
            key=key,
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise CheckpointError(
            "E_NOTFILE",
            f"{path}: is not a regular file; a checkpoint holds only regular files, so remove it",
            file=path,
            key=key,
        )
    return real


def open_regular(path: Path) -> io.FileIO:
    """Open an already resolved path for unbuffered reading; never waits on a FIFO or a device."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise CheckpointError(
            "E_UNREADABLE", f"{path}: cannot be opened ({error.strerror})", file=path
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("E_NOTFILE", f"{path}: is not a regular file", file=path)
    return io.FileIO(descriptor, "rb")


def read_small(path: Path, cap: int, code: str) -> bytes:
    """The bytes of a resolved file of at most `cap` bytes; `code` names the error when larger."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > cap:
            raise CheckpointError(
                code, f"{path}: has {size} bytes; at most {cap} are allowed here", file=path
            )
        data = bytearray()
        while len(data) < size:
            part = file.read(size - len(data))
            if not part:
                break
            data += part
        return bytes(data)
