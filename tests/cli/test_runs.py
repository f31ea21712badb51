from __future__ import annotations

import json
import re
import time

import pytest

from ray_tracking.records import Kind, Record
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.tracking.cursor import BackendState
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder, scalars


def test_ls(cli: Cli, store: RunStore) -> None:
    now = time.time()
    RunBuilder(store, "old", created=now - 7300).log(scalars([1, 2])).finish()
    RunBuilder(store, "new", created=now - 10).log(scalars([1, 2, 4]))

    done = cli("runs", "ls")

    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines() if line.strip()]
    assert lines[0] == ["run", "status", "step", "best", "age"]
    assert lines[1][:5] == ["new", "running", "4", "val/loss", "0.25"]
    assert lines[2] == ["old", "completed", "2", "val/loss", "0.5", "2h", "01m"]


def test_ls_json_and_limit(cli: Cli, store: RunStore) -> None:
    for age in range(3):
        RunBuilder(store, f"run{age}", created=time.time() - age)
    assert [line["run_id"] for line in json.loads(cli("runs", "ls", "--json").out)] == [
        "run0",
        "run1",
        "run2",
    ]
    limited = cli("runs", "ls", "--limit", "1").out
    assert "run0" in limited
    assert "run1" not in limited
    assert "2 older ones not shown" in limited


def test_ls_of_an_empty_and_of_no_storage(cli: Cli, store: RunStore) -> None:
    missing = cli("runs", "ls")
    assert (missing.code, "There is no storage" in missing.err) == (2, True)
    store.storage.write_bytes("tensorboard/x", b"")
    assert "No runs" in cli("runs", "ls").out.replace("\n", " ")


def test_storage_option_goes_before_the_environment(cli: Cli, store: RunStore) -> None:
    other = RunStore(store.storage.child("elsewhere"))
    RunBuilder(other, "there")
    assert "there" in cli("runs", "ls", "--storage", other.storage.uri).out


def test_show_json_is_the_whole_document(cli: Cli, store: RunStore) -> None:
    run = RunBuilder(store, "digits-20261123").log(scalars(range(1, 4)))
    run.log([Record(Kind.SCALAR, "bad", 3, 1.0, float("nan"), seq=5)])
    run.backend("mlflow", offset=1, delivered=1, state=BackendState.FAILING, error="connection refused")
    run.resume(2).finish(Status.FAILED, "boom")

    document = json.loads(cli("runs", "show", "digits", "--json").out)

    assert document["run_id"] == "digits-20261123"
    assert document["status"] == "failed"
    assert [attempt["resumed_from_step"] for attempt in document["attempts"]] == [-1, 2]
    assert document["metrics"]["bad"] == {"last": "NaN", "best": None}
    assert document["backends"]["mlflow"]["pending"] == 5
    assert document["last_step"] == 2  # what came after the step it resumed from is superseded


def test_show_for_people(cli: Cli, store: RunStore) -> None:
    run = RunBuilder(store, "digits").log(scalars(range(1, 4)))
    run.backend("mlflow", offset=1, state=BackendState.FAILING, error="connection refused", location="http://x:1")
    run.checkpoint(3, {"val/loss": 0.3}, pinned=True)
    run.checkpoint(4, {"val/loss": 0.3}, complete=False)

    done = cli("runs", "show")

    assert done.code == 0
    words = " ".join(done.out.split())
    assert "val/loss * 0.33333 0.33333" in words
    assert "mlflow is failing, 3 records pending: connection refused" in words
    assert "3 200 B best, pinned" in words
    assert "incomplete" in words
    assert max(map(len, done.out.splitlines())) <= 80
    assert "\x1b" not in done.out


def test_names_are_shown_as_they_are_never_as_markup(cli: Cli, store: RunStore) -> None:
    name = "[red]x[/red] [/] :smile: \x1b[31mred\n"
    run = RunBuilder(store, "odd", name=name).log(scalars([1], key="[bold]loss[/]"))
    run.backend("mlflow", error="[link=http://evil]click[/link]", state=BackendState.FAILING)
    run.config({"[b]": "[i]"})
    RunBuilder(store, "odd2").config({"[b]": "[/]"})

    shown = cli("runs", "show", "odd")

    assert shown.code == 0
    assert "[red]x[/red] [/] :smile: ?[31mred" in shown.out
    assert "[bold]loss[/]" in shown.out
    assert "[link=http://evil]click[/link]" in " ".join(shown.out.split())
    compared = cli("runs", "compare", "odd", "odd2")
    assert "[i]" in compared.out
    assert "[/]" in compared.out
    assert "\x1b" not in shown.out + compared.out


def test_compare(cli: Cli, store: RunStore) -> None:
    RunBuilder(store, "run-a").log(scalars([1, 2])).config({"params": {"lr": 0.1, "epochs": 3}})
    RunBuilder(store, "run-b").log(scalars([1, 4])).config({"params": {"lr": 0.2, "epochs": 3}})

    done = cli("runs", "compare", "run-a", "run-b")

    words = " ".join(done.out.split())
    assert "params.lr 0.1 0.2" in words
    assert "epochs" not in words
    assert "val/loss 0.5 (0.5) 0.25 (0.25)" in words
    document = json.loads(cli("runs", "compare", "run-b", "run-a", "--json").out)
    assert document["config"] == {"params.lr": [0.2, 0.1]}
    assert document["metrics"]["val/loss"][1] == {"last": 0.5, "best": 0.5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "run-a"], "One run alone"),
        (["compare", "run-a", "zzz"], "No run 'zzz'"),
        (["show", "run-"], "any of 2 runs"),
        (["show", "../run-a"], "No run"),
    ],
)
def test_wrong_runs_are_2(cli: Cli, store: RunStore, arguments: list[str], said: str) -> None:
    RunBuilder(store, "run-a")
    RunBuilder(store, "run-b")
    done = cli("runs", *arguments)
    assert (done.code, said in done.err) == (2, True)


def test_status_of_the_newest_run(cli: Cli, store: RunStore) -> None:
    now = time.time()
    RunBuilder(store, "old", created=now - 500).alive(now - 400)
    RunBuilder(store, "new", created=now - 100).log(scalars([1, 2])).backend("wandb", state=BackendState.OK, offset=3)

    text = " ".join(cli("status").out.split())
    assert "run new status running step 2" in text
    assert re.search(r"last sign of life \d\d?s ago", text)
    assert "wandb ok" in text
    document = json.loads(cli("status", "old", "--json").out)
    assert document["status"] == "interrupted"
    assert 395 < document["silent_seconds"] < 420
