"""MLflow's failures as ours: what is refused for good, what is worth trying again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ray_tracking.errors import BackendError, BackendRefusedError

_REFUSED = {"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"}
_BUSY = {"REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "RESOURCE_LIMIT_EXCEEDED"}
_BUSY_SECONDS = 30.0  # the client does not pass on a server's Retry-After
_CODE = re.compile(r"(?:error code|too many) (\d{3})\b")
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

    try:
        yield
    except MlflowException as error:
        raise _translated(uri, str(error.message), str(error.error_code)) from error
    except (RequestException, SQLAlchemyError, OSError) as error:
        raise _translated(uri, str(error), "") from error


def _translated(uri: str, message: str, code: str) -> BackendError:
    status = _CODE.search(message)
    text = without_login(f"MLflow at {uri}: {message}")[:1000]
    if code in _REFUSED or (status and status.group(1) in ("401", "403")):
        return BackendRefusedError(
            text,
            hint="Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
        )
    if code in _BUSY or (status and status.group(1) == "429"):
        return BackendError(text, retry_after=_BUSY_SECONDS)
    return BackendError(text, hint="Check experiment_tracking.mlflow.tracking_uri and that the server is up.")
