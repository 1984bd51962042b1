"""Mamba-2 (Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060), readable beside the paper's section 7.

Legend (B and C are the paper's matrices, so sizes are spelled out): batch, T time, width, H heads of P channels, N
state size, G groups, W convolution width, n packed sequences.

A block is x += mixer(norm x), and x += mlp(norm x) where it has one. One projection makes everything a mixer needs: the
gate z, the inputs x with their matrices B and C, which one convolution sees together, and a step size dt for every head
of :func:`statewise.ops.ssd`. What the heads return is gated, normalised and narrowed again. Parameters carry
state-spaces' names and shapes, so a checkpoint is read without translation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statewise.models.language_model import check_call, group_parameters, tie_head
from statewise.models.mamba import Backbone, CausalConv1d, LayerNorm, RMSNorm
from statewise.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from statewise.ops.checks import accumulation_dtype
from statewise.ops.ragged import blank, check_ragged, valid_steps
from statewise.ops.ssd import ssd, ssd_step
from statewise.state import Mamba2LayerState, ModelState

__all__ = ["Mamba2", "Mamba2Config", "Mamba2Mixer"]

_MLP_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Sizes and options of a Mamba-2.

    Args:
        vocab_size: rows of the embedding and columns of the logits. It is rounded up to a multiple of
            ``pad_vocab_multiple`` when the configuration is made, as the published models do: 50277 becomes 50288.
        num_layers: blocks.
        width: d_model.
        state_size: N, states per channel.
        head_size: P, channels per head.
        groups: G, how many B and C there are; each serves as many neighbouring heads.
        conv_width: W, samples the convolution sees.
        expand: what ``out_proj`` reads, per unit of width.
        ssm_width: how much of that the heads make (d_ssm); the rest is a gated MLP without a hidden layer of its own,
            silu(z) x, beside them. ``None`` means all.
        gated_norm: the RMSNorm where the gate is: ``"after"`` normalises what was gated, ``"before"`` normalises y,
            which is then gated, ``None`` leaves it out (``rmsnorm=False``).
        norm_groups: parts of the heads' channels that norm takes apart; ``None`` means as many as ``groups``.
        D_per_channel: whether the skip D has a weight per channel instead of one per head (``D_has_hdim``).
        dt_limit: smallest and largest step size; what softplus gives is clamped between them, in every form.
        mlp_width: hidden width of the gated MLP in every block (d_intermediate), rounded up to a multiple of 128 when
            the configuration is made; ``None`` means blocks without one.
        bias: whether ``in_proj`` and ``out_proj`` have biases.
        conv_bias: whether the convolution has one.
        norm_eps: epsilon of every norm.
        rms_norm: RMSNorm between blocks; ``False`` means LayerNorm.
        residual_in_fp32: whether the stream between blocks stays float32 in a half-precision model.
        tie_embeddings: whether ``lm_head`` is the embedding.
        pad_vocab_multiple: see ``vocab_size``.
        dt_min, dt_max, dt_floor: initial step sizes are log-uniform between the first two, at least the third.
        A_min, A_max: initial -A is uniform between these two.

    Raises:
        ValueError: a value outside its range, or sizes that do not divide each other.
    """

    vocab_size: int
    num_layers: int
    width: int
    state_size: int = 128
    head_size: int = 64
    groups: int = 1
    conv_width: int = 4
    expand: int = 2
    ssm_width: int | None = None
    gated_norm: str | None = "after"
    norm_groups: int | None = None
    D_per_channel: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    mlp_width: int | None = None
    bias: bool = False
    conv_bias: bool = True
    norm_eps: float = 1e-5
    rms_norm: bool = True
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_multiple: int = 16
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    A_min: float = 1.0
    A_max: float = 16.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            if kind == "bool":
                good, accepted = isinstance(value, bool), "True and False"
            elif kind == "float":
                good, accepted = _is_number(value) and 0 < value < math.inf, "positive numbers"
            elif field.name == "dt_limit":
                good = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value))
                good = good and 0 <= value[0] <= value[1] and value[0] < math.inf
                accepted = "two numbers, 0 ≤ smallest ≤ largest, of which the largest may be infinite"
            elif field.name == "gated_norm":
                good, accepted = value in (None, "after", "before"), "None, 'after', 'before'"
            else:
                good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                good, accepted = good or (value is None and kind.endswith("None")), "integers from 1"
            if not good:
                raise ValueError(f"Mamba2Config: {field.name} is {value!r}; accepted are {accepted}")
        for low, high in (("dt_min", "dt_max"), ("A_min", "A_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"Mamba2Config: {low} {getattr(self, low)} is larger than {high} {getattr(self, high)}"
                )
        if self.channels > self.inner:
            raise ValueError(f"Mamba2Config: ssm_width is {self.ssm_width}; accepted are at most {self.inner}")
        for name, size, whole in (
            ("head_size", self.head_size, self.channels),
            ("groups", self.groups, self.heads),
            ("norm_groups", self.norm_parts, self.channels),
        ):
            if whole % size:
                raise ValueError(f"Mamba2Config: {name} is {size}; accepted are divisors of {whole}")
        # One spelling of everything, so that equal models have equal configurations.
        if self.ssm_width == self.inner:
            object.__setattr__(self, "ssm_width", None)
        if self.norm_groups == self.groups:
            object.__setattr__(self, "norm_groups", None)
        object.__setattr__(self, "dt_limit", (float(self.dt_limit[0]), float(self.dt_limit[1])))
        object.__setattr__(self, "vocab_size", _round_up(self.vocab_size, self.pad_vocab_multiple))
        if self.mlp_width is not None:
            object.__setattr__(self, "mlp_width", _round_up(self.mlp_width, _MLP_MULTIPLE))

    @property
    def inner(self) -> int:
        """What ``out_proj`` reads."""
        return self.expand * self.width

    @property
    def channels(self) -> int:
        """H·P: channels of all heads together."""
        return self.inner if self.ssm_width is None else self.ssm_width

    @property
    def heads(self) -> int:
        """H."""
        return self.channels // self.head_size

    @property
    def conv_channels(self) -> int:
        """What the convolution sees: x, B and C beside each other."""
        return self.channels + 2 * self.groups * self.state_size

    @property
    def norm_parts(self) -> int:
        """Parts of the gated norm: as given, or by the rule."""
        return self.groups if self.norm_groups is None else self.norm_groups


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _part(x: Tensor, sizes: tuple[int, int]) -> Tensor:
    """``(..., sizes[0] * sizes[1])`` → ``(..., *sizes)``, a view."""
    return x.view(*x.shape[:-1], *sizes)


class GatedRMSNorm(nn.Module):
    """silu(gate), and an RMSNorm before or after it, in float32 at least; the result has the dtype of the weight."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.eps, self.before = config.norm_eps, config.gated_norm == "before"
        self.parts = (config.norm_parts, config.channels // config.norm_parts)
        self.weight = nn.Parameter(torch.empty(config.channels))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y, gate ``(batch, T, channels)`` → the same shape."""
        wide = accumulation_dtype(y, gate, self.weight)
        y, gate = y.to(wide), F.silu(gate.to(wide))
        if not self.before:
            y = y * gate
        y = F.rms_norm(_part(y, self.parts), self.parts[1:], eps=self.eps).flatten(-2) * self.weight.to(wide)
        if self.before:
            y = y * gate
        return y.to(self.weight.dtype)

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)


class _Steps(NamedTuple):
    """How time is walked: everything else in a block is the same for whole, split and single-step forms."""

    convolve: Callable[..., tuple[Tensor, Tensor]]
    scan: Callable[..., tuple[Tensor, Tensor]]


def _whole(lengths: Tensor | None, cu_seqlens: Tensor | None) -> _Steps:
    return _Steps(
        partial(causal_conv1d, lengths=lengths, cu_seqlens=cu_seqlens),
        partial(ssd, lengths=lengths, cu_seqlens=cu_seqlens),
    )


def _convolve_one(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`causal_conv1d` for T = 1, by its step form."""
    y, window = causal_conv1d_step(x[:, 0], weight, bias, **options)
    return y[:, None], window


def _scan_one(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """:func:`ssd` for T = 1, by its step form."""
    gate = None if z is None else z[:, 0]
    y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, gate, **options)
    return y[:, None], state


_ONE = _Steps(_convolve_one, _scan_one)


class Mamba2Mixer(nn.Module):
    """What stands between two norms, with a state of its own; usable alone.

    Args:
        config: its sizes; ``vocab_size`` does not matter here, ``num_layers`` scales the initial ``out_proj``.
    """

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        heads, channels = config.heads, config.channels
        rest = config.inner - channels
        #: Rows of ``in_proj``: gate and input of the MLP beside the heads, gate, what is convolved, step sizes.
        self.rows = [rest, rest, channels, config.conv_channels, heads]
        self.in_proj = nn.Linear(config.width, sum(self.rows), bias=config.bias)
        self.conv1d = CausalConv1d(config.conv_channels, config.conv_width, config.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(channels if config.D_per_channel else heads))
        if config.gated_norm is not None:
            self.norm = GatedRMSNorm(config)
        self.out_proj = nn.Linear(config.inner, config.width, bias=config.bias)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: Mamba2LayerState | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Mamba2LayerState]:
        """Read a batch of sequences, continued from ``state``.

        Args:
            x: ``(batch, T, width)``.
            state: where to continue; ``None`` means the beginning.
            lengths: ``(batch,)`` int64, right-padded rows; padding may hold anything.
            cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then has n rows.

        Returns:
            y ``(batch, T, width)``, undefined past a row's length, and the state after each row's last step.

        Raises:
            ValueError: a wrong shape.
        """
        if x.dim() != 3 or x.shape[2] != self.config.width:
            raise ValueError(
                f"Mamba2Mixer: x has shape {tuple(x.shape)}; accepted is (batch, T, width) "
                f"with width={self.config.width}"
            )
        check_ragged("Mamba2Mixer", lengths, cu_seqlens, x.shape[0], x.shape[1], x.device)
        if lengths is not None:
            x = blank(x, valid_steps(lengths, x.shape[1]))
        return self.mix(x, state, _whole(lengths, cu_seqlens))

    def step(self, x: Tensor, state: Mamba2LayerState | None = None) -> tuple[Tensor, Mamba2LayerState]:
        """One step: x ``(batch, width)`` → y ``(batch, width)`` and the state after it."""
        if x.dim() != 2 or x.shape[1] != self.config.width:
            raise ValueError(
                f"Mamba2Mixer.step: x has shape {tuple(x.shape)}; accepted is (batch, width) "
                f"with width={self.config.width}"
            )
        y, state = self.mix(x[:, None], state, _ONE)
        return y[:, 0], state

    def mix(self, x: Tensor, state: Mamba2LayerState | None, steps: _Steps) -> tuple[Tensor, Mamba2LayerState]:
        """:meth:`forward` and :meth:`step`, whichever way time is walked."""
        config = self.config
        window, h = (None, None) if state is None else state
        beside_gate, beside, z, seen, dt = self.in_proj(x).split(self.rows, -1)
        seen, window = self.conv1d(seen, window, steps.convolve)
        matrix = config.groups * config.state_size
        x, B, C = seen.split([config.channels, matrix, matrix], -1)
        heads, groups = (config.heads, config.head_size), (config.groups, config.state_size)
        normed = config.gated_norm is not None
        y, h = steps.scan(
            _part(x, heads),
            dt,
            -torch.exp(self.A_log.to(accumulation_dtype(self.A_log))),
            _part(B, groups),
            _part(C, groups),
            self.D.view(heads) if config.D_per_channel else self.D,
            None if normed else _part(z, heads),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=config.dt_limit,
            state=h,
        )
        y = y.flatten(-2)
        if normed:
            y = self.norm(y, z)
        if beside.shape[-1]:
            y = torch.cat([(F.silu(beside_gate) * beside).to(y.dtype), y], -1)
        return self.out_proj(y), Mamba2LayerState(window, h)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """state-spaces' initialisation: -A uniform between ``A_min`` and ``A_max``, D = 1, softplus(dt_bias)
        log-uniform between ``dt_min`` and ``dt_max``, ``out_proj`` shrunk by the square root of the number of
        branches that add to the stream."""
        config = self.config
        for module in self.children():
            assert isinstance(module, nn.Linear | CausalConv1d | GatedRMSNorm)
            module.reset_parameters()
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(config.dt_min), math.log(config.dt_max)).exp()
        dt = dt.clamp(min=config.dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        self.A_log.uniform_(config.A_min, config.A_max).log_()
        nn.init.ones_(self.D)
        self.out_proj.weight.div_(math.sqrt(_branches(config)))


def _branches(config: Mamba2Config) -> int:
    return config.num_layers * (1 if config.mlp_width is None else 2)


class GatedMLP(nn.Module):
    """y silu(gate) between two projections; ``fc1`` makes y and the gate, in this order."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x ``(batch, T, width)`` → the same shape."""
        y, gate = self.fc1(x).chunk(2, -1)
        out: Tensor = self.fc2(y * F.silu(gate))
        return out


class BlockConfig(Protocol):
    """What a block asks of its configuration."""

    @property
    def width(self) -> int: ...
    @property
    def rms_norm(self) -> bool: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def mlp_width(self) -> int | None: ...


class Block(nn.Module):
    """One layer of the stream, of Mamba-3 as well: a mixer, and an MLP if ``mlp_width`` says so."""

    def __init__(self, config: BlockConfig, mixer: nn.Module) -> None:
        super().__init__()
        norm = RMSNorm if config.rms_norm else LayerNorm
        self.norm = norm(config.width, eps=config.norm_eps)
        self.mixer: Any = mixer
        self.has_mlp = config.mlp_width is not None
        if config.mlp_width is not None:
            self.norm2 = norm(config.width, eps=config.norm_eps)
            self.mlp = GatedMLP(config.width, config.mlp_width)

    def forward(self, x: Tensor, state: Any, steps: Any) -> tuple[Tensor, Any]:
        """x ``(batch, T, width)`` → x and this layer's new state."""
        added, state = self.mixer.mix(self.norm(x), state, steps)
        x = x + added
        if self.has_mlp:
            x = x + self.mlp(self.norm2(x))
        return x, state


class Mamba2(nn.Module):
    """The language model: tokens in, logits and state out."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, (Block(config, Mamba2Mixer(config)) for _ in range(config.num_layers)))
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
            raise ValueError(f"Mamba2: tokens have shape {tuple(tokens.shape)}; accepted is (batch, T)")
        check_ragged("Mamba2", lengths, cu_seqlens, tokens.shape[0], tokens.shape[1], tokens.device)
        if lengths is not None:
            tokens = blank(tokens, valid_steps(lengths, tokens.shape[1]), 0)
        return self._walk(tokens, state, _whole(lengths, cu_seqlens))

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token for every row: ids ``(batch,)`` → logits ``(batch, vocab_size)`` and the state after it."""
        if token.dim() != 1:
            raise ValueError(f"Mamba2.step: token has shape {tuple(token.shape)}; accepted is (batch,)")
        logits, state = self._walk(token[:, None], state, _ONE)
        return logits[:, 0], state

    def _walk(self, tokens: Tensor, state: ModelState | None, steps: _Steps) -> tuple[Tensor, ModelState]:
        check_call(self, tokens, state, Mamba2LayerState)
        x, state = self.backbone(tokens, state, steps)
        return self.lm_head(x), state

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token of ``batch_size`` sequences, on the model's device: zeros."""
        config, like = self.config, self.backbone.embedding.weight
        dtype = accumulation_dtype(like)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=like.device)

        window = (config.conv_width - 1, config.conv_channels)
        heads = (config.heads, config.head_size, config.state_size)
        return ModelState(tuple(Mamba2LayerState(zeros(*window), zeros(*heads)) for _ in range(config.num_layers)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in backward instead of keeping its activations."""
        self.backbone.grad_checkpointing = enable

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups as state-spaces marks them: A_log, D and dt_bias never decay, nor do norms and biases;
        projections, the convolution and the embedding do. A tied head is listed once, as the embedding.

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            return 1.0, weight_decay if parameter.dim() >= 2 else 0.0

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """state-spaces' initialisation; see :meth:`Mamba2Mixer.reset_parameters`. ``fc2`` shrinks as ``out_proj``."""
        self.lm_head.reset_parameters()
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)  # last: a tied head starts as the embedding
        for module in self.backbone.modules():
            if isinstance(module, Mamba2Mixer | RMSNorm | LayerNorm):
                module.reset_parameters()
            elif isinstance(module, GatedMLP):
                module.fc1.reset_parameters()
                module.fc2.reset_parameters()
                module.fc2.weight.div_(math.sqrt(_branches(self.config)))
