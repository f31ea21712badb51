"""W&B's failures as ours, and what is looked at or tidied up because of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray_tracking.errors import BackendError, BackendRefusedError

_LOGIN_HINT = "Run `wandb login`, or set experiment_tracking.wandb.mode: offline and upload later with `wandb sync`."


def check_login(wandb: Any) -> None:
    """Refuse at once where `wandb.init` would ask on the terminal. It only looks at key, netrc and settings."""
    from wandb.sdk.lib import wbauth

    try:
        found = wbauth.authenticate_session(
            host=wandb.Settings().base_url, source="ray_tracking", prompt=False, update_session=False
        )
    except wandb.errors.Error as error:
        raise BackendRefusedError(f"W&B refuses the login: {error}", hint=_LOGIN_HINT) from error
    if found is None:
        raise BackendRefusedError("W&B: there is no login on this machine.", hint=_LOGIN_HINT)


def forget_service() -> None:
    """Let wandb start a new service process at the next `init`; it does not by itself when the old one was killed."""
    import wandb

    with suppress(ConnectionError):  # it also tries to tell the dead one
        wandb.teardown()


@contextmanager
def answers() -> Iterator[None]:
    """W&B's errors as ours."""
    import wandb

    try:
        yield
    except wandb.errors.CommError as error:
        if isinstance(error, wandb.errors.AuthenticationError) or re.search(
            r"\b(401|403)\b|permission|unauthori", str(error), re.I
        ):
            raise BackendRefusedError(f"W&B refuses: {error}", hint=_LOGIN_HINT) from error
        raise BackendError(f"W&B does not answer: {error}") from error
    except wandb.errors.UsageError as error:
        raise BackendRefusedError(f"W&B refuses: {error}", hint=_LOGIN_HINT) from error
