"""What every benchmark of logging logs: ten scalars a step."""

from __future__ import annotations

from typing import Any

KEYS = tuple(f"train/metric_{i}" for i in range(10))

THREE_BACKENDS: dict[str, Any] = {
    "tensorboard": {"enabled": True},
    "wandb": {"enabled": True, "mode": "offline"},
    "mlflow": {"enabled": True},
}


def metrics_of(step: int) -> dict[str, float]:
    """Ten numbers that change with every step."""
    return {key: 1.0 / (step + i + 1) for i, key in enumerate(KEYS)}
