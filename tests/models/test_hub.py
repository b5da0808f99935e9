"""The hub as an extra: which files are asked for, what is uploaded, and that a directory wins.

huggingface_hub is replaced where it would touch the network, and nothing else is.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

import swathe
from swathe.modeling import hub
from swathe.modeling.families.llama.configuration_llama import LlamaConfig
from swathe.modeling.families.llama.modeling_llama import LlamaForCausalLM

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
FILES = ["config.json", "generation_config.json", *WEIGHTS]


def build() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def ids() -> Tensor:
    return torch.randint(1, 99, (2, 7), generator=torch.Generator().manual_seed(1))


class Hub:
    """One repository, and a record of what was asked of it."""

    def __init__(self, files: Path, readme: str | None = None) -> None:
        self.files, self.readme = files, readme
        self.downloads: list[tuple[str, dict[str, Any]]] = []
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.uploads: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.downloads.append((repo_id, options))
        return str(self.files)

    def HfApi(self, token: Any = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.created.append((repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def file_exists(self, repo_id: str, name: str) -> bool:
        return name == "README.md" and self.readme is not None

    def upload_folder(self, **options: Any) -> str:
        folder = Path(options["folder_path"])
        self.uploaded = {p.name: p.read_bytes() for p in folder.iterdir()}
        self.uploads.append(options)
        return f"https://huggingface.co/{options['repo_id']}/commit/1"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A snapshot as the hub's cache has it: links to blobs elsewhere."""
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for blob in (tmp_path / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    fake = Hub(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", fake.HfApi)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_model_comes_from_a_repository(repository: Hub) -> None:
    model = LlamaForCausalLM.from_pretrained("org/tiny-llama", progress=False)
    expected = LlamaForCausalLM.from_pretrained(repository.files, progress=False)
    assert torch.equal(model(ids()).logits, expected(ids()).logits)
    assert repository.downloads == [("org/tiny-llama", {"allow_patterns": FILES})]


def test_options_reach_the_download(repository: Hub) -> None:
    options = {
        "revision": "v1.0",
        "token": "hf_secret",
        "cache_dir": "/somewhere",
        "local_files_only": True,
        "force_download": False,
    }
    for load in (LlamaForCausalLM.from_pretrained, swathe.AutoModelForCausalLM.from_pretrained):
        load("tiny", progress=False, **options)
    assert repository.downloads == [("tiny", {"allow_patterns": FILES, **options})] * 2
    repository.downloads.clear()
    for read in (LlamaConfig.from_pretrained, swathe.AutoConfig.from_pretrained):
        assert read("tiny", revision="v2", vocab_size=98).vocab_size == 98
    asked = {"allow_patterns": ["config.json"], "revision": "v2"}
    assert repository.downloads == [("tiny", asked)] * 2


def test_a_subfolder_of_a_repository(repository: Hub) -> None:
    (repository.files / "inner").symlink_to(repository.files)
    LlamaForCausalLM.from_pretrained("org/tiny", subfolder="inner", progress=False)
    assert repository.downloads[0][1]["allow_patterns"] == [f"inner/{name}" for name in FILES]


def test_a_local_directory_always_wins(repository: Hub) -> None:
    build().save_pretrained("org/tiny-llama")
    for path in ("org/tiny-llama", Path("org/tiny-llama"), "./org/tiny-llama"):
        LlamaForCausalLM.from_pretrained(path, revision="v1.0", progress=False)
    assert not repository.downloads


@pytest.mark.parametrize(
    "path", ["/no/where", "./no/where", "../x", "a/b/c", "~/model", "", Path("org/name")]
)
def test_what_cannot_name_a_repository_is_a_path(repository: Hub, path: Any) -> None:
    assert hub.local_directory(path) == Path(path)
    assert not repository.downloads


def test_an_error_of_the_hub_says_that_there_was_no_directory(
    repository: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="no such repository") as caught:
        LlamaForCausalLM.from_pretrained("org/nothing")
    assert "'org/nothing' is no local directory" in caught.value.__notes__[0]


def test_without_the_extra(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    model = LlamaForCausalLM.from_pretrained(repository.files, progress=False)
    install = r"pip install 'swathe\[hub\]'"
    with pytest.raises(ImportError, match=f"'org/tiny' is no local directory.*{install}"):
        LlamaForCausalLM.from_pretrained("org/tiny")
    with pytest.raises(ImportError, match=f"push_to_hub needs huggingface_hub.*{install}"):
        model.push_to_hub("tiny")
    assert not repository.created


def test_uploads_what_save_pretrained_writes(repository: Hub, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(repository.files, progress=False)
    address = model.push_to_hub(
        "tiny", private=True, token="hf_secret", revision="dev", create_pr=True
    )
    assert address == "https://huggingface.co/me/tiny/commit/1"
    assert repository.token == "hf_secret"
    assert repository.created == [("tiny", {"private": True, "exist_ok": True})]
    (sent,) = repository.uploads
    assert not Path(sent.pop("folder_path")).exists(), "the copy is gone afterwards"
    assert sent == {
        "repo_id": "me/tiny",
        "commit_message": "Upload LlamaForCausalLM",
        "commit_description": None,
        "revision": "dev",
        "create_pr": True,
    }
    model.save_pretrained(tmp_path / "here")
    saved = {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()}
    assert repository.uploaded == saved and "model.safetensors" in saved


def test_shards_are_uploaded(repository: Hub) -> None:
    build().push_to_hub("tiny", max_shard_size="20KB", commit_message="In parts")
    assert "model.safetensors.index.json" in repository.uploaded
    assert len([n for n in repository.uploaded if n.startswith("model-")]) > 1
    assert repository.uploads[0]["commit_message"] == "In parts"


def test_tags_make_a_card(repository: Hub) -> None:
    model = build()
    model.add_model_tags("mine")
    model.add_model_tags(["tiny", "mine"])
    assert model.model_tags == ["mine", "tiny"]
    assert build().model_tags is None, "tags belong to one model"
    model.push_to_hub("tiny", tags=["llama", "tiny"])
    card: Any = huggingface_hub.ModelCard(repository.uploaded["README.md"].decode())
    assert card.data.tags == ["mine", "tiny", "llama"]
    assert card.data.library_name == "swathe"


def test_tags_join_the_card_that_is_there(repository: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.readme = "---\nlicense: mit\ntags:\n- theirs\n---\n# A model\n"
    card = huggingface_hub.ModelCard(repository.readme)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda repo_id, token=None: card)
    build().push_to_hub("tiny", tags=["mine", "theirs"])
    again: Any = huggingface_hub.ModelCard(repository.uploaded["README.md"].decode())
    assert again.data.tags == ["theirs", "mine"] and again.data.license == "mit"
    assert "# A model" in again.content


def test_save_pretrained_publishes_on_request(repository: Hub, tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path / "named-model", push_to_hub=True, private=True)
    assert repository.created == [("named-model", {"private": True, "exist_ok": True})]
    model.save_pretrained(tmp_path / "x", push_to_hub=True, repo_id="other")
    assert repository.created[1][0] == "other"
    model.save_pretrained(tmp_path / "not", is_main_process=False, push_to_hub=True)
    assert not (tmp_path / "not").exists() and len(repository.created) == 2
    with pytest.raises(TypeError, match=r"no argument 'privat' \(did you mean 'private'\?\)"):
        model.save_pretrained(tmp_path / "not", push_to_hub=True, privat=True)
    with pytest.raises(ValueError, match=r"\['private'\] say how to publish, but push_to_hub is"):
        model.save_pretrained(tmp_path / "not", private=True)
    assert not (tmp_path / "not").exists()
