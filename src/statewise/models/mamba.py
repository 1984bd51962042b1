"""Mamba (Gu and Dao 2023, arXiv 2312.00752), readable beside the paper's section 3 and figure 3.

Legend (B and C are the paper's matrices, so sizes are spelled out): batch, T time, width, channels = expand·width,
N state size, W convolution width, n packed sequences.

A block is x += mixer(norm x). The mixer widens its input, convolves each channel over its last W samples, lets what it
sees choose the step size dt and the matrices B and C of :func:`statewise.ops.selective_scan`, gates, and narrows again.
Parameters carry state-spaces' names and shapes, so a checkpoint is read without translation. Jamba's normalisation of
dt, B and C, and FalconMamba's (which has no weights), are options.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from statewise.models.language_model import check_call, group_parameters, tie_head
from statewise.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from statewise.ops.checks import accumulation_dtype
from statewise.ops.ragged import blank, check_ragged, valid_steps
from statewise.ops.selective_scan import selective_scan, selective_scan_step
from statewise.state import MambaLayerState, ModelState

__all__ = ["Mamba", "MambaConfig", "MambaMixer"]


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Sizes and options of a Mamba.

    Args:
        vocab_size: rows of the embedding and columns of the logits. It is rounded up to a multiple of
            ``pad_vocab_multiple`` when the configuration is made, as the published models do: 50277 becomes 50280.
        num_layers: blocks.
        width: d_model.
        state_size: N, states per channel.
        conv_width: W, samples the convolution sees.
        expand: channels per unit of width.
        dt_rank: rank of the projection that makes dt; ``None`` means width/16 rounded up.
        bias: whether ``in_proj`` and ``out_proj`` have biases.
        conv_bias: whether the convolution has one.
        inner_norm: RMS normalisation of dt (before its projection), B and C: ``None``, ``"weighted"`` (Jamba,
            mamba.py) or ``"weightless"`` (FalconMamba).
        inner_norm_eps: its epsilon.
        norm_eps: epsilon of the norms between blocks.
        rms_norm: RMSNorm between blocks; ``False`` means LayerNorm.
        residual_in_fp32: whether the stream between blocks stays float32 in a half-precision model.
        tie_embeddings: whether ``lm_head`` is the embedding.
        pad_vocab_multiple: see ``vocab_size``.
        dt_min, dt_max, dt_floor: initial step sizes are log-uniform between the first two, at least the third.

    Raises:
        ValueError: a value outside its range.
    """

    vocab_size: int
    num_layers: int
    width: int
    state_size: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int | None = None
    bias: bool = False
    conv_bias: bool = True
    inner_norm: str | None = None
    inner_norm_eps: float = 1e-6
    norm_eps: float = 1e-5
    rms_norm: bool = True
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_multiple: int = 8
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind == "bool":
                good, accepted = isinstance(value, bool), "True and False"
            elif kind == "float":
                good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
                accepted = "positive numbers"
            elif field.name == "inner_norm":
                good, accepted = value in (None, "weighted", "weightless"), "None, 'weighted', 'weightless'"
            else:
                good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                good, accepted = good or (value is None and field.name == "dt_rank"), "integers from 1"
            if not good:
                raise ValueError(f"MambaConfig: {field.name} is {value!r}; accepted are {accepted}")
        if self.dt_min > self.dt_max:
            raise ValueError(f"MambaConfig: dt_min {self.dt_min} is larger than dt_max {self.dt_max}")
        rows = -(-self.vocab_size // self.pad_vocab_multiple) * self.pad_vocab_multiple
        object.__setattr__(self, "vocab_size", rows)

    @property
    def channels(self) -> int:
        """Channels of the convolution and the scan."""
        return self.expand * self.width

    @property
    def rank(self) -> int:
        """The rank of dt: as given, or by the rule."""
        return -(-self.width // 16) if self.dt_rank is None else self.dt_rank


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 at least; the result has the dtype of the weight (of x where there is none)."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor | None = self.weight
        wide = accumulation_dtype(x, weight)
        y = F.rms_norm(x.to(wide), self.normalized_shape, None if weight is None else weight.to(wide), self.eps)
        return y.to(x.dtype if weight is None else weight.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 at least; the result has the dtype of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        wide = accumulation_dtype(x, self.weight)
        y = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(self.weight.dtype)


class CausalConv1d(nn.Module):
    """Depthwise convolution and SiLU; weight ``(channels, 1, W)`` as an ``nn.Conv1d`` holds it."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self, x: Tensor, window: Tensor | None, convolve: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """x ``(batch, T, channels)`` → the same shape, and the new window."""
        return convolve(x, self.weight.squeeze(1), self.bias, activation="silu", state=window)

    def reset_parameters(self) -> None:
        """As ``nn.Conv1d``."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class StepProjection(nn.Linear):
    """dt before softplus. The bias is added in float32 at least: it sits near -5, where bfloat16 has steps of 3 %."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y + self.bias.to(accumulation_dtype(y))  # promoted with the bias: one pass


class _Steps(NamedTuple):
    """How time is walked: everything else in a block is the same for whole, split and single-step forms."""

    convolve: Callable[..., tuple[Tensor, Tensor]]
    scan: Callable[..., tuple[Tensor, Tensor]]


def _whole(lengths: Tensor | None, cu_seqlens: Tensor | None) -> _Steps:
    return _Steps(
        partial(causal_conv1d, lengths=lengths, cu_seqlens=cu_seqlens),
        partial(selective_scan, lengths=lengths, cu_seqlens=cu_seqlens),
    )


def _convolve_one(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv1d` for T = 1, by its step form."""
    y, window = causal_conv1d_step(x[:, 0], weight, bias, **options)
    return y[:, None], window


def _scan_one(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan` for T = 1, by its step form."""
    y, ssm = selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], **options)
    return y[:, None], ssm


_ONE = _Steps(_convolve_one, _scan_one)


class MambaMixer(nn.Module):
    """What stands between two norms, with a state of its own; usable alone.

    Args:
        config: its sizes; ``vocab_size`` does not matter here, ``num_layers`` scales the initial ``out_proj``.
        bidirectional: also scan from the last step to the first, with a convolution, projections, A and D of its own
            (Vim's "v2": ``conv1d_b``, ``x_proj_b``, ``dt_proj_b``, ``A_b_log``, ``D_b``) between the shared ``in_proj``
            and ``out_proj``, and add the two. Such a mixer has no state: what comes next changes what came before.
        divide_out: bidirectional: take the mean of the two instead of their sum (Vim's ``if_divide_out``).
        layer_scale: if given, a factor ``gamma`` per output channel that starts at this value.
    """

    def __init__(
        self,
        config: MambaConfig,
        bidirectional: bool = False,
        *,
        divide_out: bool = False,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.config, self.bidirectional = config, bidirectional
        self.divide_out, self.layer_scale = divide_out, layer_scale
        channels, N, rank = config.channels, config.state_size, config.rank
        self.in_proj = nn.Linear(config.width, 2 * channels, bias=config.bias)
        for tag in ("", "_b") if bidirectional else ("",):
            self.add_module(f"conv1d{tag}", CausalConv1d(channels, config.conv_width, config.conv_bias))
            self.add_module(f"x_proj{tag}", nn.Linear(channels, rank + 2 * N, bias=False))
            self.add_module(f"dt_proj{tag}", StepProjection(rank, channels))
            self.register_parameter(f"A{tag}_log", nn.Parameter(torch.empty(channels, N)))
            self.register_parameter(f"D{tag}", nn.Parameter(torch.empty(channels)))
            if config.inner_norm is not None:
                weighted = config.inner_norm == "weighted"
                for name, size in (("dt", rank), ("b", N), ("c", N)):
                    norm = RMSNorm(size, eps=config.inner_norm_eps, elementwise_affine=weighted)
                    self.add_module(f"{name}_layernorm{tag}", norm)
        self.out_proj = nn.Linear(channels, config.width, bias=config.bias)
        if layer_scale is not None:
            self.gamma = nn.Parameter(torch.empty(config.width))
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: MambaLayerState | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, MambaLayerState | None]:
        """Read a batch of sequences, continued from ``state``.

        Args:
            x: ``(batch, T, width)``.
            state: where to continue; ``None`` means the beginning.
            lengths: ``(batch,)`` int64, right-padded rows; padding may hold anything.
            cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then has n rows.

        Returns:
            y ``(batch, T, width)``, undefined past a row's length, and the state after each row's last step
            (bidirectional: ``None``).

        Raises:
            ValueError: a wrong shape, or a state for a bidirectional mixer.
        """
        if x.dim() != 3 or x.shape[2] != self.config.width:
            raise ValueError(
                f"MambaMixer: x has shape {tuple(x.shape)}; accepted is (batch, T, width) "
                f"with width={self.config.width}"
            )
        check_ragged("MambaMixer", lengths, cu_seqlens, x.shape[0], x.shape[1], x.device)
        if lengths is not None:
            x = blank(x, valid_steps(lengths, x.shape[1]))
        steps = _whole(lengths, cu_seqlens)
        if not self.bidirectional:
            return self.mix(x, state, steps)
        if state is not None:
            raise ValueError("MambaMixer: a bidirectional mixer has no state, so none can be given")
        flip = partial(_flip, lengths=lengths, cu_seqlens=cu_seqlens)
        h, z = self.in_proj(x).chunk(2, -1)
        y, _ = self._scan(h, z, None, steps)
        backward, _ = self._scan(flip(h), flip(z), None, steps, "_b")
        y = y + flip(backward)
        return self._finish(y / 2 if self.divide_out else y), None

    def step(self, x: Tensor, state: MambaLayerState | None = None) -> tuple[Tensor, MambaLayerState]:
        """One step: x ``(batch, width)`` → y ``(batch, width)`` and the state after it.

        Raises:
            ValueError: the mixer is bidirectional.
        """
        if self.bidirectional:
            raise ValueError(
                "MambaMixer.step: a bidirectional mixer cannot take single steps: its backward scan starts at the last "
                "step, so every new one changes the outputs at all earlier ones; run forward over the whole sequence"
            )
        if x.dim() != 2 or x.shape[1] != self.config.width:
            raise ValueError(
                f"MambaMixer.step: x has shape {tuple(x.shape)}; accepted is (batch, width) "
                f"with width={self.config.width}"
            )
        y, state = self.mix(x[:, None], state, _ONE)
        return y[:, 0], state

    def mix(self, x: Tensor, state: MambaLayerState | None, steps: _Steps) -> tuple[Tensor, MambaLayerState]:
        """The forward direction, whichever way time is walked."""
        # Each half copied here once, and not by an operator forward and again backward.
        h, z = (half.contiguous() for half in self.in_proj(x).chunk(2, -1))
        y, state = self._scan(h, z, state, steps)
        return self._finish(y), state

    def _scan(
        self, h: Tensor, z: Tensor, state: MambaLayerState | None, steps: _Steps, tag: str = ""
    ) -> tuple[Tensor, MambaLayerState]:
        """Convolution and scan of one direction: h, z ``(batch, T, channels)`` → y of that shape and the new state."""
        window, ssm = (None, None) if state is None else state
        h, window = getattr(self, f"conv1d{tag}")(h, window, steps.convolve)
        N = self.config.state_size
        dt, B, C = getattr(self, f"x_proj{tag}")(h).split([self.config.rank, N, N], -1)
        if self.config.inner_norm is not None:
            dt, B, C = (
                getattr(self, f"{name}_layernorm{tag}")(value) for name, value in (("dt", dt), ("b", B), ("c", C))
            )
        dt = getattr(self, f"dt_proj{tag}")(dt)
        A_log, D = getattr(self, f"A{tag}_log"), getattr(self, f"D{tag}")
        A = -torch.exp(A_log.to(accumulation_dtype(A_log)))
        y, ssm = steps.scan(h, dt, A, B, C, D, z, dt_softplus=True, state=ssm)
        return y, MambaLayerState(window, ssm)

    def _finish(self, y: Tensor) -> Tensor:
        y = self.out_proj(y)
        return y if self.layer_scale is None else y * self.gamma

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """state-spaces' initialisation: A = -(1, 2, ..., N) in every channel, D = 1, softplus(bias of dt) log-uniform
        between ``dt_min`` and ``dt_max``, ``out_proj`` shrunk by the square root of the number of layers."""
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear | CausalConv1d | RMSNorm):
                module.reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("dt_proj"):
                if name.endswith("weight"):
                    nn.init.uniform_(parameter, -(config.rank**-0.5), config.rank**-0.5)
                else:
                    low, high = math.log(config.dt_min), math.log(config.dt_max)
                    dt = torch.exp(torch.empty_like(parameter).uniform_(low, high)).clamp(min=config.dt_floor)
                    parameter.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
            elif name in ("A_log", "A_b_log"):
                parameter.copy_(torch.arange(1, config.state_size + 1).log().expand_as(parameter))
            elif name in ("D", "D_b"):
                nn.init.ones_(parameter)
            elif name == "gamma" and self.layer_scale is not None:
                nn.init.constant_(parameter, self.layer_scale)
            elif name in ("in_proj.bias", "out_proj.bias"):
                nn.init.zeros_(parameter)
        self.out_proj.weight.div_(math.sqrt(config.num_layers))


def _flip(x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``(batch, T, ...)`` reversed in time, every sequence by itself: padding stays where it is, so it never leads."""
    if lengths is None and cu_seqlens is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    if lengths is not None:
        index = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
    else:
        assert cu_seqlens is not None
        bounds = cu_seqlens.long()
        owner = torch.searchsorted(bounds, steps, right=True) - 1
        index = (bounds[owner] + bounds[owner + 1] - 1 - steps)[None]
    return x.gather(1, index[..., None].expand_as(x))


class Block(nn.Module):
    """One layer of the stream."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = (RMSNorm if config.rms_norm else LayerNorm)(config.width, eps=config.norm_eps)
        self.mixer = MambaMixer(config)

    def forward(self, x: Tensor, state: MambaLayerState | None, steps: _Steps) -> tuple[Tensor, MambaLayerState]:
        """x ``(batch, T, width)`` → x and this layer's new state."""
        added, state = self.mixer.mix(self.norm(x), state, steps)
        return x + added, state


class BackboneConfig(Protocol):
    """What a backbone asks of its configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def rms_norm(self) -> bool: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def residual_in_fp32(self) -> bool: ...


class Backbone(nn.Module):
    """Embedding, blocks and last norm, of Mamba-2 and 3 as well.

    Args:
        config: its sizes.
        blocks: each maps x, its layer's state and a way to walk time to x and the layer's new state.
    """

    def __init__(self, config: BackboneConfig, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(blocks)
        self.norm_f = (RMSNorm if config.rms_norm else LayerNorm)(config.width, eps=config.norm_eps)
        self.residual_in_fp32 = config.residual_in_fp32
        self.grad_checkpointing = False

    def forward(self, tokens: Tensor, state: ModelState | None, steps: Any) -> tuple[Tensor, ModelState]:
        """tokens ``(batch, T)`` → what the head reads ``(batch, T, width)``, and the new state."""
        x = self.embedding(tokens)
        if self.residual_in_fp32:
            x = x.to(accumulation_dtype(x))
        new = []
        for block, old in zip(self.layers, [None] * len(self.layers) if state is None else state.layers, strict=True):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x, layer = checkpoint(block, x, old, steps, use_reentrant=False)
            else:
                x, layer = block(x, old, steps)
            new.append(layer)
        return self.norm_f(x), ModelState(tuple(new))


class Mamba(nn.Module):
    """The language model: tokens in, logits and state out."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, (Block(config) for _ in range(config.num_layers)))
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            tie_head(self)
        self.reset_parameters()

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Read a batch of sequences, continued from ``state``.

        Args:
            tokens: ids ``(batch, T)``, integer.
            state: where to continue; ``None`` means the beginning.
            lengths: ``(batch,)`` int64, right-padded rows; padding may hold any integer.
            cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then has n rows.

        Returns:
            logits ``(batch, T, vocab_size)``, undefined past a row's length, and the state after each row's last token
            (float32; float64 for a float64 model).

        Raises:
            ValueError: tokens of the wrong shape, dtype or range, or a state of another model.
        """
        if tokens.dim() != 2:
            raise ValueError(f"Mamba: tokens have shape {tuple(tokens.shape)}; accepted is (batch, T)")
        check_ragged("Mamba", lengths, cu_seqlens, tokens.shape[0], tokens.shape[1], tokens.device)
        if lengths is not None:
            tokens = blank(tokens, valid_steps(lengths, tokens.shape[1]), 0)
        return self._walk(tokens, state, _whole(lengths, cu_seqlens))

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token for every row: ids ``(batch,)`` → logits ``(batch, vocab_size)`` and the state after it."""
        if token.dim() != 1:
            raise ValueError(f"Mamba.step: token has shape {tuple(token.shape)}; accepted is (batch,)")
        logits, state = self._walk(token[:, None], state, _ONE)
        return logits[:, 0], state

    def _walk(self, tokens: Tensor, state: ModelState | None, steps: _Steps) -> tuple[Tensor, ModelState]:
        check_call(self, tokens, state, MambaLayerState)
        x, state = self.backbone(tokens, state, steps)
        return self.lm_head(x), state

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token of ``batch_size`` sequences, on the model's device: zeros."""
        config, like = self.config, self.backbone.embedding.weight
        dtype = accumulation_dtype(like)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=like.device)

        window, ssm = (config.conv_width - 1, config.channels), (config.channels, config.state_size)
        return ModelState(tuple(MambaLayerState(zeros(*window), zeros(*ssm)) for _ in range(config.num_layers)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in backward instead of keeping its activations."""
        self.backbone.grad_checkpointing = enable

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups as state-spaces marks them: A_log and D never decay, nor do norms and biases (dt's above
        all); projections, the convolution and the embedding do. A tied head is listed once, as the embedding.

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            return 1.0, weight_decay if name.endswith(".weight") and parameter.dim() >= 2 else 0.0

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """state-spaces' initialisation; see :meth:`MambaMixer.reset_parameters`."""
        self.lm_head.reset_parameters()
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)  # last: a tied head starts as the embedding
        for module in self.backbone.modules():
            if isinstance(module, MambaMixer | RMSNorm | LayerNorm):
                module.reset_parameters()
