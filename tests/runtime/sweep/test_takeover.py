from __future__ import annotations

import json
import secrets

import pytest
import torch

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.checkpoint.keys import Key, Keyring
from ray_tracking.checkpoint.manifest import save_attempt
from ray_tracking.checkpoint.sealing import Sealing
from ray_tracking.errors import CheckpointError
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime.sweep.holding import Takeover, candidates, hold, release
from ray_tracking.runtime.sweep.takeover import take_over
from ray_tracking.storage import Storage
from tests.checkpoint.conftest import snapshot
from tests.monitoring.builder import RunBuilder

DONOR, OTHER = "s.trial-001", "s.trial-002"


@pytest.fixture
def runs(tmp_path) -> RunStore:
    """Two trials; the first has whole checkpoints of two ranks at steps 10, 20 and 30, the second one of its own."""
    store = RunStore(Storage.open(tmp_path))
    for run_id, steps in ((DONOR, (10, 20, 30)), (OTHER, (5,))):
        RunBuilder(store, run_id)
        for step in steps:
            save(store, run_id, step)
    return store


def save(runs: RunStore, run_id: str, step: int, sealing: Sealing | None = None, attempt: int = 1) -> None:
    store = CheckpointStore(runs.directory(run_id), f"attempt-{attempt:03d}")
    for rank in (0, 1):
        part = snapshot(step, rank=rank, world_size=2, save_id=f"attempt-{attempt}")
        store.write_snapshot(store.folder_of(step), part, sealing)


def taken(step: int, number: int = 1) -> Takeover:
    return Takeover(number, DONOR, step, reports=2)


def test_a_state_that_is_taken_over_is_the_newest_checkpoint_of_the_trials_next_attempt(runs):
    found = take_over(runs, OTHER, taken(20), None)
    assert (found.step, found.folder, found.is_new) == (20, "attempt-002/step-000020", True)
    store, donor = CheckpointStore(runs.directory(OTHER)), CheckpointStore(runs.directory(DONOR))
    newest = max(store.checkpoints(), key=lambda info: info.order)
    assert (newest.step, newest.world_size, newest.reason) == (20, 2, f"taken over from {DONOR}")
    assert save_attempt(newest) == 2
    assert store.verify(newest) == []
    given = donor.find(20)
    assert given is not None
    for rank in (0, 1):
        ours, theirs = store.load(newest, rank=rank), donor.load(given, rank=rank)
        assert ours.model_state is not None
        assert theirs.model_state is not None
        assert all(torch.equal(ours.model_state[name], theirs.model_state[name]) for name in theirs.model_state)
        assert ours.objects["loader"] == theirs.objects["loader"] == {"position": 200 + rank}


def test_it_is_done_once_whatever_dies_afterwards(runs):
    take_over(runs, OTHER, taken(20), None)
    again = take_over(runs, OTHER, taken(20), None)
    assert (again.step, again.is_new) == (20, False)
    assert [info.step for info in CheckpointStore(runs.directory(OTHER)).checkpoints()] == [5, 20]
    note = json.loads(runs.directory(OTHER).read_bytes("takeover-001.json"))
    assert (note["run_id"], note["taken_step"], note["from_folder"]) == (DONOR, 20, "attempt-001/step-000020")


def test_one_that_was_cut_short_is_done_again_beside_what_is_left_of_it(runs):
    runs.directory(OTHER).write_bytes("attempt-002/step-000020/model-00000-of-00002.safetensors", b"half")
    found = take_over(runs, OTHER, taken(20), None)
    assert found.folder == "attempt-002/step-000020-try2"
    info = CheckpointStore(runs.directory(OTHER)).find(20)
    assert info is not None
    assert CheckpointStore(runs.directory(OTHER)).verify(info) == []


def test_a_damaged_state_is_not_taken_over_but_the_one_after_it(runs, tmp_path):
    file = tmp_path / "s" / DONOR / "attempt-001" / "step-000020" / "model-00000-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = take_over(runs, OTHER, taken(20), None)
    assert found.step == 30
    assert CheckpointStore(runs.directory(OTHER)).find(20) is None


def test_a_state_that_is_gone_gives_way_to_the_next_later_one_and_then_to_earlier_ones(runs):
    assert [info.step for info in candidates(runs, DONOR, 20)] == [20, 30, 10]
    CheckpointStore(runs.directory(DONOR)).delete("attempt-001/step-000020")
    assert [info.step for info in candidates(runs, DONOR, 20)] == [30, 10]
    assert [info.step for info in candidates(runs, DONOR, 99)] == [30, 10]


def test_checkpoints_of_a_history_that_was_left_are_no_states(runs):
    RunBuilder(runs, DONOR).resume(10)  # the donor itself has gone on from step 10: 20 and 30 count no more
    save(runs, DONOR, 15, attempt=2)
    assert [info.step for info in candidates(runs, DONOR, 20)] == [15, 10]


def test_a_trial_without_a_checkpoint_can_not_be_taken_over(runs):
    for folder in ("010", "020", "030"):
        CheckpointStore(runs.directory(DONOR)).delete(f"attempt-001/step-000{folder}")
    with pytest.raises(CheckpointError, match=r"s\.trial-001 can't be taken over: it has no whole checkpoint"):
        take_over(runs, OTHER, taken(20), None)


def test_a_state_is_held_until_it_is_taken_and_peoples_pins_stay(runs):
    def pinned() -> list[int]:
        return [info.step for info in CheckpointStore(runs.directory(DONOR)).checkpoints() if info.pinned]

    hold(runs, taken(20), OTHER)
    assert pinned() == [20]
    store = CheckpointStore(runs.directory(DONOR))
    own = store.find(30)
    assert own is not None
    store.pin(own)
    take_over(runs, OTHER, taken(20), None)
    assert pinned() == [30]
    hold(runs, taken(30), OTHER)
    release(runs, taken(30), OTHER)
    assert pinned() == [30]


def test_an_encrypted_state_is_sealed_again_for_its_new_run(runs):
    keyring = Keyring(Key(secrets.token_bytes(32)))
    save(runs, DONOR, 40, Sealing("zstd", keyring.new_data_key()))
    found = take_over(runs, OTHER, taken(40), keyring)
    store = CheckpointStore(runs.directory(OTHER), keyring=keyring)
    info = store.find(found.step)
    assert info is not None
    assert info.manifests[0].encryption is not None
    assert store.verify(info) == []
    loaded = store.load(info, rank=1)
    assert loaded.model_state is not None
    assert torch.equal(loaded.model_state["weight"], torch.full((4, 3), 40.0))
