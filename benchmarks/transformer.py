"""The yardstick: a plain pre-norm transformer on torch's own attention, with rotary positions.

Legend: B batch, T time, C width, H heads, N head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Transformer", "TransformerConfig"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes. The feed-forward part is 4.5 C wide: 13 C² parameters a block, as many as RWKV-4's."""

    vocab_size: int
    num_layers: int
    width: int
    head_size: int = 64


def _angles(time: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``(T, N/2)`` of the rotary positions."""
    rate = 10000 ** (-torch.arange(0, size, 2, device=like.device, dtype=torch.float32) / size)
    angle = torch.arange(time, device=like.device, dtype=torch.float32)[:, None] * rate
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (channel i, channel i + N/2) of ``(B, H, T, N)`` by its angle."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class _Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        C, hidden = config.width, config.width * 9 // 2
        self.heads = C // config.head_size
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.output = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, hidden, bias=False), nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        fed: Tensor = self.down(F.gelu(self.up(self.ln2(x))))
        return x + fed


class Transformer(nn.Module):
    """Tokens in, logits out; what it knows of the past is its window."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if config.width % config.head_size:
            raise ValueError(f"width: got {config.width}, a multiple of head_size {config.head_size} is accepted")
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # GPT-2's: what writes into the stream shrinks with depth
                writes = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * config.num_layers) ** 0.5 if writes else 1))

    def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
        """ids ``(B, T)`` → logits ``(B, T, vocab_size)``, and no state.

        Raises:
            ValueError: a state is given.
        """
        if state is not None:
            raise ValueError("state: a transformer without a cache carries none, None is accepted")
        x = self.emb(tokens)
        cos, sin = _angles(tokens.shape[1], self.config.head_size, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.ln_out(x)), None

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Decay on matrices, none on norms."""
        named = list(self.named_parameters())
        split = [[(n, p) for n, p in named if (p.dim() >= 2) is matrix] for matrix in (True, False)]
        return [
            {
                "params": [p for _, p in part],
                "names": [n for n, _ in part],
                "lr_scale": 1.0,
                "weight_decay": decay,
            }
            for part, decay in zip(split, (weight_decay, 0.0), strict=True)
        ]
