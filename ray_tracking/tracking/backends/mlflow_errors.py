"""MLflow's failures as ours: what is refused for good, what is worth trying again."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from typing import Any

from ray_tracking.errors import BackendError, BackendRefusedError

_REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"}
_BUSY = {"REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "RESOURCE_LIMIT_EXCEEDED"}
_BUSY_SECONDS = 10.0  # where the server does not say how long
_CODE = re.compile(r"(?:error code|too many) (\d{3})\b")
_answer = threading.local()
"""`status`: of this thread's last answer, None if there was none."""
_LOGIN = re.compile(r"(?<=://)[^/@\s]*@")


def without_login(text: str) -> str:
    """`text` without user and password in URLs."""
    return _LOGIN.sub("", text)


@contextmanager
def answers(uri: str) -> Iterator[None]:
    """Turn MLflow's and the network's exceptions inside the block into BackendError or BackendRefusedError."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    _answer.status = None
    try:
        yield
    except MlflowException as error:
        raise _translated(uri, str(error.message), str(error.error_code), asked_wait(error)) from error
    except (RequestException, SQLAlchemyError, OSError) as error:
        raise _translated(uri, str(error), "", asked_wait(error)) from error


def keep_answers() -> None:
    """Let what MLflow's client drops of an answer be found again: Retry-After, and the status of an error in JSON.

    It looks at the first only between its own retries, of which we want none. For the sessions made from now on.
    """
    import mlflow.utils.request_utils
    import mlflow.utils.rest_utils
    from urllib3.util import Retry

    sessions: Any = mlflow.utils.request_utils
    requests: Any = mlflow.utils.rest_utils
    if getattr(sessions, "Retry", None) is Retry:  # as this code knows it, and not done yet
        sessions.Retry = _keeping(Retry)
    call = getattr(requests, "_get_http_response_with_retries", None)
    if call is not None and not hasattr(call, "__wrapped__"):
        requests._get_http_response_with_retries = _noting_status(call)


def _noting_status(call: Any) -> Any:
    @wraps(call)
    def noting(*arguments: Any, **options: Any) -> Any:
        _answer.status = None
        response = call(*arguments, **options)
        _answer.status = response.status_code
        return response

    return noting


@cache
def _keeping(retry: Any) -> Any:
    from urllib3.exceptions import InvalidHeader, MaxRetryError

    class Keeping(retry):  # type: ignore[misc]
        def increment(self, *arguments: Any, **options: Any) -> Any:
            try:
                return super().increment(*arguments, **options)
            except MaxRetryError as error:
                if (response := options.get("response")) is not None:
                    with suppress(InvalidHeader):
                        error.retry_after = self.get_retry_after(response)  # type: ignore[attr-defined]
                raise

    return Keeping


def asked_wait(error: BaseException | None) -> float | None:
    """The seconds to wait that a server asked for, if something in the error's chain holds them."""
    while error is not None:
        for one in (error, *error.args):
            if isinstance(seconds := getattr(one, "retry_after", None), int | float):
                return float(seconds)
        error = error.__cause__ or error.__context__
    return None


def _translated(uri: str, message: str, code: str, wait: float | None) -> BackendError:
    found = _CODE.search(message)
    status = found.group(1) if found else str(getattr(_answer, "status", None))
    text = without_login(f"MLflow at {uri}: {message}")[:1000]
    if code in _REFUSED or status in ("401", "403"):
        return BackendRefusedError(
            text,
            hint="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
        )
    if code in _BUSY or status == "429":
        return BackendError(text, retry_after=_BUSY_SECONDS if wait is None else wait)
    hint = "Check experiment_tracking.mlflow.tracking_uri and that the server is up."
    return BackendError(text, hint=hint, retry_after=wait)
