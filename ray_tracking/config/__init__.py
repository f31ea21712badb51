"""A run's configuration, validated before anything starts; secrets taken out before it goes anywhere.

In: YAML files, environment variables, overrides. Out: a frozen `Config`, or a ConfigError with every problem.
Imports of the package only errors. Loads pydantic and PyYAML, nothing heavier.
"""

from ray_tracking.config.loader import ENVIRONMENTS, get_config, parse_assignments, with_overrides
from ray_tracking.config.models import (
    CheckpointConfig,
    Config,
    DeliveryConfig,
    EncryptionConfig,
    ExperimentTrackingConfig,
    FailureConfig,
    LoggingConfig,
    MLflowConfig,
    ModelConfig,
    ScalingConfig,
    Section,
    TensorBoardConfig,
    TrainingConfig,
    WandbConfig,
)
from ray_tracking.config.problems import section
from ray_tracking.config.redaction import REMOVED, redact, redact_text

__all__ = [
    "ENVIRONMENTS",
    "REMOVED",
    "CheckpointConfig",
    "Config",
    "DeliveryConfig",
    "EncryptionConfig",
    "ExperimentTrackingConfig",
    "FailureConfig",
    "LoggingConfig",
    "MLflowConfig",
    "ModelConfig",
    "ScalingConfig",
    "Section",
    "TensorBoardConfig",
    "TrainingConfig",
    "WandbConfig",
    "get_config",
    "parse_assignments",
    "redact",
    "redact_text",
    "section",
    "with_overrides",
]
