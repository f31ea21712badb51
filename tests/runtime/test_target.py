from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_tracking.errors import UsageError
from ray_tracking.runtime.target import load_target, ship_by_value


@pytest.fixture(autouse=True)
def _clean_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder; what a test imports from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


GOOD = "def train(run):\n    return run * 2\n"


def test_a_file(tmp_path: Path) -> None:
    source = write("sub/my-model.py", GOOD)
    loaded = load_target("sub/my-model.py:train")
    assert loaded.function(21) == 42
    assert loaded.name == "sub/my-model.py:train"
    assert loaded.source == source.resolve()
    assert loaded.digest == f"sha256:{hashlib.sha256(GOOD.encode()).hexdigest()}"
    assert loaded.by_path
    assert sys.modules[loaded.module.__name__] is loaded.module


def test_files_of_one_name_do_not_meet() -> None:
    write("a/train.py", "def train(run):\n    return 'a'\n")
    write("b/train.py", "def train(run):\n    return 'b'\n")
    a, b = load_target("a/train.py:train"), load_target("b/train.py:train")
    assert (a.function(0), b.function(0)) == ("a", "b")


def test_a_file_imports_its_neighbour() -> None:
    write("proj/neighbour_module.py", "VALUE = 7\n")
    write("proj/main.py", "from neighbour_module import VALUE\ndef train(run):\n    return VALUE\n")
    assert load_target("proj/main.py:train").function(0) == 7


def test_a_module_in_the_working_directory() -> None:
    write("mypkg_t/__init__.py", "")
    write("mypkg_t/job.py", GOOD)
    loaded = load_target("mypkg_t.job:train")
    assert loaded.function(1) == 2
    assert not loaded.by_path
    assert loaded.source is not None
    assert loaded.source.name == "job.py"


def test_an_imported_function_and_one_with_defaults_are_fine() -> None:
    write("impl_t.py", "def train(run, extra=1, *rest, **more):\n    return extra\n")
    write("front.py", "from impl_t import train\n")
    assert load_target("front.py:train").function(0) == 1


def test_names_that_only_appear_when_run_are_found() -> None:
    write("dynamic.py", "globals()['train'] = lambda run: 3\n")
    assert load_target("dynamic.py:train").function(0) == 3


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("train.py", r"Write train\.py:train"),
        ("train", "module:function"),
        ("train.py:", "module:function"),
        (":train", "module:function"),
        ("train.py:a-b", "no function's name"),
        ("trian.py:train", r"no file trian\.py.*\n.*Did you mean train\.py"),
        ("no/such/x.py:train", "no folder no/such"),
        ("train.py:trian", r"no function 'trian'.*\n.*Did you mean train\?"),
        ("train.py:xyzzy", r"Functions there: other, train"),
        ("train.py:VALUE", "of type int, not a function"),
        ("train.py:Model", "a class"),
        ("train.py:later", "async"),
        ("train.py:steps", "a generator"),
        ("train.py:nothing", r"nothing\(\).*one positional argument"),
        ("train.py:two", r"two\(run, config\).*config"),
        ("train.py:named", r"named\(\*, run\)"),
        ("no_such_module_t:train", r"no module 'no_such_module_t'"),
        ("json.nope_t:train", r"no module 'json\.nope_t'"),
        ("bad name:train", "neither a module's name nor a file"),
    ],
)
def test_what_is_wrong_with_the_target(target: str, said: str) -> None:
    write(
        "train.py",
        "VALUE = 1\nclass Model: pass\ndef train(run): pass\ndef other(run): pass\nasync def later(run): pass\n"
        "def nothing(): pass\ndef two(run, config): pass\ndef named(*, run): pass\n"
        "def steps(run):\n    yield 1\n",
    )
    if target == "train.py:xyzzy":
        write("train.py", "def train(run): pass\ndef other(run): pass\n")
    with pytest.raises(UsageError, match=said) as caught:
        load_target(target)
    assert caught.value.exit_code == 2


def test_an_error_in_the_users_file_is_shown_with_its_line() -> None:
    source = write("broken.py", "import os\n\nx = {}['lr']\n\ndef train(run): pass\n")
    with pytest.raises(UsageError) as caught:
        load_target("broken.py:train")
    assert "KeyError: 'lr'" in str(caught.value)
    assert f"{source.resolve()}, line 3: x = {{}}['lr']" in str(caught.value)


def test_a_syntax_error_is_shown_with_its_line() -> None:
    source = write("syntax.py", "def train(run):\n    return (1\n")
    with pytest.raises(UsageError, match=rf"{source.resolve()}, line 2: .*\n.*return \(1"):
        load_target("syntax.py:train")


def test_a_package_the_file_needs_but_is_not_there() -> None:
    write("needs.py", "import no_such_package_t\ndef train(run): pass\n")
    with pytest.raises(UsageError, match="Install 'no_such_package_t'"):
        load_target("needs.py:train")
    write("needs_t.py", "import no_such_package_t\ndef train(run): pass\n")
    with pytest.raises(UsageError, match="Install 'no_such_package_t'"):
        load_target("needs_t:train")


def test_a_file_that_ends_the_program() -> None:
    write("script.py", "def train(run): pass\nraise SystemExit(3)\n")
    with pytest.raises(UsageError, match="__main__"):
        load_target("script.py:train")


def test_a_missing_function_is_found_without_running_the_file() -> None:
    write("slow.py", "import time\ntime.sleep(60)\ndef train(run): pass\n")
    start = time.monotonic()
    with pytest.raises(UsageError, match="no function"):
        load_target("slow.py:test")
    assert time.monotonic() - start < 1


def test_a_file_that_fails_can_be_loaded_after_it_is_mended() -> None:
    write("mend.py", "1 / 0\ndef train(run): pass\n")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        load_target("mend.py:train")
    write("mend.py", GOOD)
    assert load_target("mend.py:train").function(1) == 2


def test_a_shipped_target_and_its_neighbour_load_where_neither_can_be_imported(tmp_path: Path) -> None:
    """What Ray sends to a worker: pickled here, called in a process in another folder."""
    write("ship/neighbour_ship.py", "class Box:\n    value = 5\n")
    write(
        "ship/main.py",
        "from neighbour_ship import Box\nFACTOR = 2\ndef train(run):\n    return run + FACTOR * Box.value\n",
    )
    loaded = load_target("ship/main.py:train")
    ship_by_value(loaded)
    from ray import cloudpickle

    Path("pickled").write_bytes(cloudpickle.dumps(loaded.function))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import sys, pickle; from ray import cloudpickle; print(pickle.loads(open(sys.argv[1], 'rb').read())(32))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pickled")],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "42\n"
