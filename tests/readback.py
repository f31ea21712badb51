"""What a backend holds, read by its own client: see `ray_tracking.testing.readback`."""

from ray_tracking.testing import Point
from ray_tracking.testing.readback import (
    comparable,
    mlflow_points,
    mlflow_run,
    tensorboard_events,
    tensorboard_points,
    wandb_files,
    wandb_points,
    wandb_records,
    wandb_rows,
)

__all__ = [
    "Point",
    "comparable",
    "mlflow_points",
    "mlflow_run",
    "tensorboard_events",
    "tensorboard_points",
    "wandb_files",
    "wandb_points",
    "wandb_records",
    "wandb_rows",
]
