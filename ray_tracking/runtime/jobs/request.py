"""What is sent with a job: enough to train the run there, and nothing secret. Pure but for the environment. No ray.

In: a resolved config, a target, a run id. Out: entrypoint, `runtime_env` variables and metadata; on the cluster the
same `JobRequest` again, and what its driver answers with. All of it stands on the dashboard, so a secret in it is
refused, not removed: the driver could not do without it. Secrets belong into the environment of the cluster's nodes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ray_tracking.config import Config, redact, redact_text
from ray_tracking.errors import UsageError
from ray_tracking.runs.resuming import hidden_keys
from ray_tracking.storage import without_credentials

VARIABLE = "RAY_TRACKING_JOB"
"""The environment variable that brings the request to the driver."""
COMMAND = "job-driver"
"""The command line's own command that the job runs."""
CHECKED = "ray-tracking: the cluster is checked, training starts"
"""The line in the job's log that says so."""
STOPPED = 130
"""The exit status of a driver whose run was asked to end early; also that of one that was interrupted."""
RUN_KEY = "ray_tracking_run"
NUMBER_KEY = "ray_tracking_number"
_MAX_BYTES = 100_000
"""Linux takes 128 KiB in one variable."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """`config` is whole and has no secrets; `versions`: where it was submitted; `number` counts the run's jobs.

    `address`: of the Jobs API as the submitter reaches it.
    """

    run_id: str
    number: int
    target: str
    address: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def takes_over(self) -> bool:
        """There was a job of this run before, which may have died: then its lease still has to run out."""
        return self.number > 1

    @property
    def submission_id(self) -> str:
        return f"{self.run_id}-{self.number}"

    def entrypoint(self, python: str = "python", *, debug: bool = False) -> str:
        """The shell command of the job. `python` may be several words."""
        more = " --debug" if debug else ""
        return (
            f"{python} -m ray_tracking {COMMAND} {shlex.quote(self.target)} --run-id {shlex.quote(self.run_id)}{more}"
        )

    @property
    def metadata(self) -> dict[str, str]:
        """By these the run's jobs are found on the cluster."""
        return {RUN_KEY: self.run_id, NUMBER_KEY: str(self.number)}

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: self.to_json()}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> JobRequest:
        """Raises UsageError if this version can't read it."""
        known = {field.name for field in fields(cls)}
        try:
            values = {key: value for key, value in json.loads(text).items() if key in known}
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"The job's request can't be read: {error}",
                hint="Submit with the version of ray-tracking that the cluster has.",
            ) from error


def check_no_secrets(config: Config, target: str, *further: str) -> None:
    """Raise UsageError naming what would show a secret to everyone who sees the dashboard.

    What counts as one is what `redact` removes: by name, by shape, or the value of a secret environment variable here.
    """
    given = config.to_dict()
    clean = redact(given)
    if clean != given:
        secret = sorted(hidden_keys(clean)) or ["one of its keys"]
        raise UsageError(
            f"The config holds what looks like a secret: {', '.join(secret)}. A job's config is visible on Ray's "
            "dashboard, so it was not sent.",
            hint="Take it out, and set it in the environment of the cluster's nodes before `ray start` (WANDB_API_KEY, "
            "AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD, ...): the job's driver finds it there and hands it on to "
            "the workers. A checkpoint key goes by name: training.default.encryption.key_env or key_file.",
        )
    for text in (target, *further):
        if redact_text(text) != text:
            raise UsageError(
                f"{redact_text(text)!r} holds what looks like a secret, and would be visible on Ray's dashboard.",
                hint="Choose another name, or set the secret in the environment of the cluster's nodes.",
            )


def check_length(request: JobRequest) -> None:
    """Raise UsageError if the config is too long to be handed to a process."""
    size = len(request.to_json().encode())
    if size > _MAX_BYTES:
        raise UsageError(
            f"The config is {size / 1000:.0f} kB long; a job takes at most {_MAX_BYTES / 1000:.0f} kB.",
            hint="Put long values (params, say) into a file on the shared storage and name it.",
        )


def shown_storage(config: Config) -> str:
    """The place of the runs, for messages."""
    return without_credentials(config.storage)
