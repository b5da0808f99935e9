"""What an installation contains, and that the checkout disturbs nobody else's packages."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def checkout(destination: Path) -> Path:
    """A copy of what git would hand out: tracked and new files, links kept, nothing ignored."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.exists():
            target.write_bytes(source.read_bytes())
    return destination


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkout(tmp_path_factory.mktemp("clone"))


def test_uninstalled_clone_imports(clone: Path) -> None:
    code = (
        "import swathe; print(swathe.__file__);"
        "print(swathe.backends('rms_norm')['rms_norm']['cpp'])"
    )
    out = run(sys.executable, "-c", code, cwd=clone).splitlines()
    assert out[0].startswith(str(clone))
    assert out[1] == "ok" or "pip install" in out[1], "an unbuilt csrc says how to build it"


def test_clone_without_links_imports(clone: Path, tmp_path: Path) -> None:
    copy = checkout(tmp_path / "plain")
    for name in ("kernels", "modeling"):
        (copy / "swathe" / name).unlink()
        (copy / "swathe" / name).write_text(f"../{name}")
    code = "import torch, swathe; print(swathe.rms_norm(torch.ones(2, 3), torch.ones(3)).shape)"
    assert "torch.Size([2, 3])" in run(sys.executable, "-c", code, cwd=copy)


def test_transformers_imports_beside_our_kernels_folder(tmp_path: Path) -> None:
    # Hugging Face's package "kernels" looks installed: transformers then imports that name
    info = tmp_path / "kernels-0.16.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.16.3\n")
    (info / "RECORD").write_text("")
    code = "import transformers, swathe; from transformers import LlamaConfig; print(LlamaConfig())"
    assert "LlamaConfig" in run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path))


@pytest.fixture(scope="module")
def distributions(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # the backend is called as a build frontend calls it, with this environment's setuptools:
    # isolation would only fetch the same setuptools again
    out = tmp_path_factory.mktemp("dist")
    for hook in ("build_sdist", "build_wheel"):
        code = f"from setuptools import build_meta; import sys; build_meta.{hook}(sys.argv[1])"
        run(sys.executable, "-c", code, str(out), cwd=clone)
    return out


def test_wheel_holds_swathe_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"swathe", next(t for t in tops if t.endswith(".dist-info"))}
    for needed in ("swathe/kernels/norm/api.py", "swathe/modeling/config.py", "swathe/py.typed"):
        assert needed in names
    assert not [n for n in names if "test" in Path(n).stem and "/core/testing.py" not in n]


def test_wheel_works_where_there_is_no_checkout(distributions: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import importlib.util as u, torch, swathe;"
        "print([n for n in ('kernels', 'modeling', 'bench', 'tests') if u.find_spec(n)]);"
        "print(swathe.backends('rms_norm')['rms_norm']['cpp']);"
        "print(swathe.rms_norm(torch.ones(2, 3), torch.ones(3)).sum().item())"
    )
    # -P keeps the working directory off the path, -s the user's site
    out = run(sys.executable, "-Ps", "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).splitlines()
    assert out[0] == "[]"
    assert out[1] == "ok", "the wheel built here carries the compiled csrc"
    assert float(out[2]) == pytest.approx(6.0, abs=1e-4)


def test_sdist_can_build_the_extension(distributions: Path, tmp_path: Path) -> None:
    import tarfile

    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").glob("*") if p.is_file()}
    assert sources and sources <= names
    assert {"setup.py", "swathe/kernels/norm/_triton.py"} <= names
