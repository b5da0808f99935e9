"""The Hugging Face hub, as an extra: repositories to directories, and saved models to repositories.

A local directory always wins. Only the files that a model is read from are downloaded; code in a
repository is never run. Everything that touches the network is huggingface_hub's.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from swathe.modeling.checkpoint import names

if TYPE_CHECKING:
    from swathe.modeling.model import PreTrainedModel

# "gpt2" or "organisation/name": what the hub allows, and nothing that can leave a directory
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CONFIG_ONLY = ("config.json",)
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class HubMixin:
    """Publishing a model."""

    model_tags: list[str] | None = None

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tags for the model's page on the hub, written there by `push_to_hub`; none twice."""
        known = self.model_tags or []
        new = [tags] if isinstance(tags, str) else tags
        self.model_tags = list(dict.fromkeys((*known, *new)))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        tags: list[str] | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository, made where it is missing.

            model.push_to_hub("me/my-model", private=True)

        Arguments are those of transformers. `tags` and those of `add_model_tags` join the ones that
        the repository's README.md has. Returns the address of the commit. Raises ImportError
        without huggingface_hub, and whatever that raises.
        """
        model: PreTrainedModel = self  # type: ignore[assignment]
        hub = _huggingface_hub("push_to_hub")
        api = hub.HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        wanted = list(dict.fromkeys((*(self.model_tags or ()), *(tags or ()))))
        with TemporaryDirectory() as directory:
            model.save_pretrained(directory, max_shard_size=max_shard_size, variant=variant)
            if wanted:
                card = Path(directory, "README.md")
                card.write_text(_card(hub, api, repo_id, wanted, token), encoding="utf-8")
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        return str(done)


def needed(variant: str | None = None) -> tuple[str, ...]:
    """What of a repository a model is read from, as patterns."""
    return *CONFIG_ONLY, "generation_config.json", *names.patterns(variant)


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Take those of HUB_OPTIONS out of `options`."""
    return {name: options.pop(name) for name in HUB_OPTIONS if name in options}


def local_directory(
    path: str | Path,
    subfolder: str = "",
    files: tuple[str, ...] | None = None,
    **options: Any,
) -> Path:
    """The directory named by `path`, or a snapshot of the hub repository of that name.

    Only `files` (patterns; else `needed()`) are downloaded. `options` are those of HUB_OPTIONS. A
    path that exists, or that cannot name a repository, is returned as it is. Raises ImportError,
    with the way to install it, where huggingface_hub is needed and missing; else what that raises,
    with a note.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if Path(path).exists() or not isinstance(path, str) or not _REPOSITORY.fullmatch(path):
        return Path(path)
    hub = _huggingface_hub(f"{path!r} is no local directory, and reading it from the hub")
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        snapshot = hub.snapshot_download(
            path, allow_patterns=[prefix + name for name in files or needed()], **given
        )
    except Exception as error:
        error.add_note(
            f"{path!r} is no local directory, so it was taken for a repository on the hub"
        )
        raise
    return Path(snapshot)


def _huggingface_hub(what: str) -> Any:
    if find_spec("huggingface_hub") is None:
        raise ImportError(
            f"{what} needs huggingface_hub, which is not installed: pip install 'swathe[hub]'"
        )
    return import_module("huggingface_hub")


def _card(hub: Any, api: Any, repo_id: str, tags: list[str], token: bool | str | None) -> str:
    """The repository's README.md, or a new one, with `tags` among its own."""
    if not api.file_exists(repo_id, "README.md"):
        listed = "\n".join(f"- {tag}" for tag in tags)
        return f"---\nlibrary_name: swathe\ntags:\n{listed}\n---\n"
    card = hub.ModelCard.load(repo_id, token=token)
    card.data.tags = list(dict.fromkeys((*(card.data.tags or ()), *tags)))
    return str(card)
