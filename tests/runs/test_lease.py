"""Leases on real storage, with real processes: raced for, paused, killed, given back, found damaged."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_tracking import conditional
from ray_tracking.errors import LeaseHeldError, LeaseLostError, StorageError
from ray_tracking.runs.lease import Lease, LeaseKeeper, acquire, holder, join
from ray_tracking.runs.lease_files import Clock
from ray_tracking.runs.lease_rules import FOLDER, SILENCE, TRUST, LeaseRecord, Seat, parse_record
from ray_tracking.runs.process import Process, this_process
from ray_tracking.storage import Storage
from tests.checkpoint.faults import Killed, KillingStorage, kill_points
from tests.s3 import s3_server, s3_uri

__all__ = ["s3_server", "s3_uri"]

HERE = this_process()
DEAD = replace(HERE, started="1")
"""A process of this host that has ended."""
FAR = Process("node-9", 4321, "another boot", "another namespace", "1")


class FakeClock(Clock):
    """Time passes only while somebody waits; `meanwhile` is called then."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.waits: list[float] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds
        self.waits.append(seconds)
        self.meanwhile()


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "run-1")


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open(tmp_path / "run-1")
    return Storage.open(request.getfixturevalue("s3_uri")).child("run-1")


def age(run: Storage, seconds: float) -> None:
    """As if the lease files had been written so long ago."""
    for path in Path(run.path(FOLDER)).iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def files(run: Storage) -> list[str]:
    return [entry.name for entry in run.list(FOLDER)]


def record_of(run: Storage, seat: Seat) -> LeaseRecord:
    record = parse_record(run.read_bytes(seat.name))
    assert record is not None
    return record


# --- held, given back, run out


def test_a_second_one_is_told_who_holds_it_and_gets_in_when_it_is_given_back(run):
    clock = FakeClock()
    first = acquire(run, process=FAR)
    assert (first.epoch, first.duration) == (1, 30.0)
    with pytest.raises(LeaseHeldError) as caught:
        acquire(run, clock=clock)
    message = str(caught.value)
    since = time.strftime("since %Y-%m-%d", time.gmtime(record_of(run, first.seat).acquired))
    assert caught.value.exit_code == 3
    assert (caught.value.process, caught.value.epoch) == (FAR, 1)
    assert 20 < caught.value.expires_in <= 30
    for part in ("'run-1'", "pid 4321 on node-9", since, "UTC", "runs out in", "--run-id"):
        assert part in message
    first.check()
    first.release()
    first.release()
    second = acquire(run, clock=clock)
    assert (second.epoch, clock.waits) == (2, [])
    assert files(run) == ["000002-0000"]
    second.check()
    for act in (first.check, first.renew):
        with pytest.raises(LeaseLostError, match="given back"):
            act()


def test_one_that_waits_gets_in_when_it_is_given_back(local):
    first = acquire(local, process=FAR)
    clock = FakeClock()
    clock.meanwhile = lambda: first.release() if clock.time > 1010 else None
    assert acquire(local, clock=clock, patience=20).epoch == 2
    assert clock.time < 1020


def test_waiting_has_an_end(local):
    first = acquire(local, process=FAR)
    clock = FakeClock()
    clock.meanwhile = first.renew
    with pytest.raises(LeaseHeldError):
        acquire(local, clock=clock, patience=100)
    assert clock.time == 1100.0


def test_one_that_has_run_out_is_watched_then_taken_and_the_stale_owner_is_refused(local):
    owner_clock, clock = FakeClock(), FakeClock()
    owner = acquire(local, clock=owner_clock, process=FAR)
    age(local, 31)
    new = acquire(local, clock=clock)
    assert new.epoch == 2
    assert clock.time - 1000 == pytest.approx(30 * SILENCE)
    owner.check()  # it may believe so long, which the newcomer has waited for
    owner_clock.time += 30 * TRUST + 0.1
    with pytest.raises(LeaseLostError) as caught:
        owner.check()
    assert (caught.value.epoch, caught.value.process, caught.value.exit_code) == (2, HERE, 3)
    assert f"pid {os.getpid()} on" in str(caught.value)
    assert files(local) == ["000002-0000"]
    owner.release()
    assert files(local) == ["000002-0000"]
    new.check()


def test_without_any_renewal_the_newcomers_own_clock_is_enough(local):
    """The storage's clock stands still."""
    acquire(local, process=FAR)
    clock = FakeClock()
    clock.meanwhile = lambda: age(local, 0)
    assert acquire(local, clock=clock, patience=40).epoch == 2
    assert 1030 < clock.time <= 1040


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_live_owner_keeps_its_lease_when_the_storages_clock_jumps(local, jump):
    owner_clock, clock = FakeClock(), FakeClock()
    owner = acquire(local, clock=owner_clock, process=FAR)
    age(local, jump)

    def renew() -> None:
        owner_clock.time = clock.time
        owner.renew()
        age(local, jump)

    clock.meanwhile = renew
    with pytest.raises(LeaseHeldError) as caught:
        acquire(local, clock=clock)
    assert 0 < caught.value.expires_in <= 30
    assert files(local) == ["000001-0000"]


@pytest.mark.parametrize("off", [3600.0, -3600.0, 4e9])
def test_the_wall_clock_of_a_host_means_nothing(local, monkeypatch, off):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + off)
    owner = acquire(local, process=FAR)
    for mine in (off, 0.0, -off):
        monkeypatch.setattr(time, "time", lambda mine=mine: real() + mine)
        with pytest.raises(LeaseHeldError) as caught:
            acquire(local, clock=FakeClock())
        assert 20 < caught.value.expires_in <= 30
    monkeypatch.setattr(time, "time", real)
    age(local, 31)
    assert acquire(local, clock=FakeClock()).epoch == owner.epoch + 1


@pytest.fixture
def often(monkeypatch) -> None:
    """Renewals several times a second of leases that last: the end of one waits so long for its keeper."""
    monkeypatch.setattr("ray_tracking.runs.lease.RENEWAL", 0.005)


def test_renewals_keep_it_and_are_seen_by_others(local, often):
    lease = acquire(local, process=FAR)
    with LeaseKeeper(lease):
        end = time.monotonic() + 60
        while record_of(local, lease.seat).renewals < 4 and time.monotonic() < end:
            time.sleep(0.05)
        assert record_of(local, lease.seat).renewals >= 4
        lease.check()
    assert record_of(local, lease.seat).released
    assert acquire(local, clock=FakeClock()).epoch == 2


def test_the_keeper_tells_once_that_it_was_lost_and_gives_nothing_back(local):
    told: list[LeaseLostError] = []
    heard = threading.Event()
    lease = acquire(local, duration=0.3, process=FAR)
    local.create_new(Seat(2).name, replace(record_of(local, lease.seat), process=HERE, token="x").to_json())
    with LeaseKeeper(lease, lambda error: (told.append(error), heard.set())):
        assert heard.wait(60)
    assert [(error.epoch, error.process) for error in told] == [(2, HERE)]
    assert files(local) == ["000002-0000"]


def test_the_keeper_goes_on_when_the_storage_comes_back(local, monkeypatch, often):
    lease = acquire(local, process=FAR)
    real, failures = Storage.write_bytes, []

    def write(self, name, data):
        if len(failures) < 3:
            failures.append(name)
            raise StorageError("away")
        real(self, name, data)

    monkeypatch.setattr(Storage, "write_bytes", write)
    with LeaseKeeper(lease):
        end = time.monotonic() + 60
        while record_of(local, lease.seat).renewals < 5 and time.monotonic() < end:
            time.sleep(0.05)
    assert failures == [lease.seat.name] * 3
    assert record_of(local, lease.seat).released


def test_a_check_that_can_not_be_sure_asks_the_storage(local, monkeypatch):
    clock = FakeClock()
    lease = acquire(local, clock=clock)
    asked = []
    real = Storage.write_bytes
    monkeypatch.setattr(Storage, "write_bytes", lambda self, name, data: (asked.append(name), real(self, name, data)))
    lease.check()
    clock.time += 30 * TRUST
    lease.check()
    assert asked == []
    clock.time += 0.1
    lease.check()
    lease.check()
    assert asked == [lease.seat.name]

    def away(self, name, data):
        raise StorageError("away")

    monkeypatch.setattr(Storage, "write_bytes", away)
    clock.time += 30
    with pytest.raises(StorageError, match="away"):
        lease.check()
    monkeypatch.setattr(Storage, "write_bytes", real)
    lease.check()


@pytest.mark.parametrize("duration", [0, -1, 1e6, float("nan")])
def test_a_duration_that_makes_no_sense(local, duration):
    with pytest.raises(ValueError, match="A lease lasts"):
        acquire(local, duration=duration)


# --- dead owners


def test_a_dead_owner_on_this_host_is_not_waited_for(local):
    clock = FakeClock()
    acquire(local, process=DEAD)
    assert acquire(local, clock=clock, process=HERE).epoch == 2
    assert clock.waits == []


def test_its_writer_elsewhere_is(local):
    owner = acquire(local, process=DEAD)
    writer_clock, clock = FakeClock(), FakeClock()
    writer = join(local, owner.ticket, clock=writer_clock, process=FAR)
    could_write: list[float] = []

    def write_on() -> None:
        writer_clock.time = clock.time
        with contextlib.suppress(LeaseLostError):
            writer.check()
            could_write.append(clock.time)

    clock.meanwhile = write_on
    assert acquire(local, clock=clock).epoch == 2
    assert could_write[-1] == 1013.0, "it may believe in its lease for a while, which is waited for"
    assert clock.time == 1014.0, "then it looks, and takes its file away"
    with pytest.raises(LeaseLostError):
        writer.check()


def test_its_dead_writer_here_is_not(local):
    clock = FakeClock()
    join(local, acquire(local, process=DEAD).ticket, process=DEAD)
    assert acquire(local, clock=clock).epoch == 2
    assert clock.waits == []
    assert files(local) == ["000002-0000"]


# --- writers


def test_a_writer_that_is_started_again_shuts_out_the_one_before(run):
    owner = acquire(run)
    first = join(run, owner.ticket, process=DEAD)
    first.check()
    clock = FakeClock()
    second = join(run, owner.ticket, clock=clock)
    assert (first.seat, second.seat, clock.waits) == (Seat(1, 1), Seat(1, 2), [])
    with pytest.raises(LeaseLostError) as caught:
        first.renew()
    assert (caught.value.epoch, caught.value.process) == (1, HERE)
    for lease in (owner, second):
        lease.renew()
    assert files(run) == ["000001-0000", "000001-0002"]
    third = join(run, owner.ticket, clock=clock)
    assert sum(clock.waits) == pytest.approx(30 * SILENCE)  # the second one lives
    third.release()
    owner.release()
    assert acquire(run, clock=clock).epoch == 2
    assert sum(clock.waits) == pytest.approx(30 * SILENCE)


def test_a_ticket_is_good_as_long_as_its_owner_holds_the_lease(local):
    owner = acquire(local, process=DEAD)
    other = json.dumps({**json.loads(owner.ticket), "token": "another"})
    with pytest.raises(LeaseLostError):
        join(local, other)
    new = acquire(local)
    with pytest.raises(LeaseLostError) as caught:
        join(local, owner.ticket)
    assert (caught.value.epoch, caught.value.process) == (2, HERE)
    new.release()
    for ticket in (owner.ticket, new.ticket):
        with pytest.raises(LeaseLostError, match="has ended"):
            join(local, ticket)
    assert files(local) == ["000002-0000"]


# --- looked at by those who only take care


def test_one_look_tells_who_owns_the_run(local, monkeypatch):
    assert holder(local) is None
    first = acquire(local, process=FAR)
    join(local, first.ticket, process=DEAD)
    files_before = files(local)
    assert holder(local) == FAR
    age(local, 50)
    assert holder(local) == FAR, "clocks may differ a little"
    age(local, 61)
    assert holder(local) is None
    age(local, 0)
    assert holder(local) == FAR
    assert files(local) == files_before, "it writes nothing"
    first.release()
    assert holder(local) is None
    acquire(local, process=DEAD)
    assert holder(local) is None
    local.write_bytes(Seat(7).name, b"torn")
    assert holder(local) is None


# --- real processes

CHILD = textwrap.dedent("""
    import sys
    from ray_tracking.errors import RefusedError
    from ray_tracking.runs.lease import LeaseKeeper, acquire
    from ray_tracking.storage import reopen

    run = reopen(sys.argv[1])
    lease = keeper = None
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            match line.split():
                case ["acquire"]:
                    lease = acquire(run)
                    answer = f"won {lease.epoch}"
                case ["keep", seconds]:
                    lease = acquire(run, duration=float(seconds))
                    LeaseKeeper(lease).__enter__()
                    answer = f"won {lease.epoch}"
                case ["release"]:
                    lease.release()
                    answer = "released"
                case ["check"]:
                    lease.check()
                    answer = "ok"
        except RefusedError as error:
            answer = f"{type(error).__name__} {error.epoch} {error.process.pid if error.process else 0}"
        print(answer, flush=True)
""")


class Child:
    """Another process with a lease of its own; `tell` without waiting, `hear` its answer."""

    def __init__(self, run: Storage) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, run.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, command: str) -> None:
        self.process.stdin.write(f"{command}\n")

    def hear(self) -> str:
        return self.process.stdout.readline().strip()

    def ask(self, command: str) -> str:
        self.tell(command)
        return self.hear()


@pytest.fixture
def children(run: Storage) -> Iterator[list[Child]]:
    both = [Child(run), Child(run)]
    try:
        assert [child.hear() for child in both] == ["ready", "ready"]
        yield both
    finally:
        for child in both:
            child.process.kill()
            child.process.communicate()


def test_of_two_that_race_one_wins_each_time(run, children):
    wins = {child.pid: 0 for child in children}
    rounds = 50 if run.is_local else 8
    for epoch in range(1, rounds + 1):
        for child in children:
            child.tell("acquire")
        answers = {child: child.hear() for child in children}
        winner = next(child for child, answer in answers.items() if answer == f"won {epoch}")
        loser = next(child for child in children if child is not winner)
        assert answers[loser] == f"LeaseHeldError {epoch} {winner.pid}"
        assert (winner.ask("check"), winner.ask("release")) == ("ok", "released")
        wins[winner.pid] += 1
    assert sum(wins.values()) == rounds
    assert files(run) == [f"{rounds:06d}-0000"]


def test_one_that_was_stopped_for_longer_than_its_lease_is_refused_when_it_goes_on(run, children):
    owner, other = children
    assert owner.ask("keep 4") == "won 1"
    assert other.ask("acquire").startswith(f"LeaseHeldError 1 {owner.pid}")
    os.kill(owner.pid, signal.SIGSTOP)
    lease = acquire(run, patience=60)  # stopped is not dead: it is waited for
    assert lease.epoch == 2
    os.kill(owner.pid, signal.SIGCONT)
    assert owner.ask("check") == f"LeaseLostError 2 {os.getpid()}"
    assert owner.ask("release") == "released"
    lease.renew()
    assert files(run) == ["000002-0000"]


@pytest.mark.skipif(not HERE.boot, reason="the system does not tell one process from another")
def test_one_that_was_killed_here_is_not_waited_for(run, children):
    assert children[0].ask("keep 3000") == "won 1"
    os.kill(children[0].pid, signal.SIGKILL)
    os.waitid(os.P_PID, children[0].pid, os.WEXITED | os.WNOWAIT)
    clock = FakeClock()
    assert acquire(run, clock=clock).epoch == 2
    assert clock.waits == []


# --- killed in between


class Killing(KillingStorage):
    """Also within a conditional creation: `during` leaves what a file system without hard links does."""

    def create_new(self, name: str, data: bytes) -> bool:
        self._begin()
        if self._now("during"):
            Storage.open(self.uri).write_bytes(name, data[: len(data) // 2])
            raise Killed
        made = super().create_new(name, data)
        self._end()
        return made


def before_it(run: Storage, state: str) -> Lease | None:
    """An earlier owner, and what it left."""
    if state == "new":
        return None
    owner = acquire(run, clock=FakeClock(), process=FAR)
    join(run, owner.ticket, clock=FakeClock(), process=FAR)
    run.write_bytes(f"{FOLDER}/probe-00", b"")
    if state == "released":
        owner.release()
    return owner


@pytest.mark.parametrize("known_dead", [True, False])
@pytest.mark.parametrize("state", ["new", "released", "expired"])
def test_one_that_is_killed_while_it_takes_the_lease_leaves_it_to_the_next(tmp_path, state, known_dead):
    for number, when in kill_points():
        root = tmp_path / f"{number}-{when}" / "run-1"
        plain = Storage.open(root)
        earlier = before_it(plain, state)
        if earlier is not None:
            age(plain, 31)
        killing = Killing(root, number, when)
        with contextlib.suppress(Killed):
            acquire(killing, clock=FakeClock(), process=DEAD if known_dead else FAR)
        if killing.count < number:
            break
        made = max((seat.epoch for name in files(plain) if (seat := Seat.parse(name))), default=0)
        if made:
            age(plain, 31)
        lease = acquire(plain, clock=FakeClock())
        assert lease.epoch == made + 1
        lease.check()
        lease.renew()
        assert files(plain) == [f"{lease.epoch:06d}-0000"]
        if earlier is not None and state == "expired":
            with pytest.raises(LeaseLostError):
                earlier.renew()
    assert number > (1 if state == "new" else 4)


def test_one_that_is_killed_while_it_holds_joins_renews_or_releases(tmp_path):
    for number, when in kill_points():
        root = tmp_path / f"{number}-{when}" / "run-1"
        plain = Storage.open(root)
        ticket = acquire(plain, process=DEAD).ticket
        join(plain, ticket, process=DEAD)
        killing = Killing(root, number, when)
        with contextlib.suppress(Killed):
            writer = join(killing, ticket, process=DEAD)
            writer.renew()
            writer.release()
        if killing.count < number:
            break
        clock = FakeClock()
        age(plain, 31)  # a file cut in half does not tell who made it
        again = join(plain, ticket, clock=clock)
        assert again.seat.number > 1
        again.check()
        lease = acquire(plain, clock=clock)
        assert lease.epoch == 2
        with pytest.raises(LeaseLostError):
            again.renew()
    assert number > 5


# --- damaged files, lost replies, weak storages


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"\xff\x00", b"[1, 2]", b'{"process": {"pid": 1}}', b"9" * 5000]
)
def test_a_lease_that_can_not_be_read_is_held_until_it_has_run_out(local, content):
    local.write_bytes(Seat(7).name, content)
    local.write_bytes(f"{FOLDER}/notes.txt", b"not ours")
    with pytest.raises(LeaseHeldError, match=r"can't be read.*runs out in (30|2\d) s") as caught:
        acquire(local, clock=FakeClock())
    assert (caught.value.process, caught.value.epoch) == (None, 7)
    age(local, 31)
    clock = FakeClock()
    assert acquire(local, clock=clock).epoch == 8
    assert sum(clock.waits) == pytest.approx(30 * SILENCE)
    assert files(local) == ["000008-0000", "notes.txt"]


def test_a_creation_whose_reply_was_lost_is_ours(local, monkeypatch):
    real = conditional.create_new

    def lose(storage, name, data):
        real(storage, name, data)
        raise OSError(5, "the connection was reset")

    monkeypatch.setattr(conditional, "create_new", lose)
    lease = acquire(local)
    assert lease.epoch == 1
    lease.check()
    assert files(local) == ["000001-0000"]


def test_a_creation_that_failed_is_said(local, monkeypatch):
    def fail(storage, name, data):
        raise OSError(5, "the connection was reset")

    monkeypatch.setattr(conditional, "create_new", fail)
    with pytest.raises(StorageError, match="connection was reset"):
        acquire(local)


def test_it_gives_back_what_it_has_just_taken_when_the_storage_fails(local, monkeypatch):
    before_it(local, "released")
    real, calls = Storage.list, []

    def fail_after_creation(self, name=""):
        if self.exists(Seat(2).name) and not calls:
            calls.append(name)
            raise StorageError("away")
        return real(self, name)

    monkeypatch.setattr(Storage, "list", fail_after_creation)
    with pytest.raises(StorageError, match="away"):
        acquire(local, clock=FakeClock())
    assert record_of(local, Seat(2)).released


def test_someone_who_was_held_up_too_long_does_not_win_an_old_number(local, monkeypatch):
    """Between its look and its creation others came, went, and cleared the number away that it then makes."""
    acquire(local, process=DEAD)
    real, late = conditional.create_new, []

    def hold_up(storage, name, data):
        if not late:
            late.append(name)
            for _ in range(3):
                acquire(local, clock=FakeClock(), process=DEAD)
        return real(storage, name, data)

    monkeypatch.setattr(conditional, "create_new", hold_up)
    lease = acquire(local, clock=FakeClock())
    assert (late, lease.epoch) == ([Seat(2).name], 5)
    assert files(local) == ["000005-0000"]


def test_where_the_storage_can_not_decide_a_rival_is_found_by_its_token(local, monkeypatch, capfd):
    """As without boto3 on S3: both made the same file, the later one stands."""
    monkeypatch.setattr(conditional, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(conditional, "create_new", conditional._write_and_settle)
    monkeypatch.setattr("ray_tracking.runs.lease.is_exclusive", lambda storage: False)
    first = acquire(local, process=FAR)
    assert "can't tell who was first" in capfd.readouterr().err
    local.write_bytes(first.seat.name, replace(record_of(local, first.seat), process=HERE, token="rival").to_json())
    with pytest.raises(LeaseLostError) as caught:
        first.renew()
    assert caught.value.process == HERE
    assert record_of(local, first.seat).token == "rival"
