"""Vision-RWKV (Duan et al. 2024, arXiv 2403.02308), readable beside the paper's section 3.

Legend: B images, N tokens, one a patch, C width, ``grid`` rows and columns of patches.

An image is cut into patches, each embedded as a token. A block is x += att(ln1 x); x += ffn(ln2 x), or, post-norm,
x += ln1(att x); x += ln2(ffn x). Both parts mix every channel with that of a neighbour on one of four sides (q_shift);
in `att` all tokens of the image are averaged from both sides by :func:`statewise.ops.bi_wkv`, whose decay is divided by
their number. There is no state. Parameters carry the published files' names and shapes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statewise.models.language_model import group_parameters
from statewise.models.vision.backbone import (
    as_features,
    check_images,
    feature_info,
    pad_to_patches,
    pair,
    refuse_state,
    resize_positions,
    run_blocks,
    take_indices,
)
from statewise.models.vision.official_kernel import CHUNKS, official_kernel
from statewise.models.vision.rwkv_stream import (
    Backbone,
    Block,
    ChannelMix,
    StreamConfig,
    make_head,
    mixed,
    ratios,
    reset_linear,
    shift_to_sides,
)
from statewise.ops.bi_wkv import bi_wkv
from statewise.ops.checks import accumulation_dtype

__all__ = ["VisionRWKV", "VisionRWKVConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionRWKVConfig(StreamConfig):
    """Sizes of a Vision-RWKV.

    Args:
        channel_gamma: share of the channels that is shifted to each of four sides, at most 1/4.
        init: how decays, bonuses and mixtures start: ``"fancy"`` (by channel and depth, as released), ``"local"`` or
            ``"global"``.
        official_kernel: ``None`` averages by the paper's equation. 32 or 16 does what the published CUDA kernels for
            classification or segmentation do instead: see :mod:`statewise.models.vision.official_kernel`.

    See :class:`StreamConfig` for the others and for errors.
    """

    channel_gamma: float = 0.25
    init: str = "fancy"
    official_kernel: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.channel_gamma, int | float) or not 0 <= self.channel_gamma <= 0.25:
            raise ValueError(
                f"VisionRWKVConfig: channel_gamma is {self.channel_gamma!r}; accepted are numbers from 0 to 1/4"
            )
        if self.init not in ("fancy", "local", "global"):
            raise ValueError(f"VisionRWKVConfig: init is {self.init!r}; accepted are 'fancy', 'local' and 'global'")
        if self.official_kernel is not None and self.official_kernel not in CHUNKS:
            raise ValueError(
                f"VisionRWKVConfig: official_kernel is {self.official_kernel!r}; accepted are None, "
                f"{', '.join(map(str, CHUNKS))}"
            )


class Shift(nn.Module):
    """q_shift: four groups of channels, each from a neighbour on another side."""

    def __init__(self, config: VisionRWKVConfig) -> None:
        super().__init__()
        self.pixels = config.shift_pixel
        # Truncated one by one, as published: 12, 24, 36, 48 of 80 channels at 0.15
        self.ends = [int(config.width * config.channel_gamma * count) for count in (1, 2, 3, 4)]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x ``(B, N, C)`` → of that shape."""
        plane = x.reshape(x.shape[0], *grid, x.shape[2])
        return shift_to_sides(plane, self.pixels, self.ends).flatten(1, 2)


class SpatialMix(nn.Module):
    """The average over all tokens and what feeds it. Submodules are projections without bias."""

    spatial_mix_k: Tensor | None
    spatial_mix_v: Tensor | None
    spatial_mix_r: Tensor | None

    def __init__(self, config: VisionRWKVConfig) -> None:
        super().__init__()
        C = config.width
        self.chunks = config.official_kernel
        self.shift = Shift(config) if config.shift_pixel else None
        self.spatial_decay = nn.Parameter(torch.empty(C))  # -log_w times the number of tokens
        self.spatial_first = nn.Parameter(torch.empty(C))  # u times the number of tokens
        for name in ("k", "v", "r"):
            share = nn.Parameter(torch.empty(1, 1, C)) if config.shift_pixel else None
            self.register_parameter(f"spatial_mix_{name}", share)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key_norm = nn.LayerNorm(C) if config.key_norm else None
        self.output = nn.Linear(C, C, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x ``(B, N, C)`` → what it adds to the stream."""
        neighbours = None if self.shift is None else self.shift(x, grid)
        k = self.key(mixed(x, neighbours, self.spatial_mix_k))
        v = self.value(mixed(x, neighbours, self.spatial_mix_v))
        r = self.receptance(mixed(x, neighbours, self.spatial_mix_r))
        # In float32 at least: half precision would round away what the division leaves of a decay.
        wide = accumulation_dtype(self.spatial_decay)
        log_w, u = -self.spatial_decay.to(wide) / x.shape[1], self.spatial_first.to(wide) / x.shape[1]
        y = bi_wkv(k, v, log_w, u) if self.chunks is None else official_kernel(k, v, log_w, u, self.chunks)
        if self.key_norm is not None:
            y = self.key_norm(y)
        added: Tensor = self.output(torch.sigmoid(r) * y)
        return added


class VisionRWKV(nn.Module):
    """The classifier: images in, logits out; its features by timm's names."""

    #: Tokens that stand for no patch; timm asks.
    num_prefix_tokens = 0
    config: StreamConfig

    def __init__(self, config: VisionRWKVConfig) -> None:
        super().__init__()
        self._build(config, [self._block(config, layer) for layer in range(config.num_layers)])

    @staticmethod
    def _block(config: VisionRWKVConfig, layer: int) -> Block:
        shift = Shift(config) if config.shift_pixel else None
        return Block(config, layer, SpatialMix(config), ChannelMix(config, shift))

    def _build(self, config: StreamConfig, blocks: Sequence[Block]) -> None:
        self.config = config
        self.backbone = Backbone(config, blocks)
        self.head = make_head(config)
        self.grad_checkpointing = False
        self.feature_info = feature_info("backbone.layers", config.num_layers, config.width, config.patch)
        self.reset_parameters()

    def forward(self, images: Tensor, state: None = None) -> Tensor:
        """Classify images of any size.

        Args:
            images: ``(B, in_channels, H, W)``, floating point, normalised as the weights were trained with. A size that
                is no multiple of the patch's is padded with zeros at the bottom and on the right.
            state: must be ``None``; it stands here to be refused with the reason.

        Returns:
            logits ``(B, num_classes)``; without classes pooled features ``(B, width)``; with ``global_pool=""`` either
            for every token, ``(B, N, ...)``.

        Raises:
            ValueError: images of the wrong shape or dtype, or a state.
        """
        if state is not None:
            refuse_state(type(self).__name__)
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """images ``(B, in_channels, H, W)`` → tokens after the last norm ``(B, N, C)``, in the order of reading."""
        x, grid = self._embed(images)
        x, _ = run_blocks(self.backbone.layers, x, grid, checkpointing=self.grad_checkpointing)
        return self._norm(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """tokens ``(B, N, C)`` → logits, or (``pre_logits``) what the classifier's last layer reads."""
        x = features.mean(1) if self.config.global_pool else features
        for layer in list(self.head)[: -1 if pre_logits else None]:
            x = layer(x)
        return x

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stream after chosen blocks.

        Args:
            images: as :meth:`forward` takes them.
            indices: which blocks: ``None`` all, n the last n, or a list of numbers, negative ones from the end.
            norm: pass each through the last norm. (Published detectors do so for the last block alone.)
            stop_early: run no block behind the last chosen; the first result is then the normed stream there.
            output_fmt: ``"NCHW"`` for maps ``(B, C, rows, columns)``, ``"NLC"`` for tokens ``(B, N, C)``.
            intermediates_only: leave out the first result.

        Returns:
            what :meth:`forward_features` returns, and the list, in the order of blocks.

        Raises:
            ValueError: images as in :meth:`forward`, a block that is not there, or another format.
        """
        x, grid = self._embed(images)
        chosen = take_indices(type(self).__name__, indices, self.config.num_layers)
        blocks = self.backbone.layers[: chosen[-1] + 1] if stop_early or intermediates_only else self.backbone.layers
        x, kept = run_blocks(blocks, x, grid, checkpointing=self.grad_checkpointing, keep=chosen)
        maps = [as_features(self._norm(y) if norm else y, grid, output_fmt) for y in kept]
        return maps if intermediates_only else (self._norm(x), maps)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens at their places ``(B, N, C)``, and the grid they form."""
        config = self.config
        check_images(type(self).__name__, images, config.in_channels)
        patches = self.backbone.patch_embed(pad_to_patches(images, config.patch))
        grid = (patches.shape[2], patches.shape[3])
        x = patches.flatten(2).transpose(1, 2) + resize_positions(self.backbone.pos_embed, config.grid, grid)
        return F.dropout(x, config.drop_rate, self.training), grid

    def _norm(self, x: Tensor) -> Tensor:
        return x if self.backbone.ln1 is None else self.backbone.ln1(x)

    def step(self, *given: Any, **named: Any) -> NoReturn:
        """There is no such form: raises ``ValueError`` with the reason."""
        refuse_state(f"{type(self).__name__}.step")

    def init_state(self, *given: Any, **named: Any) -> NoReturn:
        """There is no state: raises ``ValueError`` with the reason."""
        refuse_state(f"{type(self).__name__}.init_state")

    @property
    def num_classes(self) -> int:
        """Logits; 0 without a classifier."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """Channels of a token."""
        return self.config.width

    @property
    def embed_dim(self) -> int:
        """Channels of a token."""
        return self.config.width

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier's last layer reads."""
        return self.config.head_width if self.config.head_width and self.config.num_classes else self.config.width

    def get_classifier(self) -> nn.Module:
        """The classifier's last layer; an identity without classes."""
        return self.head[-1] if len(self.head) else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; 0 classes leave none. ``global_pool=None`` leaves pooling as it is.

        Raises:
            ValueError: a number of classes or a pooling that the configuration would refuse.
        """
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = dataclasses.replace(self.config, num_classes=num_classes, global_pool=pool)
        self.head = make_head(self.config).to(self.backbone.pos_embed)
        reset_linear(self.head)

    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Make the position embedding for another size of image, from what it is now.

        Args:
            img_size: pixels, one number or (height, width); ``None`` leaves all as it is.
            patch_size: must be the model's own, or ``None``.

        Raises:
            ValueError: another patch size.
        """
        if patch_size is not None and pair("patch_size", patch_size) != self.config.patch:
            raise ValueError(
                f"{type(self).__name__}: patch_size is {patch_size!r}; this model's is {self.config.patch_size!r}, and "
                "patches are not resized"
            )
        if img_size is None:
            return
        config = dataclasses.replace(self.config, image_size=img_size)
        with torch.no_grad():
            positions = resize_positions(self.backbone.pos_embed, self.config.grid, config.grid)
        self.backbone.pos_embed = nn.Parameter(positions.detach().clone(), self.backbone.pos_embed.requires_grad)
        self.config = config

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names that timm's optimisers should not decay, beside vectors: positions."""
        return {"backbone.pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns that sort parameters by depth; ``coarse`` is accepted and changes nothing."""
        return {
            "stem": r"^backbone\.(?:pos_embed|patch_embed)",
            "blocks": [(r"^backbone\.layers\.(\d+)", None), (r"^backbone\.ln1", (99999,))],
        }

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups as in the published training: norms and biases do not decay, all else does.

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """
        norms = {
            f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)
        }

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            return 1.0, 0.0 if name in norms or name.endswith(".bias") else weight_decay

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published initialisation: projections and classifier normal with deviation 0.02, cut off at ±2; positions
        0; decays, bonuses and mixtures by the configuration's ``init``."""
        nn.init.zeros_(self.backbone.pos_embed)
        self.backbone.patch_embed.projection.reset_parameters()
        reset_linear(self)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                module.reset_parameters()
        for layer, block in enumerate(self.backbone.layers):
            assert isinstance(block, Block)
            for gamma in (block.gamma1, block.gamma2):
                if gamma is not None and self.config.layer_scale is not None:
                    nn.init.constant_(gamma, self.config.layer_scale)
            self._reset_mixing(block, layer)

    def _reset_mixing(self, block: Block, layer: int) -> None:
        config = self.config
        assert isinstance(config, VisionRWKVConfig)
        assert isinstance(block.att, SpatialMix)
        att, ffn = block.att, block.ffn
        if config.init == "fancy":
            depth, left = ratios(layer, config.num_layers)
            channel = torch.arange(config.width, dtype=torch.float64)
            decay = -5 + 8 * (channel / max(config.width - 1, 1)) ** (0.7 + 1.3 * depth)
            first = math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
            even = (channel / config.width) ** left
            shares = {"k": even, "v": even + 0.3 * depth, "r": (channel / config.width) ** (0.5 * left)}
            hidden = {"k": even, "r": even}
        else:
            plain = torch.ones(config.width) if config.init == "local" else torch.zeros(config.width)
            decay = first = plain
            shares = hidden = dict.fromkeys("kvr", plain if config.init == "local" else plain + 0.5)
        att.spatial_decay.copy_(decay)
        att.spatial_first.copy_(first)
        for part, values in ((att, shares), (ffn, hidden)):
            for name, value in values.items():
                share = getattr(part, f"spatial_mix_{name}", None)
                if share is not None:
                    share.copy_(value.expand_as(share))
