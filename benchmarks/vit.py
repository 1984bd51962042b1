"""The yardstick for models of images: a plain ViT (Dosovitskiy et al. 2020) on torch's own attention.

Legend: B images, N tokens, one a patch, C width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statewise.models.language_model import group_parameters
from statewise.models.vision.backbone import resize_positions

__all__ = ["ViT"]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        fed: Tensor = self.down(F.gelu(self.up(self.ln2(x))))
        return x + fed


class ViT(nn.Module):
    """Images of any size in, logits out: the mean of all tokens is classified, positions are resized."""

    def __init__(
        self,
        width: int = 192,
        num_layers: int = 12,
        heads: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        side = image_size // patch_size
        self.grid = (side, side)
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(0.02 * torch.randn(1, side * side, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` → logits ``(B, num_classes)``."""
        x = self.patches(images)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2) + resize_positions(self.positions, self.grid, grid)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Matrices decay; biases, norms and positions do not."""

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            return 1.0, weight_decay if parameter.dim() > 1 and name != "positions" else 0.0

        return group_parameters(self, rule)
