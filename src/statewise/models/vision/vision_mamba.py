"""Vision Mamba (Zhu et al. 2024, arXiv 2401.09417), readable beside the paper's algorithm 1.

Legend: B images, C channels of the image, H and W its height and width, width the model's; N patches in the order of
reading, T = N + 1 with the class token; ``grid`` is (rows, columns) of patches.

An image becomes N patches with a class token put in their middle, after patch ⌊N/2⌋, and a learnt embedding of every
place is added. A block is x += mixer(norm x), where the mixer is a :class:`~statewise.models.mamba.MambaMixer` that
scans from the first to the last token and, with a convolution, projections, A and D of its own, from the last to the
first, and takes the mean of the two. The class token is then read by a linear head: from the middle, both scans reach
it over half the image only. Parameters carry the official names and shapes.
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
from statewise.models.mamba import LayerNorm, MambaConfig, MambaMixer, RMSNorm
from statewise.models.vision.backbone import (
    as_features,
    check_count,
    check_images,
    check_rate,
    drop_path,
    drop_path_rates,
    feature_info,
    grid_of,
    pair,
    refuse_state,
    resize_positions,
    run_blocks,
    take_indices,
)
from statewise.ops.checks import accumulation_dtype

__all__ = ["VisionMamba", "VisionMambaConfig"]

_UNDECAYED = ("A_log", "A_b_log", "D", "D_b")
_STD_OF_CUT_NORMAL = 0.8796256610342398  # of the standard normal distribution cut at ±2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionMambaConfig:
    """Sizes and options of a Vision Mamba.

    Args:
        width: d_model.
        num_layers: blocks.
        num_classes: rows of the head; 0 means no head: the model returns pooled features.
        image_size: one side or (height, width) that the position embedding is made for. Other sizes are read too.
        patch_size: one side or (height, width) of a patch.
        stride: pixels from one patch to the next, one number or (down, right); ``None`` means the patch size. The
            published models for long sequences have patches of 16 every 8 pixels.
        in_channels: of the images.
        state_size, conv_width, expand, dt_rank, bias, conv_bias: the mixers', as in
            :class:`~statewise.models.mamba.MambaConfig`.
        divide_out: whether a mixer takes the mean of its two directions, or their sum.
        layer_scale: if given, a factor per channel on every mixer's output that starts at this value.
        norm_eps: epsilon of the norms.
        rms_norm: RMSNorm; ``False`` means LayerNorm.
        residual_in_fp32: whether the stream between blocks stays float32 in a half-precision model.
        drop_rate: dropout after positions were added.
        drop_path_rate: in training, the share of images that skip the last block's branch; earlier blocks' shares rise
            evenly from 0.
        global_pool: what the head reads: ``"token"``, the class token; ``"avg"``, the mean of the patches; ``""``,
            every token.

    Raises:
        ValueError: a value outside its range.
    """

    width: int
    num_layers: int
    num_classes: int = 1000
    image_size: int | Sequence[int] = 224
    patch_size: int | Sequence[int] = 16
    stride: int | Sequence[int] | None = None
    in_channels: int = 3
    state_size: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int | None = None
    bias: bool = False
    conv_bias: bool = True
    divide_out: bool = True
    layer_scale: float | None = None
    norm_eps: float = 1e-5
    rms_norm: bool = True
    residual_in_fp32: bool = True
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    global_pool: str = "token"

    def __post_init__(self) -> None:
        name = "VisionMambaConfig"
        check_count(f"{name}: num_classes", self.num_classes, 0)
        check_count(f"{name}: in_channels", self.in_channels)
        for field in ("image_size", "patch_size", "stride"):
            value = getattr(self, field)
            if field != "stride" or value is not None:
                both = pair(f"{name}: {field}", value)
                object.__setattr__(self, field, value if isinstance(value, int) else both)  # JSON knows no tuples
        if any(step > side for step, side in zip(self.strides, self.patch, strict=True)):
            raise ValueError(f"{name}: stride {self.stride} is larger than patch_size {self.patch_size}: pixels unread")
        check_rate(f"{name}: drop_rate", self.drop_rate)
        check_rate(f"{name}: drop_path_rate", self.drop_path_rate)
        if self.global_pool not in ("token", "avg", ""):
            raise ValueError(f"{name}: global_pool is {self.global_pool!r}; accepted are 'token', 'avg' and ''")
        scale = self.layer_scale
        if scale is not None and (not isinstance(scale, int | float) or not math.isfinite(scale)):
            raise ValueError(f"{name}: layer_scale is {scale!r}; accepted are None and finite numbers")
        if not isinstance(self.divide_out, bool):
            raise ValueError(f"{name}: divide_out is {self.divide_out!r}; accepted are True and False")
        _ = self.mixer  # checks the fields that it shares

    @property
    def mixer(self) -> MambaConfig:
        """The configuration of every mixer."""
        shared = {field.name for field in dataclasses.fields(MambaConfig)} & set(self.__dataclass_fields__)
        return MambaConfig(vocab_size=1, **{field: getattr(self, field) for field in shared})

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return pair("patch_size", self.patch_size)

    @property
    def strides(self) -> tuple[int, int]:
        """Pixels from a patch to the one below, and to the one on its right."""
        return self.patch if self.stride is None else pair("stride", self.stride)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that the position embedding is made for."""
        return self.grid_at(pair("image_size", self.image_size))

    def grid_at(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image: as many as it takes to read every pixel."""
        (height, width), (tall, wide) = image_size, self.patch
        rows, columns = grid_of((max(height - tall, 0), max(width - wide, 0)), self.strides)
        return rows + 1, columns + 1


class PatchEmbedding(nn.Module):
    """Patches of an image, projected: ``(B, C, H, W)`` → ``(B, N, width)``."""

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.grid_at, self.patch, self.strides = config.grid_at, config.patch, config.strides
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch, config.strides)

    def forward(self, images: Tensor) -> Tensor:
        """Zeros stand where the last patches reach beyond the image."""
        height, width = images.shape[2:]
        rows, columns = self.grid_at((height, width))
        (tall, wide), (down, right) = self.patch, self.strides
        missing = (rows - 1) * down + tall - height, (columns - 1) * right + wide - width
        if any(missing):
            images = F.pad(images, (0, missing[1], 0, missing[0]))
        patches: Tensor = self.proj(images)
        return patches.flatten(2).transpose(1, 2)


class Block(nn.Module):
    """One layer of the stream."""

    def __init__(self, config: VisionMambaConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.mixer = MambaMixer(
            config.mixer, bidirectional=True, divide_out=config.divide_out, layer_scale=config.layer_scale
        )
        self.norm = _norm(config)

    def forward(self, x: Tensor) -> Tensor:
        """x ``(B, T, width)`` → the same shape."""
        added, _ = self.mixer(self.norm(x))
        return x + drop_path(added, self.drop_path_rate, self.training)


def _norm(config: VisionMambaConfig) -> RMSNorm | LayerNorm:
    return (RMSNorm if config.rms_norm else LayerNorm)(config.width, eps=config.norm_eps)


def _without_middle(tokens: Tensor) -> Tensor:
    """``(B, N + 1, width)`` → the N patches, without the class token between them."""
    middle = (tokens.shape[1] - 1) // 2
    return torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], 1)


class VisionMamba(nn.Module):
    """Images in, classes out; or maps of features after any of its blocks."""

    #: Tokens before the patches; timm asks. (The class token is among them, and left out of maps.)
    num_prefix_tokens = 0

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid) + 1, config.width))
        self.patch_embed = PatchEmbedding(config)
        self.head = _head(config)
        rates = drop_path_rates(config.drop_path_rate, config.num_layers)
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm_f = _norm(config)
        self.reset_parameters()

    def forward(self, images: Tensor, state: None = None) -> Tensor:
        """Classify images of any size.

        Sizes that patches do not cover exactly are padded with zeros at the bottom and on the right; at sizes other
        than ``config.image_size`` the position embedding is resized, bicubic.

        Args:
            images: ``(B, in_channels, H, W)``, floating point, normalised as the weights were trained with.
            state: must be ``None``; it stands here to be refused with the reason: the second scan starts at the last
                patch.

        Returns:
            logits ``(B, num_classes)``; without classes pooled features ``(B, width)``; with ``global_pool=""`` either
            for every token, ``(B, N + 1, ...)``.

        Raises:
            ValueError: images of the wrong shape, channels or dtype, without a pixel; a state.
        """
        if state is not None:
            refuse_state("VisionMamba")
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """images ``(B, in_channels, H, W)`` → normed tokens ``(B, N + 1, width)``, the class token at index N//2."""
        x, _ = self._embed(images)
        x, _ = run_blocks(self.layers, x, checkpointing=self.grad_checkpointing)
        tokens: Tensor = self.norm_f(x)
        return tokens

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What :meth:`forward_features` returns, ``(B, N + 1, width)`` → logits, or (``pre_logits``) what the head
        reads."""
        x = features
        if self.config.global_pool == "token":
            x = features[:, (features.shape[1] - 1) // 2]
        elif self.config.global_pool == "avg":
            x = _without_middle(features).mean(1)
        return x if pre_logits else self.get_classifier()(x)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stream after chosen blocks, without the class token.

        Args:
            images: as for :meth:`forward`.
            indices: which blocks: ``None`` all, n the last n, or a list of numbers (negative: from the end).
            norm: whether each map passes the last norm.
            stop_early: run no block behind the last chosen; the first result is then the normed stream there.
            output_fmt: ``"NCHW"``: maps ``(B, width, rows, columns)``; ``"NLC"``: tokens ``(B, N, width)``.
            intermediates_only: leave out the first result.

        Returns:
            what :meth:`forward_features` returns, and the list, in the order of blocks.

        Raises:
            ValueError: see :meth:`forward`; no such block; another format.
        """
        chosen = take_indices("VisionMamba", indices, len(self.layers))
        x, grid = self._embed(images)
        blocks = self.layers[: chosen[-1] + 1] if stop_early or intermediates_only else self.layers
        x, kept = run_blocks(blocks, x, checkpointing=self.grad_checkpointing, keep=chosen)
        streams = [self.norm_f(stream) if norm else stream for stream in kept]
        maps = [as_features(_without_middle(stream), grid, output_fmt) for stream in streams]
        return maps if intermediates_only else (self.norm_f(x), maps)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """images → tokens with their positions ``(B, N + 1, width)``, and the grid."""
        check_images("VisionMamba", images, self.config.in_channels)
        grid = self.config.grid_at((images.shape[2], images.shape[3]))
        patches = self.patch_embed(images)
        middle = patches.shape[1] // 2
        token = self.cls_token.expand(patches.shape[0], -1, -1)
        x = torch.cat([patches[:, :middle], token.to(patches.dtype), patches[:, middle:]], 1)
        x = F.dropout(x + self._positions(grid), self.config.drop_rate, self.training)
        return x.to(accumulation_dtype(x)) if self.config.residual_in_fp32 else x, grid

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding for another grid; the class token's own moves along with the middle."""
        if grid == self.config.grid:
            return self.pos_embed
        old = (self.pos_embed.shape[1] - 1) // 2
        patches = resize_positions(_without_middle(self.pos_embed), self.config.grid, grid)
        middle = patches.shape[1] // 2
        return torch.cat([patches[:, :middle], self.pos_embed[:, old : old + 1], patches[:, middle:]], 1)

    def step(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refused: the second scan starts at the last patch, so there is no single step.

        Raises:
            ValueError: always.
        """
        refuse_state("VisionMamba.step")

    def init_state(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refused, as :meth:`step` is.

        Raises:
            ValueError: always.
        """
        refuse_state("VisionMamba.init_state")

    @property
    def num_classes(self) -> int:
        """Columns of the logits; 0 without a head."""
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
        """Channels that the head reads."""
        return self.config.width

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Of the map after each block: ``module``, ``num_chs`` and ``reduction``, the pixels from a token to the
        next."""
        return feature_info("layers", self.config.num_layers, self.config.width, self.config.strides)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one; 0 classes leave none. ``global_pool=None`` leaves pooling as it is.

        Raises:
            ValueError: a number of classes or a pooling that the configuration would refuse.
        """
        pool = self.config.global_pool if global_pool is None else global_pool
        self.config = dataclasses.replace(self.config, num_classes=num_classes, global_pool=pool)
        self.head = _head(self.config).to(self.pos_embed)
        self._reset_head()

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
                f"VisionMamba: patch_size is {patch_size!r}; this model's is {self.config.patch_size!r}, and patches "
                "are not resized"
            )
        if img_size is None:
            return
        config = dataclasses.replace(self.config, image_size=img_size)
        with torch.no_grad():
            positions = self._positions(config.grid)
        self.pos_embed = nn.Parameter(positions.detach().clone(), self.pos_embed.requires_grad)
        self.config = config

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are recomputed in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that never decay: embeddings of positions and class, and the mixers' A and D (which Vim's code
        marks so, although its training script decays A)."""
        found = {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in _UNDECAYED}
        return found | {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of layers, for rates of learning that fall towards the image; coarse is the same."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups: matrices and kernels decay, :meth:`no_weight_decay`, norms and biases do not.

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """
        spared = self.no_weight_decay()

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            return 1.0, weight_decay if parameter.dim() >= 2 and name not in spared else 0.0

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The official initialisation: the backward direction's step sizes start from a bias of 0, not from Mamba's."""
        for module in self.modules():
            if isinstance(module, MambaMixer | RMSNorm | LayerNorm):
                module.reset_parameters()
                if isinstance(module, MambaMixer):
                    nn.init.zeros_(module.get_parameter("dt_proj_b.bias"))
        kernel = self.patch_embed.get_parameter("proj.weight")
        std = kernel[0].numel() ** -0.5 / _STD_OF_CUT_NORMAL  # LeCun's: unit variance in, unit variance out
        nn.init.trunc_normal_(kernel, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(self.patch_embed.get_parameter("proj.bias"))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self._reset_head()

    @torch.no_grad()
    def _reset_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)


def _head(config: VisionMambaConfig) -> nn.Module:
    return nn.Linear(config.width, config.num_classes) if config.num_classes else nn.Identity()
