"""Logging: structlog events on stderr, readable on a terminal, JSON where machines read them.

The package has a logger chain of its own, so a program's own structlog configuration is neither used nor changed.
The library calls `get_logger`; programs (command line, workers, actor, tracker process) call `configure` once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

LEVEL_VARIABLE = "RAY_TRACKING_LOG_LEVEL"
JSON_VARIABLE = "RAY_TRACKING_LOG_JSON"
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

_LONG = frozenset({"error", "why", "reason", "last_error", "fix", "stack"})
_LINE = 60

_Event = MutableMapping[str, Any]


def _console(*, colors: bool) -> Callable[[Any, str, _Event], str]:
    """One line per event; long texts (an error with its hint) below it, as they are."""
    line = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)

    def render(logger: Any, method: str, event: _Event) -> str:
        long = {key: value for key, value in event.items() if key in _LONG and _is_long(value)}
        text = line(logger, method, {key: value for key, value in event.items() if key not in long})
        below = (f"{key}: {value}".replace("\n", "\n  ") for key, value in long.items())
        return "\n  ".join([text, *below])

    return render


def _is_long(value: object) -> bool:
    return isinstance(value, str) and ("\n" in value or len(value) > _LINE)


class _Settings:
    """What `configure` chose. One per process: threads share it, unlike context variables."""

    configured = False
    level = LEVELS["info"]
    renderer: Callable[[Any, str, _Event], Any] = _console(colors=False)
    time_format = "%H:%M:%S"
    bound: dict[str, Any] = {}  # noqa: RUF012


def configure(level: str | None = None, *, json: bool | None = None, **bound: Any) -> None:
    """Set the level and form for this process; `bound` (run=, attempt=, rank=) stands in every event.

    The variable RAY_TRACKING_LOG_LEVEL wins over `level`, so that one can look closer without touching a config.
    The form is left in the environment for child processes.
    """
    chosen = (os.environ.get(LEVEL_VARIABLE) or level or "info").lower()
    as_json = os.environ.get(JSON_VARIABLE) == "1" if json is None else json
    os.environ[JSON_VARIABLE] = "1" if as_json else "0"
    _Settings.level = LEVELS.get(chosen, LEVELS["info"])
    _Settings.time_format = "iso" if as_json else "%H:%M:%S"
    _Settings.renderer = (
        structlog.processors.JSONRenderer(default=str) if as_json else _console(colors=sys.stderr.isatty())
    )
    _Settings.bound = bound
    _Settings.configured = True


def configure_once() -> None:
    """For the library's own starting points in a user's process: keeps what was configured before."""
    if not _Settings.configured:
        configure()


def level_name() -> str:
    """The level of this process, for processes it starts."""
    return next(name for name, number in LEVELS.items() if number == _Settings.level)


def child_settings() -> dict[str, Any]:
    """Arguments of `configure` for a process that this one starts, as JSON can hold them."""
    return {"level": level_name(), "json": is_json(), **_Settings.bound}


def is_json() -> bool:
    """Whether this process logs JSON."""
    return os.environ.get(JSON_VARIABLE) == "1"


def bind(**bound: Any) -> None:
    """Add to what stands in every event of this process."""
    _Settings.bound = {**_Settings.bound, **bound}


def is_debug() -> bool:
    """Whether this process shows everything."""
    return _Settings.level <= LEVELS["debug"]


def get_logger() -> Any:
    """A structlog logger: `log.info("event in words", key=value)`."""
    return structlog.wrap_logger(
        _Stderr(),
        processors=[
            _filter_level,
            _add_bound,
            structlog.processors.add_log_level,
            _add_time,
            structlog.processors.format_exc_info,
            _remove_secrets,
            _render,
        ],
        wrapper_class=structlog.BoundLogger,
    )


class _Stderr:
    """Writes to the stderr of the moment, which tests and Ray's workers replace."""

    def msg(self, message: str) -> None:
        # A stderr that is closed or gone (a daemon, the end of the interpreter) must not end the thread that logs.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            print(message, file=sys.stderr, flush=True)  # noqa: T201

    debug = info = warning = error = critical = exception = msg


def _filter_level(_logger: Any, method: str, event: _Event) -> _Event:
    if LEVELS.get("error" if method == "exception" else method, 20) < _Settings.level:
        raise structlog.DropEvent
    return event


def _add_bound(_logger: Any, _method: str, event: _Event) -> _Event:
    return {**event, **{key: value for key, value in _Settings.bound.items() if key not in event}}


def _add_time(logger: Any, method: str, event: _Event) -> _Event:
    stamper = structlog.processors.TimeStamper(fmt=_Settings.time_format, utc=_Settings.time_format == "iso")
    return stamper(logger, method, event)


def _remove_secrets(_logger: Any, _method: str, event: _Event) -> _Event:
    # Imported late: a process that logs nothing does not pay for the patterns.
    from ray_tracking.config.redaction import redact

    removed: _Event = redact(event)
    return removed


def _render(logger: Any, method: str, event: _Event) -> Any:
    return _Settings.renderer(logger, method, event)
