"""The shape of a configuration: every key, its type, its default and what it may be.

The defaults here and `configs/base.yaml` say the same (a test holds them together), so a section that is
given as a plain dict is filled in exactly as one that comes from the files.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Le
from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from ray_tracking.config.checkpoint_rules import LIMIT_BY_DEFAULT, contradictions
from ray_tracking.config.sections import Allowed as Allowed
from ray_tracking.config.sections import Positive, Seconds, Text, Texts, lower, whole
from ray_tracking.config.sections import Section as Section
from ray_tracking.config.sweep import SweepConfig as SweepConfig


def _switch(value: Any) -> Any:
    """`on` and `off` stand in YAML for true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _weights(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("not weights")


class ModelConfig(Section):
    """What `create_model` builds."""

    name: Text
    """Dotted name of a class or function that returns a torch module, e.g. `torchvision.models.resnet18`."""
    args: dict[str, Any] = {}
    """Keyword arguments for it."""
    weights: Annotated[
        str | int | None,
        BeforeValidator(_weights),
        Allowed("latest, best, a step (a whole number, at least 0), a path, or null"),
    ] = None
    """Weights to start from: the run's `latest` or `best` checkpoint, that of a step, a path; null: none."""
    device: Annotated[
        str,
        BeforeValidator(lower),
        Allowed("auto, cpu, cuda, cuda:<index>, mps or another device type of torch"),
    ] = "auto"
    """Where the model is placed. `auto`: the worker's GPU if it has one, else the CPU."""
    checkpoint_dir: Text | None = None
    """Where `latest`, `best` and steps are looked up; null: `checkpoints` on the storage."""
    monitor: Text = "val/loss"
    """The metric that says which checkpoint is `best`."""
    mode: Literal["min", "max"] = "min"
    """Whether the best is the smallest or the largest."""

    @field_validator("device")
    @classmethod
    def _check_device(cls, value: str) -> str:
        kind, colon, index = value.partition(":")
        if not kind.isalpha() or (colon and not index.isdecimal()):
            raise ValueError("not a device")
        return value


class ScalingConfig(Section):
    """How many workers train, and what each of them gets."""

    workers: Positive = 1
    """Training processes, each with one rank."""
    use_gpu: bool = False
    """One GPU per worker (NCCL); otherwise CPU (gloo)."""
    resources_per_worker: dict[str, Annotated[float, Ge(0)]] = {}
    """Ray resources per worker, e.g. `{CPU: 2}`; empty: Ray's own choice."""


class FailureConfig(Section):
    """What is done when workers fail."""

    max_failures: Annotated[int, BeforeValidator(whole), Ge(-1)] = 3
    """Restarts in a row without a new checkpoint before the run fails; 0: none, -1: without limit."""
    hang_timeout_secs: Seconds | None = 600.0
    """A rank without progress for so long while others wait is ended and named; null: never."""
    lease_secs: Annotated[float, Ge(1), Le(86_400)] = 30.0
    """Seconds without a sign of life of its driver after which another one may take the run over."""
    start_timeout_secs: Seconds | None = 900.0
    """How long a start of the workers may wait for room in the cluster; null: for ever."""


class TensorBoardConfig(Section):
    """The TensorBoard backend."""

    enabled: bool = True
    """Write event files."""
    log_dir: Text | None = None
    """Directory of the event files; null: `<storage>/tensorboard/<run id>`."""
    update_freq: Positive = 1
    """Gather the scalars of n steps before they are written; none is left out."""
    flush_secs: Seconds = 10.0
    """Seconds between two flushes of the event file."""


class WandbConfig(Section):
    """The Weights & Biases backend."""

    enabled: bool = False
    """Send to Weights & Biases."""
    project: Text | None = None
    """Project; null: the run's name."""
    entity: Text | None = None
    """User or team; null: the login's default."""
    tags: Texts = ()
    """Tags of the run there."""
    mode: Literal["online", "offline", "disabled"] = "offline"
    """`offline` writes files that `wandb sync` can send later and needs no login."""


class MLflowConfig(Section):
    """The MLflow backend."""

    enabled: bool = False
    """Send to MLflow."""
    tracking_uri: Text | None = None
    """Server or database; null: SQLite on the run's storage."""
    experiment_name: Text | None = None
    """Experiment; null: the run's name."""
    log_models: bool = False
    """Also copy artifacts named `model` or below `model/` to MLflow."""


class DeliveryConfig(Section):
    """How patient delivery to the backends is. Training never waits for it."""

    deadline_secs: Seconds = 60.0
    """How long one call of a backend may take before it counts as hanging, in seconds."""
    final_secs: Seconds = 30.0
    """How long a run's end waits for backends to catch up, in seconds; `sync` sends the rest later."""


class ExperimentTrackingConfig(Section):
    """Which backends show the run."""

    enabled: bool = True
    """False: the journal is written, no backend is filled."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    """TensorBoard."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    mlflow: MLflowConfig = MLflowConfig()
    """MLflow."""
    delivery: DeliveryConfig = DeliveryConfig()
    """Deadlines of delivery to all backends."""


class KeySource(Section):
    """Where a key comes from: exactly one of three. The key itself never stands here."""

    key_file: Text | None = None
    """Path of a file that holds the key."""
    key_env: Text | None = None
    """Name of an environment variable that holds the key."""
    key_command: Text | None = None
    """Command that prints the key."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if self._given() != 1:
            raise ValueError("exactly one of key_file, key_env and key_command")
        return self

    def _given(self) -> int:
        return sum(value is not None for value in (self.key_file, self.key_env, self.key_command))


KeySources = Annotated[tuple[KeySource, ...], Strict(False)]


class EncryptionConfig(KeySource):
    """The key that seals checkpoints, who else may open them, and the keys before it."""

    recipients: KeySources = ()
    """Others who can open what is saved, each with a key of their own; a list of key sources."""
    old_keys: KeySources = ()
    """Earlier keys, only to open what was saved with them; a list of key sources. Alone: nothing new is sealed."""
    refuse_plain: bool = False
    """Pass over checkpoints that are not encrypted: someone who can write to the storage may have put them there."""

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if self._given() > 1 or (self._given() == 0 and (self.recipients or not self.old_keys)):
            raise ValueError("exactly one of key_file, key_env and key_command")
        return self


class CheckpointConfig(Section):
    """When checkpoints are saved, which are kept, and how they are stored."""

    save_steps: Positive | None = 1000
    """Save every n steps; null: only by the other rules."""
    save_total_limit: Positive | None = LIMIT_BY_DEFAULT
    """How many are kept, the latest and the best among them; null: all. 3 gives way to keep_last and keep_best."""
    save_best_only: bool = False
    """Save only when the monitor is better than ever before; on Ray also the newest state, to resume from."""
    monitor: Text = "val/loss"
    """The metric that says which checkpoint is best."""
    mode: Literal["min", "max"] = "min"
    """Whether the best is the smallest or the largest."""
    save_every_seconds: Seconds | None = None
    """Also save when this many seconds have passed since the last one; null: not."""
    save_on_epoch_end: bool = False
    """Also save at each epoch's end."""
    save_on_preemption: bool = True
    """Also save when the machine or the run is told to stop."""
    save_on_exception: bool = True
    """Also save when the training function raises."""
    save_at_end: bool = True
    """Also save when the training function has ended."""
    keep_last: Positive | None = None
    """Keep the n newest; null: no such rule. What any rule wants stays, the latest and the best always."""
    keep_best: Positive | None = None
    """Keep the n best by the monitor; null: no such rule."""
    keep_every_steps: Positive | None = None
    """Never delete checkpoints whose step is a multiple of this; null: no such rule."""
    checkpoint_dir: Text | None = None
    """Where a plain script keeps checkpoints; null: `checkpoints` on the storage. On Ray they lie in the run."""
    compression: Literal["zstd"] | None = None
    """Compress tensors; saves about 8 % on weights and costs time."""
    encryption: EncryptionConfig | None = None
    """Seal checkpoints with AES-256-GCM; null: not."""
    when_busy: Literal["wait", "skip", "queue"] = "wait"
    """A save that comes before the last one is written waits for it, is left out, or stands in line."""
    write_deadline_secs: Seconds = 60.0
    """Seconds after which a save that is not written yet counts as overdue and gets full priority."""
    on_write_failure: Literal["continue", "fail"] = "continue"
    """Whether training goes on or fails when a checkpoint can't be written; the one before it stays either way."""
    memory_copy: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """On Ray, keep the newest also in each node's memory, to restart workers from. `auto`: if storage is far away."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if problems := contradictions(self):
            raise ValidationError.from_exception_data(
                type(self).__name__,
                [
                    InitErrorDetails(
                        type=PydanticCustomError("value_error", "{error}", {"error": problem.allowed}),
                        input=problem.found,
                    )
                    for problem in problems
                ],
            )
        return self


class TrainingConfig(Section):
    """Checkpoint strategies by name. A run uses `default`; others are for a script's own use."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, CheckpointConfig] = Field(init=False)

    default: CheckpointConfig = CheckpointConfig()
    """The strategy a run uses."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_misspelt_default(cls, data: Any) -> Any:
        # Any other name is allowed here, so a slip of the finger would be taken as a strategy nobody uses.
        for name in data if isinstance(data, Mapping) else ():
            if name != "default" and SequenceMatcher(None, str(name).lower(), "default").ratio() >= 0.8:
                raise ValueError(f"default and other names; {name!r} is too close to default to be another")
        return data


with warnings.catch_warnings():
    # `json` is what the key is called; the deprecated BaseModel.json it hides is nobody's loss.
    warnings.filterwarnings("ignore", message='Field name "json"')

    class LoggingConfig(Section):
        """The program's own log lines."""

        level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lower)] = "info"
        """The least that is shown; RAY_TRACKING_LOG_LEVEL and `--debug` override it."""
        json: bool = False  # type: ignore[assignment]
        """One JSON object per line instead of readable text."""


class Config(Section):
    """The whole configuration of a run; made by `get_config`."""

    name: Text = "run"
    """What the run is called in backends and listings; its run id begins with it."""
    storage: Text = "./runs"
    """Where runs live: a path or a URI that pyarrow knows (s3://, gs://)."""
    seed: Annotated[int, BeforeValidator(whole), Ge(0), Le(2**32 - 1)] = 0
    """Seed of every random generator; each rank adds its own number."""
    tags: dict[str, str] = {}
    """Tags of the run, in every backend that knows tags."""
    params: dict[str, Any] = {}
    """The training function's own parameters (`run.params`): any keys, any values."""
    model: ModelConfig | None = None
    """What `create_model` builds; null: the training function builds its own."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers and their resources."""
    failure: FailureConfig = FailureConfig()
    """Restarts."""
    experiment_tracking: ExperimentTrackingConfig = ExperimentTrackingConfig()
    """Backends."""
    training: TrainingConfig = TrainingConfig()
    """Checkpoint strategies."""
    logging: LoggingConfig = LoggingConfig()
    """Log lines."""
    sweep: SweepConfig | None = None
    """The search of `ray-tracking sweep` and `TrainingManager.sweep`."""
