"""VRWKV6: Vision-RWKV with the matrix state of RWKV-6 in place of the average, as its authors released it.

Legend: B images, N tokens, one a patch, C width, H heads, K head size (= V), D rank of a low-rank pair; ``grid`` rows
and columns of patches.

Everything around `att` is :mod:`~statewise.models.vision.vision_rwkv`'s. In `att` neighbours on four sides, a quarter
of every head's channels from each, take the place of RWKV-6's token before; a token reads what came before it, itself
(with the bonus u) and what comes after it:

    y_t = wkv6 of tokens 0..t, with u  +  wkv6 of tokens N-1..t, backwards, with u = 0

by :func:`statewise.ops.wkv6` twice, with the same decays. The result is not divided by anything: a GroupNorm per head
follows. There is no state that could be carried.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statewise.models.vision.backbone import check_count
from statewise.models.vision.rwkv_stream import Block, ChannelMix, StreamConfig, ratios, shift_to_sides
from statewise.models.vision.vision_rwkv import VisionRWKV
from statewise.ops.checks import accumulation_dtype
from statewise.ops.wkv6 import wkv6

__all__ = ["VisionRWKV6", "VisionRWKV6Config"]

#: The mixtures whose shares a token decides about, in the order of `time_maa_w1` and `time_maa_w2`.
_MIXTURES = ("w", "k", "v", "r", "g")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionRWKV6Config(StreamConfig):
    """Sizes of a VRWKV6.

    Args:
        head_size: K; 64 in every release. A multiple of 4 that divides the width.
        mix_rank: rank of `time_maa_w1`, `time_maa_w2`, for each of five mixtures.
        decay_rank: rank of `time_decay_w1`, `time_decay_w2`.

    See :class:`~statewise.models.vision.rwkv_stream.StreamConfig` for the others and for errors.
    """

    head_size: int = 64
    mix_rank: int = 32
    decay_rank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("head_size", "mix_rank", "decay_rank"):
            check_count(f"VisionRWKV6Config: {field}", getattr(self, field))
        if self.head_size % 4 or self.width % self.head_size:
            raise ValueError(
                f"VisionRWKV6Config: head_size is {self.head_size}; accepted are multiples of 4 that divide the width "
                f"{self.width}"
            )


class MultiheadShift(nn.Module):
    """q_shift_multihead: a quarter of every head's channels from each of four neighbours."""

    def __init__(self, config: VisionRWKV6Config) -> None:
        super().__init__()
        self.pixels, self.head_size = config.shift_pixel, config.head_size
        self.ends = [config.head_size * count // 4 for count in (1, 2, 3, 4)]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x ``(B, N, C)`` → of that shape."""
        # heads beside images, so that channels come last
        plane = x.reshape(x.shape[0], *grid, x.shape[2] // self.head_size, self.head_size).movedim(3, 1)
        return shift_to_sides(plane, self.pixels, self.ends).movedim(1, 3).reshape(x.shape)


class SpatialMix6(nn.Module):
    """Both scans and what feeds them. Submodules are projections without bias, `ln_x` one group per head."""

    def __init__(self, config: VisionRWKV6Config) -> None:
        super().__init__()
        C, K = config.width, config.head_size
        self.heads, self.head_size = C // K, K
        self.shift = MultiheadShift(config)

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        # How much of the neighbours each mixture takes: x of the one that decides, then those decided about.
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(), vector(), vector()
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(), vector(), vector()
        self.time_maa_w1 = nn.Parameter(torch.empty(C, len(_MIXTURES) * config.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(_MIXTURES), config.mix_rank, C))
        self.time_decay = vector()  # log_w = -exp(time_decay + what the token adds)
        self.time_decay_w1 = nn.Parameter(torch.empty(C, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, C))
        self.time_faaaa = nn.Parameter(torch.empty(self.heads, K))  # u: how much of the present token is read
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C, bias=False)
        self.key_norm = nn.LayerNorm(C) if config.key_norm else None
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(self.heads, C)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x ``(B, N, C)`` → what it adds to the stream."""
        xw, xk, xv, xr, xg = self._mixtures(x, self.shift(x, grid))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # Decay in float32 at least: its rounding error is raised to the power of the distance it has to bridge.
        w = torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        wide = accumulation_dtype(w)
        log_w = -torch.exp(self.time_decay.to(wide) + w.to(wide))
        r, log_w, k, v = (z.reshape(*z.shape[:2], self.heads, self.head_size) for z in (r, log_w, k, v))
        y, _ = wkv6(r, log_w, k, v, self.time_faaaa)
        behind, _ = wkv6(r.flip(1), log_w.flip(1), k.flip(1), v.flip(1), torch.zeros_like(self.time_faaaa))
        y = (y + behind.flip(1)).reshape(x.shape)
        if self.key_norm is not None:
            y = self.key_norm(y)
        y = self.ln_x(y.flatten(0, 1)).reshape(x.shape)
        added: Tensor = self.output(y * F.silu(self.gate(xg)))
        return added

    def _mixtures(self, x: Tensor, neighbours: Tensor) -> tuple[Tensor, ...]:
        """``(B, N, C)`` for each of w, k, v, r, g: by shares that a low-rank pair decides for every token anew."""
        wide = accumulation_dtype(x, self.time_maa_x)
        here = x.to(wide)
        change = neighbours.to(wide) - here
        deciding = (here + change * self.time_maa_x.to(wide)).to(self.time_maa_w1.dtype)
        hidden = torch.tanh(deciding @ self.time_maa_w1)  # (B, N, 5D), a rank beside the other
        hidden = hidden.reshape(x.shape[0] * x.shape[1], *self.time_maa_w2.shape[:2]).transpose(0, 1)  # (5, BN, D)
        decided = torch.bmm(hidden, self.time_maa_w2).reshape(len(_MIXTURES), *x.shape)
        shares = [getattr(self, f"time_maa_{name}") for name in _MIXTURES]
        return tuple(
            (here + change * (share.to(wide) + more.to(wide))).to(x.dtype)
            for share, more in zip(shares, decided.unbind(0), strict=True)
        )


class VisionRWKV6(VisionRWKV):
    """The classifier: images in, logits out; all that :class:`~statewise.models.vision.vision_rwkv.VisionRWKV` answers,
    this does too."""

    @staticmethod
    def _block(config: Any, layer: int) -> Block:
        return Block(config, layer, SpatialMix6(config), ChannelMix(config, MultiheadShift(config)))

    def _reset_mixing(self, block: Block, layer: int) -> None:
        """RWKV-6's start, by channel and depth; the published code knows no other."""
        att, ffn = block.att, block.ffn
        assert isinstance(att, SpatialMix6)
        assert isinstance(ffn, ChannelMix)
        depth, left = ratios(layer, self.config.num_layers)
        width = self.config.width
        channel = torch.arange(width, dtype=torch.float64)
        even = (channel / width) ** left
        for name in ("x", "w", "k"):
            getattr(att, f"time_maa_{name}").copy_(1 - even)
        att.time_maa_v.copy_(1 - even - 0.3 * depth)
        for name in ("r", "g"):
            getattr(att, f"time_maa_{name}").copy_(1 - (channel / width) ** (0.5 * left))
        along = channel / max(width - 1, 1)
        att.time_decay.copy_(-6 + 5 * along ** (0.7 + 1.3 * depth))
        first = depth * (1 - along) + 0.1 * ((channel + 1) % 3 - 1)
        att.time_faaaa.copy_(first.reshape(att.time_faaaa.shape))
        for name in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"):
            nn.init.uniform_(getattr(att, name), -1e-4, 1e-4)
        for share in (ffn.spatial_mix_k, ffn.spatial_mix_r):
            assert share is not None
            share.copy_(even)
