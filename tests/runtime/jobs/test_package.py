from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from ray_tracking.errors import UsageError
from ray_tracking.runtime.jobs.package import LIMIT, Package, check_size, choose
from ray_tracking.storage import Storage


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    for name, content in {
        "train.py": "def train(run): pass\n",
        "pkg/model.py": "x = 1\n",
        "pkg/runs/code.py": "y = 2\n",  # only the storage at the top is left out by this name
        "weights.bin": "w" * 5000,
        ".git/objects/ab": "g",
        ".venv/lib/x.py": "v",
        "pkg/__pycache__/model.pyc": "c",
        ".env": "WANDB_API_KEY=s3cret",
        "certs/server.pem": "k",
        "runs/demo/run.json": "{}",
        "results/demo/run.json": "{}",
        "scratch/a.tmp": "t",
        "notes.md": "n",
        "ignored/by/git.txt": "i",
        ".gitignore": "ignored/\n",
        ".rayignore": "*.tmp\n",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "empty").mkdir()
    return root


def names(package: Package) -> set[str]:
    return {name for name, _ in package.files}


def test_what_is_sent(project: Path) -> None:
    package = choose(project, ["notes.*"], Storage.open(project / "results"))
    assert names(package) == {
        "train.py", "pkg/model.py", "pkg/runs/code.py", "weights.bin", ".gitignore", ".rayignore",
    }  # fmt: skip
    assert package.largest[0] == ("weights.bin", 5000)
    assert package.holds(project / "train.py")
    assert not package.holds(project / "notes.md")
    assert not package.holds(project.parent / "train.py")


def test_ray_packs_just_these_files_and_no_more_bytes(project: Path, tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = choose(project)
    excludes = [*get_runtime_env_default_excludes(), *package.excludes]
    create_package(str(project), tmp_path / "p.zip", include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(tmp_path / "p.zip") as packed:
        assert {name for name in packed.namelist() if not name.endswith("/")} == names(package)
    size = (tmp_path / "p.zip").stat().st_size
    assert 0.8 * package.size < size <= package.size


def test_a_storage_around_or_beside_the_folder_excludes_nothing_of_it(project: Path) -> None:
    for place in (project, project.parent, project.parent / "elsewhere"):
        assert "train.py" in names(choose(project, storage=Storage.open(place)))


def test_too_large_names_the_largest_and_the_fix(project: Path) -> None:
    package = choose(project)
    check_size(package)
    with pytest.raises(UsageError) as raised:
        check_size(package, limit=4000)
    said = str(raised.value)
    assert "weights.bin" in said
    assert said.index("weights.bin") < said.index("train.py")
    assert "--exclude" in said
    assert ".rayignore" in said


def test_the_limit_is_that_of_the_dashboard() -> None:
    assert LIMIT == 100 << 20


def test_a_file_is_no_working_directory(project: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        choose(project / "train.py")
