"""What Vision-RWKV and VRWKV6 share: everything below the model but the mixing of tokens.

Legend: B images, N tokens, one a patch, C width, ``grid`` rows and columns of patches.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statewise.models.vision.backbone import check_count, check_rate, drop_path, drop_path_rates, grid_of, pair

__all__ = [
    "Backbone",
    "Block",
    "ChannelMix",
    "StreamConfig",
    "make_head",
    "mixed",
    "ratios",
    "reset_linear",
    "shift_to_sides",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What Vision-RWKV and VRWKV6 are asked alike: everything around the mixing of tokens.

    Args:
        width: channels C.
        num_layers: blocks.
        image_size: pixels that the position embedding is made for, one number or (height, width); images of any other
            size are read, too, with positions resized.
        patch_size: pixels of a token, one number or (height, width).
        in_channels: channels of an image.
        num_classes: logits; 0 means no classifier: the model returns pooled features.
        hidden_rate: the channel mixing's hidden channels, in widths.
        shift_pixel: how far a neighbour is, in tokens; 0 means that nothing is mixed with neighbours.
        post_norm: norms after the branches instead of before.
        key_norm: another norm on what is averaged, and on the channel mixing's hidden channels.
        layer_scale: where ``gamma1`` and ``gamma2``, factors of what each branch adds, start; ``None`` means there are
            none.
        final_norm: a norm after the last block.
        drop_rate: dropout after positions were added.
        drop_path_rate: stochastic depth of the last block, rising evenly from 0 in the first.
        head_width: hidden units of a classifier of two layers with tanh between; ``None`` means one layer.
        global_pool: ``"avg"``, or ``""``: the classifier reads every token.

    Raises:
        ValueError: a size that is no positive integer, or an option out of its range.
    """

    width: int
    num_layers: int
    image_size: int | Sequence[int] = 224
    patch_size: int | Sequence[int] = 16
    in_channels: int = 3
    num_classes: int = 1000
    hidden_rate: int = 4
    shift_pixel: int = 1
    post_norm: bool = False
    key_norm: bool = False
    layer_scale: float | None = None
    final_norm: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    head_width: int | None = None
    global_pool: str = "avg"

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("image_size", "patch_size"):
            value = getattr(self, field)
            sides = pair(f"{name}: {field}", value)
            object.__setattr__(self, field, value if isinstance(value, int) else sides)  # lists come from JSON
        for field in ("width", "num_layers", "in_channels", "hidden_rate"):
            check_count(f"{name}: {field}", getattr(self, field))
        for field in ("num_classes", "shift_pixel"):
            check_count(f"{name}: {field}", getattr(self, field), 0)
        for field in ("post_norm", "key_norm", "final_norm"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{name}: {field} is {getattr(self, field)!r}; accepted are True and False")
        for field in ("drop_rate", "drop_path_rate"):
            check_rate(f"{name}: {field}", getattr(self, field))
        if self.layer_scale is not None and not isinstance(self.layer_scale, int | float):
            raise ValueError(f"{name}: layer_scale is {self.layer_scale!r}; accepted are numbers and None")
        if self.head_width is not None:
            check_count(f"{name}: head_width", self.head_width)
        if self.global_pool not in ("avg", ""):
            raise ValueError(f"{name}: global_pool is {self.global_pool!r}; accepted are 'avg' and ''")

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return pair("patch_size", self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the position embedding is made for."""
        return grid_of(pair("image_size", self.image_size), self.patch)


def shift_to_sides(x: Tensor, pixels: int, ends: Sequence[int]) -> Tensor:
    """Four groups of channels moved to the right, left, down and up; zeros come in, the remaining channels stay.

    Args:
        x: ``(..., rows, columns, C)``.
        pixels: how far, in tokens; from 0.
        ends: where each of the four groups ends; the first begins at 0.
    """
    rows, columns = x.shape[-3:-1]
    down, right = min(pixels, rows), min(pixels, columns)
    start, groups = 0, []
    for end, (up_by, left_by) in zip(ends, ((0, -right), (0, right), (-down, 0), (down, 0)), strict=True):
        group = x[..., start:end]
        # one side loses what the other gets in zeros
        groups.append(F.pad(group, (0, 0, -left_by, left_by, -up_by, up_by)))
        start = end
    return torch.cat([*groups, x[..., start:]], -1)


def mixed(x: Tensor, neighbours: Tensor | None, share: Tensor | None) -> Tensor:
    """``x·share + neighbours·(1 - share)``, in the wider dtype of the two; x itself where there are none."""
    if neighbours is None or share is None:
        return x
    dtype = torch.promote_types(x.dtype, share.dtype)
    return torch.lerp(neighbours.to(dtype), x.to(dtype), share.to(dtype))


class ChannelMix(nn.Module):
    """sigmoid(receptance(mixture)) · value(relu(key(mixture))²).

    Args:
        shift: maps tokens and grid to tokens' neighbours; ``None`` means that nothing is mixed with them.
    """

    spatial_mix_k: Tensor | None
    spatial_mix_r: Tensor | None

    def __init__(self, config: StreamConfig, shift: nn.Module | None) -> None:
        super().__init__()
        C, hidden = config.width, config.hidden_rate * config.width
        self.shift = shift
        for name in ("k", "r"):
            share = nn.Parameter(torch.empty(1, 1, C)) if shift is not None else None
            self.register_parameter(f"spatial_mix_{name}", share)
        self.key = nn.Linear(C, hidden, bias=False)
        self.key_norm = nn.LayerNorm(hidden) if config.key_norm else None
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x ``(B, N, C)`` → what it adds to the stream."""
        neighbours = None if self.shift is None else self.shift(x, grid)
        hidden = torch.relu(self.key(mixed(x, neighbours, self.spatial_mix_k))).square()
        if self.key_norm is not None:
            hidden = self.key_norm(hidden)
        gate = torch.sigmoid(self.receptance(mixed(x, neighbours, self.spatial_mix_r)))
        added: Tensor = gate * self.value(hidden)
        return added


class Block(nn.Module):
    """One layer; the first also normalises the embedding."""

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(self, config: StreamConfig, layer: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        C = config.width
        self.ln1 = nn.LayerNorm(C)
        self.ln2 = nn.LayerNorm(C)
        self.ln0 = nn.LayerNorm(C) if layer == 0 else None
        self.att = att
        self.ffn = ffn
        self.post_norm = config.post_norm
        self.drop_rate = drop_path_rates(config.drop_path_rate, config.num_layers)[layer]
        for name in ("gamma1", "gamma2"):
            self.register_parameter(name, None if config.layer_scale is None else nn.Parameter(torch.empty(C)))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x ``(B, N, C)`` → x."""
        if self.ln0 is not None:
            x = self.ln0(x)
        x = x + self._branch(x, self.att, self.ln1, self.gamma1, grid)
        return x + self._branch(x, self.ffn, self.ln2, self.gamma2, grid)

    def _branch(
        self, x: Tensor, part: nn.Module, norm: nn.Module, gamma: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        added: Tensor = norm(part(x, grid)) if self.post_norm else part(norm(x), grid)
        if gamma is not None:
            added = added * gamma
        return drop_path(added, self.drop_rate, self.training)


class PatchEmbed(nn.Module):
    """Patches as tokens."""

    def __init__(self, config: StreamConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(config.in_channels, config.width, config.patch, stride=config.patch)

    def forward(self, images: Tensor) -> Tensor:
        """images ``(B, C, H, W)`` of whole patches → ``(B, C, rows, columns)``."""
        found: Tensor = self.projection(images)
        return found


class Backbone(nn.Module):
    """Embedding, blocks and last norm."""

    def __init__(self, config: StreamConfig, blocks: Sequence[Block]) -> None:
        super().__init__()
        rows, columns = config.grid
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns, config.width))
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(blocks)
        self.ln1 = nn.LayerNorm(config.width) if config.final_norm else None


def make_head(config: StreamConfig) -> nn.Sequential:
    """The classifier by its published names: ``head.fc``, or ``head.0`` and ``head.2``; empty for no classes."""
    if not config.num_classes:
        return nn.Sequential()
    if config.head_width is None:
        return nn.Sequential(OrderedDict(fc=nn.Linear(config.width, config.num_classes)))
    return nn.Sequential(
        nn.Linear(config.width, config.head_width), nn.Tanh(), nn.Linear(config.head_width, config.num_classes)
    )


def ratios(layer: int, num_layers: int) -> tuple[float, float]:
    """How deep a layer is, from 0 to 1 (0 if it is the only one), and how much is left, from 1 to almost 0."""
    return layer / max(num_layers - 1, 1), 1 - layer / num_layers


def reset_linear(model: nn.Module) -> None:
    """Weights normal with deviation 0.02, cut off at ±2; biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
