"""`submit`, `logs`, `stop` and `status` of jobs, with a cluster that does as it is told. The real one is in
tests/runtime/jobs/test_on_cluster.py."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.cli import joining, logs, status, stop, submit
from ray_tracking.runs import stopping
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.sweep import SweepStore
from ray_tracking.runtime.jobs.client import Job
from ray_tracking.runtime.jobs.noted import NotedJob, note_job
from ray_tracking.runtime.jobs.request import CHECKED, JobRequest
from tests.cli.conftest import Cli
from tests.monitoring.builder import RunBuilder, scalars
from tests.runtime.jobs.fake_cluster import DEAD, DONE, FAILED, RUNNING, Cluster

URL = "http://h:1"
EIGHT_GPUS = ("--set", "scaling.workers=8", "--set", "scaling.use_gpu=true")


@pytest.fixture
def cluster(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    Path("job.py").write_text("VALUE = 1\ndef train(run):\n    pass\n")
    made = Cluster([RUNNING], log=f"Running entrypoint for job x: y\n{CHECKED}\n")
    for module in (submit, logs, stop, status, joining):
        monkeypatch.setattr(module, "connect", lambda _address: made)
    return made


def sent(cluster: Cluster) -> JobRequest:
    return JobRequest.from_json(cluster.submitted[-1]["runtime_env"]["env_vars"]["RAY_TRACKING_JOB"])


def said(text: str) -> str:
    return " ".join(text.split())


# --- submit -------------------------------------------------------------------------------------------------


def test_it_prints_the_id_and_how_to_look(cli: Cli, cluster: Cluster, store: RunStore) -> None:
    done = cli("submit", "train", "job.py:train", "--address", URL, "--run-id", "demo", "--set", "params.lr=0.5")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == "demo-1"
    assert lines[1].endswith(f"ray-tracking logs -f demo --address {URL}")
    assert "ray-tracking status demo" in lines[2]
    assert "ray-tracking stop demo" in lines[3]
    assert "1 files" in done.err
    request = sent(cluster)
    assert request.config["params"] == {"lr": 0.5}
    assert request.config["storage"] == store.storage.root
    assert request.target == "job.py:train"
    assert cluster.submitted[0]["entrypoint"] == "python -m ray_tracking job-driver job.py:train --run-id demo"


def test_the_driver_is_placed(cli: Cli, cluster: Cluster) -> None:
    options = ("--driver-cpus", "1.5", "--driver-label", "ray.io/node-group=!head", "--python", "/opt/bin/python")
    done = cli("submit", "train", "job.py:train", "--address", URL, *options)
    assert done.code == 0, done.err
    driver = cluster.submitted[0]["driver"]
    assert (driver.needs, driver.labels) == ({"CPU": 1.5}, {"ray.io/node-group": "!head"})
    assert cluster.submitted[0]["entrypoint"].startswith("/opt/bin/python -m ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["job.py:tarin"], "Did you mean train?"),
        (["jobb.py:train"], "Did you mean job.py?"),
        (["missing_package.module:train", "--address", "h:6379"], "http://h:8265"),
        (["job.py:train", "--set", "scalign.workers=3"], "scaling"),
        (["job.py:train", "--set", "params.api_key=abc123def"], "environment of the cluster's nodes"),
        (["job.py:train", "--storage", "s3://KEY:sEcReTvalue@b/runs"], "storage"),
        (["job.py:train", "--storage", "nope://x"], "nope://x"),
        (["job.py:train", "--run-id", "../x"], "'../x'"),
        (["job.py:train", "--driver-resource", "gpu"], "NAME=AMOUNT"),
        (["job.py:train", "--driver-resource", "gpu=-1"], "NAME=AMOUNT"),
        (["job.py:train", "--driver-label", "zone"], "KEY=VALUE"),
        (["job.py:train", "--driver-resource", "special=1"], "no node can take the driver (1 special)"),
        (["job.py:train", *EIGHT_GPUS], "8 workers need 8 GPU, it has 0"),
        (["job.py:train", "--exclude", "job.*"], "would not be sent"),
        (["../outside.py:train"], "not below"),
        (["job.py:train", "--python", "env WANDB_API_KEY=abc123def456abc123def456abc123def456abcd python"], "a secret"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_2_and_nothing_is_sent(
    cli: Cli, cluster: Cluster, tmp_path: Path, arguments: list[str], text: str
) -> None:
    (tmp_path.parent / "outside.py").write_text("def train(run): pass\n")
    address = [] if "--address" in arguments else ["--address", URL]
    done = cli("submit", "train", *arguments, *address)
    assert done.code == 2, done.err
    assert text in said(done.err)
    assert "abc123def" not in done.err
    assert "sEcReTvalue" not in done.err
    assert cluster.submitted == []


def test_an_address_must_be_known(cli: Cli, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "RAY_API_SERVER_ADDRESS" in cli("submit", "train", "job.py:train").err
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", URL)
    assert cli("submit", "train", "job.py:train").code == 0


def test_a_folder_that_is_too_large_is_refused_by_name(cli: Cli, cluster: Cluster) -> None:
    with open("data.bin", "wb") as file:
        file.truncate(101 << 20)
    done = cli("submit", "train", "job.py:train", "--address", URL)
    assert done.code == 2
    assert "data.bin" in done.err
    assert cluster.submitted == []
    assert cli("submit", "train", "job.py:train", "--address", URL, "--exclude", "data.bin").code == 0


def test_a_completed_run_is_refused_and_an_unfinished_one_goes_on(cli: Cli, cluster: Cluster, store: RunStore) -> None:
    RunBuilder(store, "done").log(scalars([1])).finish()
    RunBuilder(store, "half").log(scalars([1]))
    note_job(store.directory("half"), NotedJob("half-4", 4, "http://old:1", 1.0))
    arguments = ("submit", "train", "job.py:train", "--address", URL, "--run-id")
    assert cli(*arguments, "done").code == 3
    assert cli(*arguments, "half").out.startswith("half-5\n")


def test_a_run_whose_job_goes_on_is_refused(cli: Cli, cluster: Cluster) -> None:
    cluster.known = [Job("demo-1", "RUNNING", run_id="demo", number=1)]
    done = cli("submit", "train", "job.py:train", "--address", URL, "--run-id", "demo")
    assert done.code == 3
    assert "stop demo" in done.err


@pytest.mark.parametrize(("code", "text"), [(2, "A path one host does not see."), (3, "The lease is held.")])
def test_a_refusal_of_the_driver_is_handed_on(cli: Cli, cluster: Cluster, code: int, text: str) -> None:
    cluster.answers = [{"status": "FAILED", "exit_code": code}]
    cluster.text = f"INFO ray things\nRunning entrypoint for job x: y\n{text}\n"
    done = cli("submit", "train", "job.py:train", "--address", URL)
    assert done.code == code
    assert text in done.err
    assert "ray things" not in done.err


@pytest.mark.parametrize(("answer", "code"), [(DONE, 0), (FAILED, 1), ({"status": "STOPPED"}, 1)])
def test_following_ends_as_the_job_does(cli: Cli, cluster: Cluster, answer: dict[str, Any], code: int) -> None:
    cluster.answers = [answer]
    done = cli("submit", "train", "job.py:train", "--address", URL, "--follow", "--run-id", "demo")
    assert done.code == code
    assert done.out == cluster.text
    assert f"demo-1 is {answer['status']}" in done.err


def test_retries_start_again(cli: Cli, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_tracking.runtime.retrying.FIRST_WAIT_SECONDS", 0.01)
    cluster.answers = [FAILED, FAILED, DONE]
    done = cli("submit", "train", "job.py:train", "--address", URL, "--no-follow", "--retries", "2", "--run-id", "demo")
    assert done.code == 0
    assert [job["submission_id"] for job in cluster.submitted] == ["demo-1", "demo-2", "demo-3"]
    assert "Started again as demo-3" in done.err
    assert done.out == ""


# --- logs, status, stop -------------------------------------------------------------------------------------


@pytest.fixture
def running(store: RunStore, cluster: Cluster) -> RunBuilder:
    run = RunBuilder(store, "demo").log(scalars([1, 2, 3]))
    run.checkpoint(2, {})
    for number in (1, 2):
        note_job(store.directory("demo"), NotedJob(f"demo-{number}", number, URL, 1.0))
    return run


def test_logs_of_the_newest_or_of_a_chosen_job(cli: Cli, cluster: Cluster, running: RunBuilder) -> None:
    assert cli("logs", "demo").out == cluster.text
    cluster.answers = [DONE]
    followed = cli("logs", "demo", "-f", "--job", "1")
    assert (followed.code, followed.out) == (0, cluster.text)
    assert "demo-1 is SUCCEEDED" in followed.err
    assert "Its jobs: 1, 2." in cli("logs", "demo", "--job", "7").err


def test_logs_of_a_run_without_a_job_say_where_else(cli: Cli, cluster: Cluster, store: RunStore) -> None:
    RunBuilder(store, "plain").log(scalars([1]))
    done = cli("logs", "plain")
    assert done.code == 2
    assert "/tmp/ray/session_latest/logs" in done.err


def test_a_run_on_a_storage_not_seen_from_here_is_found_at_the_cluster(cli: Cli, cluster: Cluster) -> None:
    cluster.known = [Job("far-1", "RUNNING", run_id="far", number=1, started=5.0)]
    assert cli("logs", "far").code == 2
    for wanted in ("far", "fa", "latest"):
        assert cli("logs", wanted, "--address", URL).out == cluster.text
    document = json.loads(cli("status", "far", "--address", URL, "--json").out)
    assert document["job"] == {"submission_id": "far-1", "address": URL, "status": "RUNNING"}
    assert "far-1" in cli("status", "far", "--address", URL).out


def test_status_shows_the_job_or_why_not(cli: Cli, cluster: Cluster, running: RunBuilder) -> None:
    shown = cli("status", "demo")
    assert f"demo-2 at {URL}: RUNNING" in said(shown.out)
    cluster.answers = [DEAD]
    document = json.loads(cli("status", "demo", "--json").out)
    assert (document["job"]["status"], document["last_step"]) == ("unknown", 3)
    assert "No Ray cluster answers" in document["job"]["error"]


def test_stop_asks_and_waits_for_the_end(cli: Cli, cluster: Cluster, running: RunBuilder, store: RunStore) -> None:
    def obey() -> None:
        while stopping.requested(store.directory("demo")) is None:
            time.sleep(0.05)
        store.save(store.load("demo").finish(time.time(), Status.ABORTED, "stopped by request"))

    trainer = threading.Thread(target=obey)
    trainer.start()
    done = cli("stop", "demo", "--timeout", "30")
    trainer.join()
    assert done.code == 0, done.err
    assert "The run demo is aborted; its last checkpoint is of step 2." in said(done.out)
    assert "resume demo" in done.out
    assert cluster.stopped == []
    assert "nothing to stop" in cli("stop", "demo").out


def test_a_job_that_does_not_obey_is_stopped(cli: Cli, cluster: Cluster, running: RunBuilder) -> None:
    cluster.answers = [{"status": "STOPPED"}]
    done = cli("stop", "demo", "--timeout", "0.2")
    assert done.code == 0, done.err
    assert cluster.stopped == ["demo-2"]
    assert "did not end within 0 s: it is STOPPED" in said(done.out)


def test_a_local_run_that_does_not_obey_is_said(cli: Cli, store: RunStore) -> None:
    RunBuilder(store, "plain").log(scalars([1]))
    done = cli("stop", "plain", "--timeout", "0.1")
    assert done.code == 1
    assert "Ctrl-C" in done.err
    assert stopping.requested(store.directory("plain")) is not None


def test_a_job_that_had_ended_is_not_taken_for_the_run(cli: Cli, cluster: Cluster, running: RunBuilder) -> None:
    """The run was resumed here since: it has not been stopped by a job that is over."""
    cluster.answers = [{"status": "SUCCEEDED"}]
    cluster.is_running = False
    done = cli("stop", "demo", "--timeout", "0.2")
    assert done.code == 1
    assert "was not running any more" in done.out
    assert "has not ended" in done.err


def test_a_sweep_is_asked_to_have_its_trials_end(cli: Cli, store: RunStore) -> None:
    RunBuilder(store, "many").log(scalars([1]))
    SweepStore(store, "many").create("loss", "min", {})
    done = cli("stop", "many", "--timeout", "0")
    assert done.code == 1
    assert "have its trials save a checkpoint" in done.err
    assert stopping.requested(store.directory("many")) is not None


def test_one_that_has_failed_is_kept_from_being_started_again(cli: Cli, store: RunStore) -> None:
    RunBuilder(store, "sick").log(scalars([1]))
    store.save(store.load("sick").finish(time.time(), Status.FAILED, "out of luck"))
    assert "nothing to stop" in cli("stop", "sick").out
    assert stopping.requested(store.directory("sick")) is not None


def test_stop_now_and_of_what_is_not_seen_from_here_is_rays_own(
    cli: Cli, cluster: Cluster, running: RunBuilder, store: RunStore
) -> None:
    cluster.answers = [{"status": "STOPPED"}]
    assert cli("stop", "demo", "--now").code == 0
    assert stopping.requested(store.directory("demo")) is None
    cluster.known = [Job("far-1", "RUNNING", run_id="far", number=1)]
    assert cli("stop", "far", "--address", URL).code == 0
    assert cluster.stopped == ["demo-2", "far-1"]


def test_a_run_that_shows_no_life_is_not_asked(cli: Cli, store: RunStore, cluster: Cluster) -> None:
    long_ago = time.time() - 7200
    RunBuilder(store, "dead", created=long_ago).log(scalars([1])).alive(long_ago)
    done = cli("stop", "dead")
    assert done.code == 0
    assert "is interrupted" in done.out
    assert stopping.requested(store.directory("dead")) is None
