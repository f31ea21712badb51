"""Following and starting again, against a cluster that does as it is told. The real one is in test_on_cluster.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_tracking.config import get_config
from ray_tracking.errors import RefusedError, RunFailedError, UsageError
from ray_tracking.runtime.jobs import submitting, watching
from ray_tracking.runtime.jobs.client import Job, UnknownJobError, UnreachableError
from ray_tracking.runtime.jobs.package import Package
from ray_tracking.runtime.jobs.request import CHECKED, JobRequest
from ray_tracking.runtime.jobs.submitting import Plan, View, follow_with_retries, send, wait_for_cluster
from ray_tracking.runtime.jobs.watching import Follower, ending_of, own_words, refusal, until_checked
from ray_tracking.runtime.retrying import Ending
from tests.runtime.jobs.fake_cluster import DEAD, DONE, FAILED, KILLED, RUNNING, Cluster


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes by itself when someone sleeps."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("time.monotonic", lambda: sum(slept))
    return slept


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    config = get_config("testing", {"scaling.workers": 2})
    request = JobRequest("demo", 0, "t.py:train", "http://h:1", config.to_dict(), {"ray": "2.60.0"})
    return Plan(request, config, Package(str(tmp_path), (".git",), ()))


def test_a_run_that_was_asked_to_stop_meanwhile_is_not_started_again(plan: Plan) -> None:
    cluster = Cluster([FAILED])
    seen = View(lambda: "failed", lambda: None, lambda: True)
    _, ending, said = again(cluster, plan, seen)
    assert (ending, len(cluster.submitted)) == (Ending.STOPPED, 1)
    assert "asked to stop" in said[-1]


def view(status: str | None = None, steps: list[int | None] | None = None) -> View:
    seen = list(steps or [None])
    return View(lambda: status, lambda: seen.pop(0) if len(seen) > 1 else seen[0])


# --- following ----------------------------------------------------------------------------------------------


def test_each_character_once_however_often_the_connection_breaks() -> None:
    cluster, got, said = Cluster([DONE]), [], []
    cluster.cuts = [4, 4, 2, 9]
    ended = Follower(cluster, "demo-1", got.append, said.append).to_the_end()  # type: ignore[arg-type]
    assert ended is not None
    assert ended.status == "SUCCEEDED"
    assert "".join(got) == cluster.text
    assert [line.split()[0] for line in said] == ["Lost", "http://h:1"]


def test_a_job_that_goes_on_is_followed_on() -> None:
    cluster, got = Cluster([RUNNING, RUNNING, DONE]), []
    assert Follower(cluster, "demo-1", got.append, print).to_the_end() is not None  # type: ignore[arg-type]
    assert "".join(got) == cluster.text


def test_a_cluster_that_stays_away_is_given_up_after_the_patience(no_waiting: list[float]) -> None:
    with pytest.raises(UnreachableError):
        Follower(Cluster([DEAD]), "demo-1", None, lambda _: None, patience=30).to_the_end()  # type: ignore[arg-type]
    assert 30 <= sum(no_waiting) < 60


def test_another_cluster_at_the_address_means_that_the_job_is_lost() -> None:
    answers = [RUNNING, DEAD, DEAD, UnknownJobError("no job")]
    assert Follower(Cluster(answers), "demo-1", None, lambda _: None).to_the_end() is None  # type: ignore[arg-type]


def test_waiting_for_the_checks() -> None:
    cluster = Cluster([RUNNING], log=f"Running entrypoint for job x: y\n{CHECKED}\n")
    assert until_checked(cluster, "demo-1", 60).status == "RUNNING"  # type: ignore[arg-type]
    assert until_checked(Cluster([RUNNING, FAILED]), "demo-1", 60).exit_code == 1  # type: ignore[arg-type]
    assert until_checked(Cluster([{"status": "PENDING"}]), "demo-1", 5).status == "PENDING"  # type: ignore[arg-type]


# --- what an end means --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "run", "ending"),
    [
        (None, None, Ending.LOST),
        (None, "completed", Ending.COMPLETED),
        (KILLED, "completed", Ending.COMPLETED),
        ({"status": "FAILED", "exit_code": 3}, "completed", Ending.COMPLETED),
        (DONE, "completed", Ending.COMPLETED),
        (DONE, None, Ending.COMPLETED),
        (FAILED, "failed", Ending.FAILED),
        (FAILED, "aborted", Ending.STOPPED),
        ({"status": "FAILED", "exit_code": 130}, None, Ending.STOPPED),
        ({"status": "STOPPED"}, "running", Ending.STOPPED),
        ({"status": "FAILED", "exit_code": 2}, None, Ending.REFUSED),
        ({"status": "FAILED", "exit_code": 3}, "running", Ending.REFUSED),
        ({"status": "FAILED", "exit_code": 137}, "running", Ending.FAILED),
        (KILLED, "running", Ending.LOST),
    ],
)
def test_endings(job: dict[str, Any] | None, run: str | None, ending: Ending) -> None:
    assert ending_of(None if job is None else Job("demo-1", **job), run) is ending


LOG = "INFO job_manager: Runtime env is setting up.\nRunning entrypoint for job demo-1: python -m x\n{}\n"


def test_the_commands_own_words() -> None:
    assert own_words(LOG.format("what\nfor")) == ["what", "for"]
    assert own_words("only this") == ["only this"]


@pytest.mark.parametrize(
    ("code", "text", "said"),
    [
        (127, "/bin/sh: 1: python: not found", "--python"),
        (1, "/usr/bin/python3: No module named ray_tracking", "has no ray_tracking"),
        (1, "ModuleNotFoundError: No module named 'sklearn'", None),
        (2, "--set: bad", None),
    ],
)
def test_a_cluster_without_our_python_is_explained(code: int, text: str, said: str | None) -> None:
    error = refusal(Job("demo-1", "FAILED", exit_code=code), LOG.format(text), "python")
    assert (error is None) if said is None else (said in str(error))


# --- sending and starting again -----------------------------------------------------------------------------


def test_what_is_sent(plan: Plan) -> None:
    cluster = Cluster()
    assert send(cluster, plan).submission_id == "demo-1"  # type: ignore[arg-type]
    (given,) = cluster.submitted
    assert given["metadata"] == {"ray_tracking_run": "demo", "ray_tracking_number": "1"}
    assert given["runtime_env"]["working_dir"] == plan.package.directory
    sent = JobRequest.from_json(given["runtime_env"]["env_vars"]["RAY_TRACKING_JOB"])
    assert (sent.number, sent.takes_over) == (1, False)


def test_a_number_that_is_taken_is_passed_over(plan: Plan) -> None:
    cluster = Cluster()
    cluster.known = [Job("demo-1", "FAILED", run_id="demo", number=1)]
    cluster.submitted = [{"submission_id": "demo-2"}]  # deleted from the list, but not forgotten
    assert send(cluster, plan).submission_id == "demo-3"  # type: ignore[arg-type]


def test_a_run_that_goes_on_is_not_sent_again(plan: Plan) -> None:
    cluster = Cluster()
    cluster.known = [Job("demo-1", "RUNNING", run_id="demo", number=1), Job("x-1", "RUNNING", run_id="x", number=1)]
    with pytest.raises(RefusedError, match=r"demo-1 .*RUNNING.*\n.*logs demo -f.*stop demo"):
        send(cluster, plan)  # type: ignore[arg-type]
    assert cluster.submitted == []


def again(cluster: Cluster, plan: Plan, seen: View, retries: int = 2, **options: Any) -> tuple[Any, Ending, list[str]]:
    said: list[str] = []
    first = send(cluster, plan)  # type: ignore[arg-type]
    job, ending = follow_with_retries(
        cluster,  # type: ignore[arg-type]
        first.submission_id,
        plan,
        connect=options.get("connect", lambda: cluster),
        retries=retries,
        write=None,
        say=said.append,
        view=seen,
    )
    return job, ending, said


def test_it_is_started_again_until_it_is_done(plan: Plan) -> None:
    cluster = Cluster([FAILED, KILLED, DONE])
    job, ending, said = again(cluster, plan, view("running"))
    assert (job.submission_id, ending) == ("demo-3", Ending.COMPLETED)
    assert [given["submission_id"] for given in cluster.submitted] == ["demo-1", "demo-2", "demo-3"]
    last = JobRequest.from_json(cluster.submitted[-1]["runtime_env"]["env_vars"]["RAY_TRACKING_JOB"])
    assert last.takes_over
    assert "try 1 of 2" in said[0]
    assert "Started again as demo-2" in said[1]
    assert "without its driver: Job supervisor actor died" in said[2]


def test_the_budget_ends_a_crash_loop(plan: Plan) -> None:
    cluster = Cluster([FAILED])
    job, ending, said = again(cluster, plan, view("failed", [5]))
    assert (job.submission_id, ending) == ("demo-3", Ending.FAILED)
    assert "3 times in a row without progress" in said[-1]


def test_a_new_checkpoint_refills_the_budget(plan: Plan) -> None:
    cluster = Cluster([FAILED, FAILED, FAILED, FAILED, DONE])
    job, ending, said = again(cluster, plan, view("failed", [None, 10, 20, 30, 40, 50]), retries=1)
    assert (job.submission_id, ending) == ("demo-5", Ending.COMPLETED)
    assert "checkpoint at step 10" in said[0]


@pytest.mark.parametrize("last", [{"status": "STOPPED"}, {"status": "FAILED", "exit_code": 3}])
def test_what_was_stopped_or_refused_is_left_alone(plan: Plan, last: dict[str, Any]) -> None:
    cluster = Cluster([last])
    again(cluster, plan, view())
    assert len(cluster.submitted) == 1


def test_a_lost_cluster_is_waited_for_until_it_can_hold_the_run(plan: Plan) -> None:
    """The old one is gone, then nothing answers, then a new one whose workers come later."""
    old, new = Cluster([UnknownJobError("no job")]), Cluster([DONE], cpus=0)
    tries: list[int] = []

    def connect() -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise DEAD
        new.cpus = 0.0 if len(tries) < 5 else 4.0
        return new

    job, ending, said = again(old, plan, view("running"), connect=connect)
    assert (job.submission_id, ending) == ("demo-2", Ending.COMPLETED)  # though the new cluster has seen no job of it
    assert [given["submission_id"] for given in new.submitted] == ["demo-2"]
    assert "lost with its cluster" in said[0]
    assert [line.partition(".")[0] for line in said[1:3]] == [
        "No Ray cluster answers at http://h:1",
        "The cluster at http://h:1 can't hold the run yet: 2 workers need 2 CPU, it has 0",
    ]


def test_waiting_for_a_cluster_ends(plan: Plan) -> None:
    def connect() -> Any:
        raise DEAD

    with pytest.raises(RunFailedError, match="Waited for 2 minutes"):
        wait_for_cluster(connect, plan, lambda _: None, seconds=120)


def test_a_refused_token_is_not_waited_for(plan: Plan) -> None:
    def connect() -> Any:
        raise UsageError("refuses our token")

    with pytest.raises(UsageError, match="token"):
        wait_for_cluster(connect, plan, lambda _: None)


def test_without_retries_a_cluster_that_vanishes_is_said(plan: Plan) -> None:
    with pytest.raises(RunFailedError, match=r"has not answered for 60 s.*\n.*--retries"):
        again(Cluster([DEAD]), plan, view(), retries=0)


def test_modules_use_one_clock() -> None:
    """The fixture above replaces the clock of both."""
    assert watching.time is submitting.time
