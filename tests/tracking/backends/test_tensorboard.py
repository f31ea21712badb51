"""TensorBoard's event files, read by TensorBoard's own reader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ray_tracking.errors import BackendError
from ray_tracking.records import Histogram, Kind
from ray_tracking.storage import Storage
from ray_tracking.tracking.backends.base import RunInfo
from ray_tracking.tracking.backends.tensorboard import TensorBoardBackend
from tests.readback import comparable, tensorboard_events, tensorboard_points
from tests.tracking.backends.records import grid, png, record, scalars


def test_one_event_holds_all_of_a_step(run_info: RunInfo) -> None:
    backend = TensorBoardBackend()
    folder = backend.open(run_info, None).location
    assert folder == f"{run_info.local_dir}/tensorboard/r1"
    backend.write(scalars(grid(range(1, 11), keys=10)))
    backend.close("completed")

    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (name,) = os.listdir(folder)
    events = [event for event in LegacyEventFileLoader(f"{folder}/{name}").Load() if event.HasField("summary")]
    assert [len(event.summary.value) for event in events] == [10] * 10
    assert [event.step for event in events] == list(range(1, 11))
    assert events[0].wall_time == 1_700_000_001.0


def test_rewind_forgets_what_lies_past_the_step(run_info: RunInfo) -> None:
    backend = TensorBoardBackend()
    folder = backend.open(run_info, None).location
    backend.write([record(Kind.PARAM, "lr", b"0.1", step=0), *scalars(grid(range(1, 21)))])
    backend.rewind(12)
    again = [(key, step, value + 100) for key, step, value in grid(range(13, 16))]
    backend.write(scalars(again, offset=60))
    backend.close("completed")
    assert comparable(tensorboard_points(folder)) == comparable(grid(range(1, 13)) + again, single=True)
    assert "params" in tensorboard_events(folder).Tags()["tensors"]
    assert len(tensorboard_events(folder).Tensors("params")) == 1


def test_each_rewind_of_many_in_one_second_counts(run_info: RunInfo) -> None:
    backend = TensorBoardBackend()
    folder = backend.open(run_info, None).location
    for attempt in range(5):
        backend.rewind(2 * attempt)
        backend.write(scalars(grid(range(2 * attempt + 1, 2 * attempt + 6)), offset=attempt * 15))
    backend.close("completed")
    assert comparable(tensorboard_points(folder)) == comparable(grid(range(1, 14)), single=True)


def test_records_sent_again_after_a_rewind_was_repeated(run_info: RunInfo) -> None:
    """The process was killed between a write and saving the cursor: attempt, rewind and records come once more."""
    first = TensorBoardBackend()
    identity = first.open(run_info, None)
    first.write(scalars(grid(range(1, 11))))
    first.rewind(5)
    first.write(scalars(grid(range(6, 9)), offset=31))
    second = TensorBoardBackend()
    second.open(run_info, identity)
    second.rewind(5)
    second.write(scalars(grid(range(6, 13)), offset=31))
    second.close("completed")
    assert comparable(tensorboard_points(identity.location)) == comparable(grid(range(1, 13)), single=True)


@pytest.mark.parametrize("cut", [1, 17, 60, 250])
def test_a_torn_file_is_mended(run_info: RunInfo, cut: int) -> None:
    """The last write is cut in the middle: it is taken out, asked for again, and stands there once."""
    first = TensorBoardBackend()
    identity = first.open(run_info, None)
    first.write(scalars(grid(range(1, 11))))
    first.write(scalars(grid(range(11, 21)), offset=30))
    (name,) = os.listdir(identity.location)
    path = Path(identity.location, name)
    os.truncate(path, path.stat().st_size - cut)

    second = TensorBoardBackend()
    second.open(run_info, identity)
    assert second.position() == 29
    second.write(scalars(grid(range(1, 31))))
    second.close("completed")
    assert comparable(tensorboard_points(identity.location)) == comparable(grid(range(1, 31)), single=True)


def test_position_of_a_folder_that_is_gone_or_foreign(run_info: RunInfo) -> None:
    backend = TensorBoardBackend()
    identity = backend.open(run_info, None)
    assert backend.position() == -1
    backend.close("completed")
    Path(identity.location, "events.out.tfevents.0000000001.other").write_bytes(b"")
    for name in os.listdir(identity.location):
        if not name.endswith("other"):
            os.unlink(f"{identity.location}/{name}")
    backend.open(run_info, identity)
    assert backend.position() is None
    backend.close("completed")


def test_gathered_steps_are_not_lost(run_info: RunInfo) -> None:
    backend = TensorBoardBackend(update_freq=100)
    folder = backend.open(run_info, None).location
    backend.write(scalars(grid(range(1, 8))))
    assert tensorboard_points(folder) == []
    backend.flush()
    assert comparable(tensorboard_points(folder)) == comparable(grid(range(1, 8)), single=True)
    backend.close("completed")


def test_media_params_and_tags(run_info: RunInfo) -> None:
    backend = TensorBoardBackend()
    folder = backend.open(run_info, None).location
    histogram = Histogram((0.0, 1.0, 2.0, 4.0), (3, 0, 5), 12.5, 40.0)
    backend.write(
        [
            record(Kind.HISTOGRAM, "grad", histogram.encode()),
            record(Kind.TEXT, "note", "# häppy 🎉".encode()),
            record(Kind.IMAGE, "digits", png(7, 3)),
            record(Kind.IMAGE, "broken", b"no png"),
            record(Kind.PARAM, "lr", b"0.1"),
            record(Kind.PARAM, "opt|name", json.dumps("adam<b>\nw").encode()),
            record(Kind.PARAM, "fast", b"true"),
            record(Kind.TAG, "stage", b"dev"),
        ]
    )
    backend.close("completed")
    reader = tensorboard_events(folder)
    shown = reader.Histograms("grad")[0].histogram_value
    assert (shown.min, shown.max, shown.num, shown.sum, shown.sum_squares) == (0.0, 4.0, 8, 12.5, 40.0)
    assert (shown.bucket_limit, shown.bucket) == ([1.0, 2.0, 4.0], [3, 0, 5])
    assert reader.Tensors("note")[0].tensor_proto.string_val == ["# häppy 🎉".encode()]
    image = reader.Images("digits")[0]
    assert (image.width, image.height, image.encoded_image_string, image.step) == (7, 3, png(7, 3), 3)
    table = reader.Tensors("params")[0].tensor_proto.string_val[0].decode()
    assert "| lr | 0.1 |" in table
    assert "| opt\\|name | adam<b> w |" in table
    assert reader.Tensors("tags/stage")[0].tensor_proto.string_val == [b"dev"]

    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = reader.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    params = HParamsPluginData.FromString(content).session_start_info.hparams
    assert params["lr"].number_value == 0.1
    assert params["fast"].bool_value is True


def test_a_folder_that_cannot_be_written(tmp_path: Path, run_info: RunInfo) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match="log_dir"):
        TensorBoardBackend(log_dir=str(tmp_path / "file")).open(run_info, None)


@pytest.mark.parametrize("returns", [True, False])
def test_a_folder_that_is_moved_away_is_noticed_and_what_it_lacks_is_asked_for(
    tmp_path: Path, run_info: RunInfo, returns: bool
) -> None:
    backend = TensorBoardBackend()
    identity = backend.open(run_info, None)
    backend.write(scalars(grid(range(1, 6))))
    folder = Path(identity.location)
    folder.rename(tmp_path / "aside")
    folder.touch()
    with pytest.raises(BackendError, match="log_dir"):
        backend.write(scalars(grid(range(6, 11)), offset=15))
    with pytest.raises(BackendError, match="log_dir"):
        backend.open(run_info, identity)
    folder.unlink()
    if returns:
        (tmp_path / "aside").rename(folder)
    backend.open(run_info, identity)
    assert backend.position() == (14 if returns else -1)
    backend.write(scalars(grid(range(1, 11))))
    backend.close("completed")
    assert comparable(tensorboard_points(folder)) == comparable(grid(range(1, 11)), single=True)


def test_a_full_disk_leaves_no_half_event(run_info: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TensorBoardBackend()
    folder = backend.open(run_info, None).location
    backend.write(scalars(grid(range(1, 6))))
    real, calls = os.write, []

    def full(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return real(handle, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(BackendError, match="No space left"):
            backend.write(scalars(grid(range(6, 11)), offset=15))
    backend.write(scalars(grid(range(6, 11)), offset=15))
    backend.close("completed")
    assert comparable(tensorboard_points(folder)) == comparable(grid(range(1, 11)), single=True)


def test_files_for_a_remote_folder_are_uploaded_on_flush(
    tmp_path: Path, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Storage.open(tmp_path / "bucket")
    monkeypatch.setattr(Storage, "is_local", property(lambda self: False))
    monkeypatch.setattr(Storage, "open", classmethod(lambda cls, uri: bucket))
    (tmp_path / "bucket" / "r1").mkdir(parents=True)
    backend = TensorBoardBackend(log_dir="s3://bucket/tb", flush_secs=1000)
    assert backend.open(run_info, None).location == str(tmp_path / "bucket" / "r1")
    backend.write(scalars(grid(range(1, 6))))
    backend.flush()
    assert comparable(tensorboard_points(tmp_path / "bucket" / "r1")) == comparable(grid(range(1, 6)), single=True)
    backend.rewind(3)
    backend.write(scalars(grid(range(4, 9)), offset=15))
    backend.close("completed")
    assert comparable(tensorboard_points(tmp_path / "bucket" / "r1")) == comparable(grid(range(1, 9)), single=True)
