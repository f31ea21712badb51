"""A small GPT, a decoder-only transformer, in plain torch: the network, its optimizer, and how large they are.

Training state: weights and two Adam moments, float32. Measured with a vocabulary of 1,024 tokens:

| size   | width | layers | heads | parameters | training state |
|--------|-------|--------|-------|------------|----------------|
| tiny   |    64 |      2 |     2 |    165,120 |         2.0 MB |
| small  |   128 |      4 |     4 |    922,368 |        11.1 MB |
| medium |   384 |      6 |     6 | 11,031,552 |       132.4 MB |
| large  |   768 |      6 |    12 | 43,296,768 |       519.6 MB |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional

from ray_tracking.examples.gpt_text import VOCABULARY


@dataclass(frozen=True, slots=True)
class Size:
    """`width` is a multiple of twice `heads`; `lr`: the highest learning rate it learns well with."""

    width: int
    layers: int
    heads: int
    lr: float


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "tiny": Size(width=64, layers=2, heads=2, lr=5e-3),
        "small": Size(width=128, layers=4, heads=4, lr=3e-3),
        "medium": Size(width=384, layers=6, heads=6, lr=1e-3),
        "large": Size(width=768, layers=6, heads=12, lr=6e-4),
    }
)
_DEVIATION = 0.02
_ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021): only distances between tokens count."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.inputs = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.inputs(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [N, heads, T, width / heads]
        mixed = functional.scaled_dot_product_attention(
            _rotated(query, rotation),
            _rotated(key, rotation),
            value,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then a layer of its own for each token; both are added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_up = nn.Linear(width, 4 * width)
        self.mlp_down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation))
        return x + self.dropout(self.mlp_down(functional.gelu(self.mlp_up(self.mlp_norm(x)))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Token ids [N, T] to logits [N, T, vocabulary] of the token after each.

    One matrix is used for reading tokens and, transposed, for writing them.
    """

    def __init__(self, size: Size, *, vocabulary: int = VOCABULARY, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_width = size.width // size.heads
        self.tokens = nn.Embedding(vocabulary, size.width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(size.width, size.heads, dropout) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self._initialize(size.layers)

    def _initialize(self, layers: int) -> None:
        """As GPT-2: what is added to the sum of all blocks is smaller, the more blocks there are."""
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "mlp_down.weight")):
                nn.init.normal_(parameter, std=_DEVIATION / math.sqrt(2 * layers))
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=_DEVIATION)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rotation = _rotation(tokens.shape[1], self.head_width, tokens.device)
        x = self.dropout(self.tokens(tokens))
        for block in self.blocks:
            x = block(x, rotation)
        return functional.linear(self.norm(x), self.tokens.weight)


def _rotation(length: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each position's angles: [T, width / 2]."""
    frequencies = _ROTARY_BASE ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(length, device=device), frequencies)
    return angles.cos(), angles.sin()


def _rotated(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def loss_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy per token, in nats, of windows [N, T + 1]: each token but the first is to be foretold."""
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, tokens: torch.Tensor, context: int, batch_size: int = 32) -> float:
    """Mean loss on a whole text [T], read in windows side by side; what does not fill the last one is left out."""
    windows = tokens.unfold(0, context + 1, context)
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for begin in range(0, len(windows), batch_size):
        batch = windows[begin : begin + batch_size].to(device)
        total += loss_of(model, batch).item() * len(batch)
    model.train()
    return total / len(windows)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: torch.Tensor,
    count: int,
    *,
    context: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> torch.Tensor:
    """The prompt [T] and `count` tokens drawn after it, on the CPU. The global random numbers are left alone."""
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    tokens = prompt
    model.eval()
    for _ in range(count):
        logits = model(tokens[None, -context:].to(device))[0, -1].float().cpu()
        tokens = torch.cat((tokens, torch.multinomial((logits / temperature).softmax(0), 1, generator=random)))
    model.train()
    return tokens


def optimizer_for(model: nn.Module, lr: float, *, decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW; weights decay only in matrices, not in biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def build(size: str, *, device: str | torch.device = "cpu", seed: int = 0) -> tuple[GPT, torch.optim.AdamW]:
    """A model and its optimizer as in the middle of training, for benchmarks of checkpoints.

    The moments are filled with random numbers, which take as long to store and compress as real ones. The global
    random numbers are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(SIZES[size])
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
    model.to(device)
    optimizer = optimizer_for(model, SIZES[size].lr)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def parameter_count(size: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(SIZES[size]).parameters())


def state_bytes(size: str) -> int:
    """Bytes of the tensors of a training state: of each parameter itself, its two moments, and Adam's step count."""
    with torch.device("meta"):
        parameters = list(GPT(SIZES[size]).parameters())
    return sum(3 * 4 * parameter.numel() + 4 for parameter in parameters)
