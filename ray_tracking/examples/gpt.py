"""A small GPT on the text of Python's own `help()`: an example that has weight, up to half a gigabyte of state.

ray-tracking train ray_tracking.examples.gpt:train -c configs/gpt.yaml --set params.size=medium
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from ray_tracking.config import Section, section
from ray_tracking.examples.gpt_model import GPT, SIZES, evaluate, generate, loss_of, optimizer_for
from ray_tracking.examples.gpt_text import VOCABULARY, Tokenizer, Windows, corpus

if TYPE_CHECKING:
    from ray_tracking.runtime.context import Run

_WARM_UP = 0.05
_LEAST = 0.1
_LARGEST_GRADIENT = 1.0
_PROMPT = "The "


class GPTParams(Section):
    """`params` of the configuration. What is misspelt or can't be is a ConfigError that says what is allowed."""

    size: Literal["tiny", "small", "medium", "large"] = "small"
    """How wide and deep the model is: see `gpt_model.SIZES`."""
    epochs: Annotated[int, Ge(1)] = 8
    """Each is followed by validation and a sample of text."""
    batch_size: Annotated[int, Ge(1)] = 8
    """Windows of text per worker and step."""
    context: Annotated[int, Ge(2), Le(2048)] = 128
    """Tokens in a window, about three bytes each."""
    samples_per_epoch: Annotated[int, Ge(1)] | None = None
    """Windows in an epoch; null: so many that they just cover the text."""
    lr: Annotated[float, Gt(0)] | None = None
    """The highest learning rate; null: the size's own."""
    dropout: Annotated[float, Ge(0), Le(0.9)] = 0.1
    """Share of values set to 0 in training."""
    sample_tokens: Annotated[int, Ge(0)] = 120
    """Length of the text written after each epoch; 0: none."""


def gpt_config() -> dict[str, Any]:
    """What `configs/gpt.yaml` says, for use from Python: two workers, a checkpoint every 50 steps."""
    return {
        "name": "gpt",
        "params": {"size": "small", "epochs": 8, "batch_size": 8},
        "scaling": {"workers": 2},
        "training": {"default": {"save_steps": 50, "save_total_limit": 3, "monitor": "val/loss", "mode": "min"}},
    }


def warmup_cosine(progress: float) -> float:
    """The learning rate's factor when `progress` (0 to 1) of the training is done: up to 1, then down half a wave."""
    if progress < _WARM_UP:
        return _LEAST + (1 - _LEAST) * progress / _WARM_UP
    falling = min(1.0, (progress - _WARM_UP) / (1 - _WARM_UP))
    return _LEAST + (1 - _LEAST) * 0.5 * (1 + math.cos(math.pi * falling))


def train(run: Run) -> None:
    params = section(GPTParams, run.params, key="params")
    text, held_out = corpus()
    tokenizer = Tokenizer.learn(text, VOCABULARY)
    validation, prompt = tokenizer.encode(held_out), tokenizer.encode(_PROMPT)
    windows = Windows(tokenizer.encode(text), params.context, params.samples_per_epoch)

    model = GPT(SIZES[params.size], dropout=params.dropout)
    run.log_params({"parameters": sum(parameter.numel() for parameter in model.parameters())})
    network = run.prepare(model)
    optimizer = optimizer_for(model, params.lr or SIZES[params.size].lr)
    loader = run.loader(windows, batch_size=params.batch_size, shuffle=True)

    def factor(_step: int) -> float:
        # Of samples, not of steps: as many are left of them when a run goes on with fewer workers or more epochs.
        return warmup_cosine((loader.epoch + loader.consumed / len(windows)) / params.epochs)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    run.restore(model=network, optimizer=optimizer, scheduler=scheduler, loader=loader)

    for epoch in run.epochs(params.epochs):
        windows.set_epoch(epoch)
        then = time.perf_counter()
        for batch in run.steps(loader):
            loss = loss_of(network, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            now = time.perf_counter()
            tokens = len(batch) * params.context * run.world_size
            run.log_metrics(
                {
                    "train/loss": loss,
                    "train/gradient_norm": norm,
                    "train/lr": lr,
                    "train/tokens_per_second": tokens / (now - then),
                }
            )
            then = now
        run.log_metrics({"val/loss": evaluate(model, validation, params.context), "epoch": epoch + 1})
        if run.rank == 0 and params.sample_tokens:
            written = generate(
                model, prompt, params.sample_tokens, context=params.context, seed=run.config.seed + epoch
            )
            run.log_text("samples", tokenizer.decode(written.tolist()))
