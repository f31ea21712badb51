from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ray_tracking.checkpoint.keys import generate_key
from ray_tracking.cli.places import run_and_choices
from ray_tracking.runs.store import RunStore
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder
from tests.monitoring.checkpoint_dirs import GOOD, Tied, good_directory, save, save_ranks, spoil

ENTRY = {
    "step", "epoch", "attempt", "folder", "metric", "value", "bytes", "raw_bytes", "created", "world_size", "latest",
    "best", "pinned", "reason", "improved", "compression", "encryption", "keys", "metrics", "complete",
}  # fmt: skip


@pytest.fixture
def directory(store: RunStore, tmp_path: Path) -> Path:
    """Steps 10, 20 and 30 of a plain script, in its default place."""
    place = tmp_path / "runs" / "checkpoints"
    shutil.copytree(good_directory(), place)
    return place


def steps(cli: Cli, *arguments: str) -> list[int]:
    done = cli("checkpoints", "ls", "--json", *arguments)
    assert done.code == 0
    return [entry["step"] for entry in json.loads(done.out) if entry["complete"]]


def test_ls_for_people(cli: Cli, directory: Path) -> None:
    done = cli("checkpoints", "ls", "--dir", str(directory))
    assert (done.code, done.err) == (0, "")
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[-4] == ["step", "epoch", "loss", "size", "age", "ranks", "saved"]
    assert [row[0] for row in rows[-3:]] == ["10", "20", "30"]
    assert "latest, best" in done.out.splitlines()[-1]
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\x1b" not in done.out


def test_ls_json(cli: Cli, directory: Path) -> None:
    (first, _, last) = json.loads(cli("checkpoints", "ls", "--dir", str(directory), "--json").out)
    assert set(first) == ENTRY
    assert (first["step"], first["metrics"], first["value"]) == (10, {"loss": 0.1}, 0.1)
    assert [first["latest"], first["best"], last["latest"], last["best"]] == [False, False, True, True]
    assert first["bytes"] == sum(
        file.stat().st_size for file in (directory / "step-000010").iterdir() if not file.name.startswith("rank-")
    )


def test_ls_limit_takes_the_newest(cli: Cli, directory: Path) -> None:
    assert steps(cli, "--dir", str(directory), "-n", "2") == [20, 30]
    assert "2 older ones not shown" in cli("checkpoints", "ls", "--dir", str(directory), "-n", "1").out


def test_ls_shows_exactly_the_good_ones_of_a_spoilt_directory(cli: Cli, tmp_path: Path, store: RunStore) -> None:
    spoil(tmp_path / "spoilt", good_directory())
    place = str(tmp_path / "spoilt")
    assert steps(cli, "--dir", place) == list(GOOD)
    assert "8 folders there do not count" in cli("checkpoints", "ls", "--dir", place).out
    every = json.loads(cli("checkpoints", "ls", "--all", "--dir", place, "--json").out)
    assert [entry["step"] for entry in every if entry["complete"]] == list(GOOD)
    assert all(entry["why"] and entry["kind"] for entry in every if not entry["complete"])
    shown = " ".join(cli("checkpoints", "ls", "--all", "--dir", place).out.split())
    for words in ("half-written", "emptied", "truncated", "renamed", "foreign", "is the checkpoint of step 20"):
        assert words in shown


def test_listing_loads_no_torch(directory: Path) -> None:
    code = (
        "import sys; from ray_tracking.cli.app import app\n"
        "try: app(['checkpoints', *sys.argv[1:]], prog_name='ray-tracking')\n"
        "finally: assert 'torch' not in sys.modules, 'torch'"
    )
    for command in (["ls", "--all"], ["show", "20"], ["prune", "--keep-last", "1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command, "--dir", str(directory)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_run_and_its_monitor(cli: Cli, store: RunStore) -> None:
    run = RunBuilder(store, "digits-1")
    save_ranks(run.directory, "attempt-001", 10)
    save_ranks(run.directory, "attempt-001", 20, ranks=1)
    (entry,) = json.loads(cli("checkpoints", "ls", "digits", "--json").out)
    assert (entry["step"], entry["attempt"], entry["world_size"]) == (10, 1, 2)
    assert (entry["metric"], entry["best"]) == ("val/loss", True)
    shown = json.loads(cli("checkpoints", "show", "latest", "10", "--json").out)
    assert {state["name"]: state["ranks"] for state in shown["states"]} == {
        "model": [],
        "loader": [0, 1],
        "rng": [0, 1],
    }
    assert {file["rank"] for file in shown["files"]} == {0, 1}
    # by its path, a run's directory is that run
    assert steps(cli, "--dir", run.directory.uri) == [10]


def test_a_plain_scripts_place_is_named_where_the_run_has_none(cli: Cli, store: RunStore, directory: Path) -> None:
    RunBuilder(store, "by-hand")
    done = cli("checkpoints", "ls")
    assert "No complete checkpoint in run by-hand" in done.out
    assert str(directory) in done.out.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "directory", "meant"),
    [
        (["120"], None, (None, ["120"])),
        (["latest"], None, (None, ["latest"])),
        (["latest", "120"], None, ("latest", ["120"])),
        (["digits", "best"], None, ("digits", ["best"])),
        (["best", "latest"], None, (None, ["best", "latest"])),
        (["10", "20"], None, (None, ["10", "20"])),
        (["latest", "20"], "here", (None, ["latest", "20"])),
    ],
)
def test_which_run_and_which_checkpoints(words: list[str], directory: str | None, meant: object) -> None:
    assert run_and_choices(words, directory) == meant


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls"], "There are no runs"),
        (["ls", "--dir", "nowhere"], "There is no directory"),
        (["ls", "run", "--dir", "runs/checkpoints"], "Both a run (run) and --dir"),
        (["show", "77", "--dir", "runs/checkpoints"], "Complete ones there: 10, 20, 30"),
        (["show", "some-run"], "Which checkpoint of some-run is not said"),
        (["show", "10", "20", "--dir", "runs/checkpoints"], "One checkpoint is meant"),
        (["show", "oldest", "--dir", "runs/checkpoints"], "Allowed: a step, latest, best"),
        (["show", "best", "--monitor", "acc", "--dir", "runs/checkpoints", "--mode", "most"], "allowed: min, max"),
        (["prune", "--dir", "runs/checkpoints"], "--keep-last, --keep-best, --keep-every"),
        (["verify", "a", "b", "all"], "One place is meant"),
        (["export", "10", "--dir", "runs/checkpoints", "-o", "m.onnx"], "Allowed: .safetensors, .pt"),
        (["export", "10", "--dir", "runs/checkpoints", "-o", "m.pt", "--what", "half"], "allowed: model, all"),
        (["export", "10", "--dir", "runs/checkpoints", "-o", "no/m.pt"], "There is no folder no"),
    ],
)
def test_wrong_usage_is_2(cli: Cli, directory: Path, arguments: list[str], said: str) -> None:
    done = cli("checkpoints", *arguments)
    assert (done.code, said in " ".join(done.err.split())) == (2, True)


def test_show(cli: Cli, directory: Path) -> None:
    done = cli("checkpoints", "show", "20", "--dir", str(directory))
    assert done.code == 0
    words = " ".join(done.out.split())
    assert "step 20 epoch 1 where" in words
    assert "loss 0.05" in words
    assert "model 2 8 32 B" in words
    assert "weight 1 F32 2x3 24 B" in words
    assert "model.safetensors" in words
    document = json.loads(cli("checkpoints", "show", "20", "--dir", str(directory), "--json").out)
    assert {*ENTRY - {"complete"}, "states", "tensors", "files", "schema", "plan"} <= set(document)
    assert document["hidden"] is None
    weight = next(tensor for tensor in document["tensors"] if tensor["name"] == "weight")
    assert (weight["object"], weight["dtype"], weight["shape"], weight["bytes"]) == ("model", "F32", [2, 3], 24)


def test_show_tensors_in_groups_or_each(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    save(tmp_path / "tied", [1], model=Tied())
    grouped = " ".join(cli("checkpoints", "show", "1", "--dir", "tied").out.split())
    assert "layers.*.weight 3 BF16 4x4 96 B" in grouped
    assert "1 tied" in grouped
    each = cli("checkpoints", "show", "1", "--dir", "tied", "--tensors").out
    assert "layers.2.weight" in each


def test_an_encrypted_one_without_and_with_its_key(
    cli: Cli, store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").touch(mode=0o600)
    (tmp_path / "key").write_text(generate_key())
    (tmp_path / "other").touch(mode=0o600)
    (tmp_path / "other").write_text(generate_key())
    save(tmp_path / "sealed", [5], compression="zstd", encryption={"key_file": str(tmp_path / "key")})
    (entry,) = json.loads(cli("checkpoints", "ls", "--dir", "sealed", "--json").out)
    assert (entry["compression"], len(entry["keys"])) == ("zstd", 1)
    assert f"zstd, encrypted for {entry['keys'][0][:8]}" in " ".join(
        cli("checkpoints", "ls", "--dir", "sealed").out.split()
    )

    hidden = json.loads(cli("checkpoints", "show", "5", "--dir", "sealed", "--json").out)
    assert entry["keys"][0] in hidden["hidden"]
    assert hidden["tensors"] == []
    assert {state["name"] for state in hidden["states"]} == {"model", "optimizer", "rng"}
    assert len(hidden["files"]) == 3
    opened = json.loads(cli("checkpoints", "show", "5", "--dir", "sealed", "--key-file", "key", "--json").out)
    assert {"weight", "bias"} <= {tensor["name"] for tensor in opened["tensors"]}

    unproven = cli("checkpoints", "verify", "--dir", "sealed")
    assert (unproven.code, "1 encrypted checkpoint not opened" in unproven.err) == (0, True)
    monkeypatch.setenv("THE_KEY", (tmp_path / "key").read_text())
    proven = json.loads(cli("checkpoints", "verify", "--dir", "sealed", "--key-env", "THE_KEY", "--json").out)
    assert (proven["good"], proven["checkpoints"][0]["opened"]) == (True, True)

    refused = cli("checkpoints", "export", "5", "--dir", "sealed", "-o", "m.safetensors", "--key-file", "other")
    assert (refused.code, entry["keys"][0] in refused.err) == (3, True)
    assert not (tmp_path / "m.safetensors").exists()
    assert cli("checkpoints", "export", "5", "--dir", "sealed", "-o", "m.safetensors", "--key-file", "key").code == 0
    assert set(load_file(tmp_path / "m.safetensors")) == {"weight", "bias"}


def test_the_key_that_a_run_recorded_but_never_its_command(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    (tmp_path / "key").touch(mode=0o600)
    (tmp_path / "key").write_text(generate_key())
    run = RunBuilder(store, "secret")
    save(Path(run.directory.path()), [5], encryption={"key_file": str(tmp_path / "key")})

    def hidden(encryption: dict[str, str]) -> str | None:
        run.config({"training": {"default": {"encryption": encryption}}})
        answer: str | None = json.loads(cli("checkpoints", "show", "5", "--json").out)["hidden"]
        return answer

    assert hidden({"key_file": str(tmp_path / "key")}) is None
    assert hidden({"key_command": f"touch {tmp_path / 'ran'}"}) is not None
    assert not (tmp_path / "ran").exists()


def test_verify_says_each_checkpoint_on_a_line(cli: Cli, directory: Path) -> None:
    done = cli("checkpoints", "verify", "--dir", str(directory))
    assert (done.code, done.err) == (0, "")
    assert [line.split(" (")[0] for line in done.out.splitlines()[:3]] == [f"step {step}: good" for step in GOOD]
    assert json.loads(cli("checkpoints", "verify", "20", "--dir", str(directory), "--json").out) == {
        "good": True,
        "checkpoints": [
            {"step": 20, "folder": "step-000020", "bytes": steps_bytes(directory), "problems": [], "opened": True}
        ],
    }


def steps_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in (directory / "step-000020").iterdir() if "rank-" not in file.name)


def test_verify_names_every_file_with_a_flipped_bit(cli: Cli, directory: Path) -> None:
    for file in sorted((directory / "step-000020").iterdir()):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        done = cli("checkpoints", "verify", "--dir", str(directory))
        assert (done.code, file.name in done.out) == (3, True)
        assert [line.split(":")[0] for line in done.out.splitlines() if "good" in line] == ["step 10", "step 30"]
        document = json.loads(cli("checkpoints", "verify", "all", "--dir", str(directory), "--json").out)
        assert document["good"] is False
        (bad,) = [entry for entry in document["checkpoints"] if entry["problems"]]
        assert (bad["step"], file.name in bad["problems"][0]) == (20, True)
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert cli("checkpoints", "verify", "--dir", str(directory)).code == 0


def test_a_cut_checkpoint_is_found_although_it_does_not_count(cli: Cli, directory: Path) -> None:
    with open(directory / "step-000020" / "state-00000.json", "r+b") as file:
        file.truncate(10)
    assert (cli("checkpoints", "verify", "--dir", str(directory)).code, steps(cli, "--dir", str(directory))) == (
        3,
        [10, 30],
    )
    alone = cli("checkpoints", "verify", "20", "--dir", str(directory))
    assert (alone.code, "state-00000.json has 10 bytes" in alone.err) == (3, True)
    assert cli("checkpoints", "verify", "latest", "--dir", str(directory)).code == 0


def test_pin_and_unpin(cli: Cli, directory: Path) -> None:
    def pinned() -> list[int]:
        entries = json.loads(cli("checkpoints", "ls", "--dir", str(directory), "--json").out)
        return [entry["step"] for entry in entries if entry["pinned"]]

    assert cli("checkpoints", "pin", "10", "best", "--dir", str(directory)).code == 0
    assert pinned() == [10, 30]
    assert "was pinned already" in cli("checkpoints", "pin", "10", "--dir", str(directory)).out
    missing = cli("checkpoints", "unpin", "10", "77", "--dir", str(directory))
    assert (missing.code, pinned()) == (2, [10, 30])
    assert cli("checkpoints", "unpin", "10", "--dir", str(directory)).code == 0
    assert pinned() == [30]


def test_prune_is_dry_unless_told(cli: Cli, directory: Path) -> None:
    rules = ("--keep-last", "1", "--dir", str(directory))
    assert cli("checkpoints", "pin", "10", "--dir", str(directory)).code == 0
    done = cli("checkpoints", "prune", *rules)
    words = " ".join(done.out.split())
    assert "1 of 3 checkpoints" in words
    assert "would be deleted" in words
    assert "beyond the last 1" in words
    assert steps(cli, "--dir", str(directory)) == list(GOOD)
    document = json.loads(cli("checkpoints", "prune", *rules, "--apply", "--json").out)
    assert {entry["step"]: entry["delete"] for entry in document["checkpoints"]} == {10: False, 20: True, 30: False}
    assert document["applied"] is True
    assert document["bytes"] > 10_000
    assert not (directory / "step-000020").exists()
    assert steps(cli, "--dir", str(directory)) == [10, 30]


def test_prune_by_the_runs_own_config(cli: Cli, store: RunStore) -> None:
    run = RunBuilder(store, "digits", monitor="loss").config({"training": {"default": {"save_total_limit": 2}}})
    save(Path(run.directory.path()), [1, 2, 3, 4], losses=[0.5, 0.1, 0.3, 0.4])
    assert cli("checkpoints", "prune", "--apply").code == 0
    assert steps(cli) == [2, 4]  # the best and the latest


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_export(cli: Cli, directory: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"mine")
    refused = cli("checkpoints", "export", "20", "--dir", str(directory), "-o", name)
    assert (refused.code, "--force" in refused.err, (tmp_path / name).read_bytes()) == (2, True, b"mine")
    done = cli("checkpoints", "export", "20", "--dir", str(directory), "-o", name, "--force")
    assert (done.code, done.out, "2 tensors" in done.err) == (0, "", True)
    path = tmp_path / name
    loaded = torch.load(path, weights_only=True) if name.endswith(".pt") else load_file(path)
    torch.nn.Linear(3, 2).load_state_dict(loaded)


def test_export_tells_how_to_load_tied_weights(cli: Cli, store: RunStore, tmp_path: Path) -> None:
    save(tmp_path / "tied", [1], model=Tied())
    done = cli("checkpoints", "export", "1", "--dir", "tied", "-o", "m.safetensors")
    assert (done.code, "head.weight is embed.weight" in done.err) == (0, True)


def test_of_a_damaged_one_nothing_is_exported(cli: Cli, directory: Path, tmp_path: Path) -> None:
    file = directory / "step-000020" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = cli("checkpoints", "export", "20", "--dir", str(directory), "-o", "m.pt")
    assert (done.code, str(file) in done.err) == (3, True)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("command", ["", "ls", "show", "verify", "export", "pin", "unpin", "prune"])
def test_every_command_has_help(cli: Cli, command: str) -> None:
    done = cli("checkpoints", *command.split(), "--help")
    assert done.code == 0
    assert "Usage: ray-tracking checkpoints" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert not [line for line in done.out.splitlines()[1:] if line.endswith("...")]
