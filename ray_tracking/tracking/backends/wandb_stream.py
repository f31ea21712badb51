"""Rows of plain values straight to W&B's service, many at a time: `run.log` takes several times the CPU time.

In: whole rows, in order. Out: the history and summary records that the service itself makes of logged rows: it takes
those too. It uses wandb's own connection to the service, so only one that is as this file knows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ray_tracking.log import get_logger

log = get_logger()

_PLAIN = (float, int, str, type(None))

Row = tuple[int, dict[str, Any]]
"""A row's `_step` and its values by key: numbers and strings, `_timestamp` among them."""


class Stream:
    """The rows of one open run. `of` says whether it can. Not thread-safe."""

    def __init__(self, run: Any) -> None:
        from wandb.proto import wandb_server_pb2
        from wandb.sdk.interface.interface_sock import InterfaceSock

        interface = run._interface
        if type(interface) is not InterfaceSock or run.settings.x_history_value_encoding != "json":
            raise LookupError(f"{type(interface).__name__}, {run.settings.x_history_value_encoding}")
        self._run_async, self._publish = interface._asyncer.run, interface._client.publish
        self._stream_id: str = interface._stream_id
        self._request = wandb_server_pb2.ServerRequest  # type: ignore[attr-defined]  # chosen by protobuf's version
        self._began: float = run.start_time
        self._before: float = run._start_runtime

    @classmethod
    def of(cls, run: Any) -> Stream | None:
        """For an open run; None if its rows must go through `run.log`."""
        try:
            return cls(run)
        except (ImportError, AttributeError, LookupError) as error:
            log.debug("W&B's service is not written to directly", backend="wandb", reason=str(error))
            return None

    def send(self, rows: Sequence[Row]) -> None:
        """Returns when the rows are with the service, or raises what wandb does."""
        summary: dict[str, str] = {}
        requests = [self._history(position, row, summary) for position, row in rows]
        requests.append(self._summary(summary))

        async def publish() -> None:
            for request in requests:
                await self._publish(request)

        self._run_async(publish)

    def _history(self, position: int, row: dict[str, Any], summary: dict[str, str]) -> Any:
        """A row as W&B's own: with `_step`, and `_runtime` in seconds. `summary` gets the newest values."""
        self._began = min(self._began, row["_timestamp"])
        runtime = self._before + row["_timestamp"] - self._began
        values = {key: encoded(value) for key, value in row.items()}
        values["_step"], values["_runtime"] = str(position), encoded(runtime)
        summary |= values
        request = self._request()
        request.record_publish._info.stream_id = self._stream_id
        history = request.record_publish.history
        history.step.num = position
        add = history.item.add
        for key, value in values.items():
            item = add()
            item.key, item.value_json = key, value
        return request

    def _summary(self, values: dict[str, str]) -> Any:
        request = self._request()
        request.record_publish._info.stream_id = self._stream_id
        update = request.record_publish.summary.update
        for key, value in values.items():
            update.add(nested_key=[key], value_json=value)
        update.add(nested_key=["_wandb", "runtime"], value_json=str(int(float(values["_runtime"]))))
        return request


def is_plain(row: Row) -> bool:
    """Whether it holds numbers and strings only: no images, no histograms."""
    return all(isinstance(value, _PLAIN) for value in row[1].values())


def encoded(value: float | str | None) -> str:
    """JSON, with NaN, Infinity and -Infinity as W&B takes them."""
    if value.__class__ is float and value - value == 0.0:  # finite: the usual, and quick
        return repr(value)
    return json.dumps(value)
