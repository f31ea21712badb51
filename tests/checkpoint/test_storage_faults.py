"""Checkpoints on a full disk and on a real S3 server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.keys import generate_key
from ray_tracking.checkpoint.manager import CheckpointManager, create_checkpoint_manager
from ray_tracking.checkpoint.retention import apply_retention, gc
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.strategy import CheckpointStrategy
from ray_tracking.errors import CheckpointCorruptError, CheckpointError
from ray_tracking.storage import Storage
from tests.s3 import S3Server, s3_server, s3_uri

from .faults import Killed, KillingStorage, limited_disk

__all__ = ["s3_server", "s3_uri"]

Save = Callable[..., str]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB of its own."""
    with limited_disk(tmp_path / "disk", "6m") as disk:
        yield disk


def big(value: float) -> dict[str, torch.Tensor]:
    """2 MiB."""
    return {f"w{i}": torch.full((1 << 17,), float(value)) for i in range(4)}


@pytest.mark.parametrize("on_write_failure", ["continue", "fail"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_full_disk(small_disk: Path, on_write_failure: str, compression: str | None) -> None:
    """The save fails or training with it, as configured; what was there before loads; with room it goes on."""
    kept = create_checkpoint_manager(
        {
            "checkpoint_dir": str(small_disk / "checkpoints"),
            "on_write_failure": on_write_failure,
            "compression": compression,
            "save_total_limit": None,
        }
    )
    kept.save_checkpoint(model=big(1), step=1, blocking=True)
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(bytes(max(free.f_bavail * free.f_frsize - (1 << 18 if compression is None else 4096), 0)))
    noise = {"w": torch.rand(1 << 19)}
    kept.save_checkpoint(model=noise, step=2)
    with pytest.raises(CheckpointError, match="No space left"):
        kept.wait()
    kept.save_checkpoint(model=noise, step=3)
    kept._written[-1][1].exception()
    if on_write_failure == "fail":
        with pytest.raises(CheckpointError, match="No space left"):
            kept.save_checkpoint(model=noise, step=4)
    else:
        kept.save_checkpoint(model=noise, step=4)
    kept._settle(wait=True)
    assert [info.step for info in kept.list_checkpoints()] == [1]
    loaded = kept.load_latest_checkpoint()
    assert loaded is not None
    assert torch.equal(loaded.model_state["w2"], torch.full((1 << 17,), 1.0))
    filler.unlink()
    kept._error = None
    kept.save_checkpoint(model=noise, step=5, blocking=True)
    assert [info.step for info in kept.list_checkpoints()] == [1, 5]
    left = [path.name for path in small_disk.rglob(".tmp-*")]
    assert left == [], "a write that failed tidies up after itself"
    kept.close()


def test_on_s3(s3_uri: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved by the writing process, listed, loaded, kept by the rules and deleted, encrypted."""
    monkeypatch.setenv("CHECKPOINT_KEY", generate_key())
    section: dict[str, Any] = {
        "checkpoint_dir": s3_uri,
        "save_total_limit": 2,
        "monitor": "loss",
        "compression": "zstd",
        "encryption": {"key_env": "CHECKPOINT_KEY"},
    }
    with create_checkpoint_manager(section) as kept:
        for step, loss in ((1, 0.1), (2, 0.5), (3, 0.4)):
            kept.save_checkpoint(model=big(step), step=step, metrics={"loss": loss})
        assert [info.step for info in kept.list_checkpoints()] == [1, 3]
        latest, best = kept.load_latest_checkpoint(), kept.load_best_checkpoint()
        assert latest is not None
        assert best is not None
        assert (latest.step, best.step) == (3, 1)
        assert torch.equal(latest.model_state["w3"], torch.full((1 << 17,), 3.0))
        assert kept.verify() == {1: [], 3: []}
    prefix = Storage.open(s3_uri).root.partition("/")[2]
    assert {key.removeprefix(f"{prefix}/").partition("/")[0] for key in s3_server.keys(prefix)} >= {
        "step-000001",
        "step-000003",
    }
    assert not any("step-000002/" in key and not key.endswith("/") for key in s3_server.keys(prefix))


def test_a_flipped_bit_on_s3_is_named_and_the_one_before_is_used(
    s3_uri: str, s3_server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage.open(s3_uri)
    with CheckpointManager(CheckpointStore(storage)) as kept:
        for step in (1, 2):
            kept.save_checkpoint(model={"w": torch.full((1000,), float(step))}, step=step)
        kept.wait()
        bucket, _, key = storage.path("step-000002/model.safetensors").partition("/")
        client = s3_server.client()
        data = bytearray(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        data[-3] ^= 4
        client.put_object(Bucket=bucket, Key=key, Body=bytes(data))
        assert kept.load_latest_checkpoint().step == 1  # type: ignore[union-attr]
        assert "step-000002/model.safetensors" in capsys.readouterr().err
        with pytest.raises(CheckpointCorruptError, match="altered"):
            kept.load_checkpoint(2)


@pytest.mark.parametrize(
    "when", ["during", pytest.param("before", marks=pytest.mark.slow), pytest.param("after", marks=pytest.mark.slow)]
)
def test_killed_at_any_operation_on_s3(s3_uri: str, save: Save, when: str) -> None:
    storage = Storage.open(s3_uri)
    for number in range(1, 20):
        base = storage.child(f"kill-{number}")
        save(CheckpointStore(base), 5)
        killing = KillingStorage(base.uri, number, when)
        try:
            save(CheckpointStore(killing), 6)
            apply_retention(CheckpointStore(killing), CheckpointStrategy(save_total_limit=1))
        except Killed:
            pass
        else:
            break
        after = CheckpointStore(base)
        found = [info.step for info in after.checkpoints()]
        assert found in ([5], [5, 6], [6])
        assert all(after.verify(info) == [] for info in after.checkpoints())
        latest = after.load_latest()
        assert latest is not None
        assert torch.equal(latest.model_state["weight"], torch.full((4, 3), float(found[-1])))
        save(after, 7)
        gc(after)
        apply_retention(after, CheckpointStrategy(save_total_limit=1))
        assert [item.folder for item in after.scan()] == ["step-000007"], "the next pass finishes it"
    assert number > 4


def test_a_name_of_a_manifest_is_no_way_out_on_s3(s3_uri: str, save: Save) -> None:
    store = CheckpointStore(Storage.open(s3_uri))
    folder = save(store, 5)
    store.storage.write_bytes(f"{folder}/{names.rank_file(1, 2)}", b"half a mani")
    assert store.checkpoints() == []
    assert "rank-00001-of-00002.json" in store.scan()[0].reason
