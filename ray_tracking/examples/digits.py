"""Handwritten digits (scikit-learn's 1,797 real images, 8 x 8) with a small CNN: the demo, and a function to copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from ray_tracking.runtime.context import Run

CLASSES = 10


def demo_config() -> dict[str, Any]:
    """Overrides that make the demo: two workers, three backends, a checkpoint at every epoch's end."""
    return {
        "name": "digits",
        "params": {"lr": 0.002, "width": 32, "epochs": 15, "batch_size": 32},
        "scaling": {"workers": 2},
        "experiment_tracking": {
            "tensorboard": {"enabled": True},
            "wandb": {"enabled": True, "mode": "offline"},
            "mlflow": {"enabled": True},
        },
        "training": {"default": {"save_steps": 22, "save_total_limit": 3, "monitor": "val/loss", "mode": "min"}},
    }


class DigitsCNN(nn.Module):
    """Two convolutions and a linear layer: [N, 1, 8, 8] to [N, 10]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(2 * width * 16, CLASSES),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def digits(seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set: images [N, 1, 8, 8] from 0 to 1, labels [N]; one image in five is for testing."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8).astype(np.float32) / 16.0
    parts = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> tuple[float, float, torch.Tensor]:
    """Mean loss and accuracy on all of `data`, and the predicted classes [N]."""
    images, labels = data.tensors
    model.eval()
    logits = model(images.to(next(model.parameters()).device)).cpu()
    model.train()
    predicted = logits.argmax(1)
    loss = nn.functional.cross_entropy(logits, labels)
    return loss.item(), (predicted == labels).float().mean().item(), predicted


def mistakes_grid(data: TensorDataset, predicted: torch.Tensor, columns: int = 8, scale: int = 6) -> np.ndarray:
    """The first misclassified images (up to `columns` squared) side by side, [H, W] from 0 to 1, white where none."""
    images, labels = data.tensors
    wrong = images[predicted != labels][: columns * columns, 0].numpy()
    rows = max(1, -(-len(wrong) // columns))
    grid = np.ones((rows * 10, columns * 10), dtype=np.float32)
    for i, picture in enumerate(wrong):
        top, left = 10 * (i // columns) + 1, 10 * (i % columns) + 1
        grid[top : top + 8, left : left + 8] = picture
    return np.kron(grid, np.ones((scale, scale), dtype=np.float32))


def train(run: Run) -> None:
    train_set, test_set = digits(run.config.seed)
    model = run.prepare(DigitsCNN(run.params.get("width", 32)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.params.get("lr", 0.002))
    loader = run.loader(train_set, batch_size=run.params.get("batch_size", 32), shuffle=True)
    run.restore(model=model, optimizer=optimizer, loader=loader)

    for epoch in run.epochs(run.params.get("epochs", 15)):
        for x, y in run.steps(loader):
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            run.log_metrics({"train/loss": loss, "train/accuracy": (logits.argmax(1) == y).float().mean()})
        val_loss, val_accuracy, predicted = evaluate(model, test_set)
        run.log_metrics({"val/loss": val_loss, "val/accuracy": val_accuracy, "epoch": epoch + 1})
        gradient = next(reversed(list(model.parameters()))).grad
        if gradient is not None:  # resumed at this epoch's end, it has no step to take
            run.log_histogram("gradients/last_layer", gradient)
        run.log_image("val/mistakes", mistakes_grid(test_set, predicted))
    _, _, predicted = evaluate(model, test_set)  # not from the loop: resumed at the end, there is no epoch left
    run.log_text("summary", f"{int((predicted != test_set.tensors[1]).sum())} of {len(test_set)} test images misread")
