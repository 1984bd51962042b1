"""Mamba-3 (Lahoti et al. 2026, arXiv 2603.15569), readable beside the paper's section 3 and figure 2.

Legend (B and C are the paper's matrices, so sizes are spelled out): batch, T time, width, H heads of P channels, N
state size, G groups, R rank (SISO: 1), S rotary angles, n packed sequences.

A block is x += mixer(norm x), and x += mlp(norm x) where it has one. There is no convolution: one projection makes the
gate z, the inputs x, the matrices B and C (normalised, as queries and keys are in attention), and for every head a step
size, a decay that depends on the input, a share of the trapezoid rule and the angles that turn B and C: all that
:func:`statewise.ops.mamba3` asks for. With a rank R (MIMO) every head reads R matrices B and C, and ``mimo_x``,
``mimo_z`` and ``mimo_o`` make R inputs of one, R gates of one, and one output of R. Parameters carry state-spaces'
names and shapes, so a checkpoint is read without translation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statewise.models.language_model import check_call, group_parameters, tie_head
from statewise.models.mamba import Backbone, LayerNorm, RMSNorm
from statewise.models.mamba2 import Block, GatedMLP
from statewise.ops.checks import accumulation_dtype
from statewise.ops.mamba3 import mamba3, mamba3_step
from statewise.ops.ragged import blank, check_ragged, valid_steps
from statewise.state import Mamba3State, ModelState

__all__ = ["Mamba3", "Mamba3Config", "Mamba3Mixer"]

_MLP_MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class Mamba3Config:
    """Sizes and options of a Mamba-3.

    Args:
        vocab_size: rows of the embedding and columns of the logits. It is rounded up to a multiple of
            ``pad_vocab_multiple`` when the configuration is made, as the published models do.
        num_layers: blocks.
        width: d_model.
        state_size: N, states per channel.
        head_size: P, channels per head.
        groups: G, how many B and C there are; each serves as many neighbouring heads.
        expand: channels of all heads together, per unit of width.
        mimo_rank: R; ``None`` means SISO, which is not the same as a rank of 1: MIMO turns other pairs of entries.
        rope_fraction: how much of B and C is turned: 0.5 or 1.0.
        a_activation: what makes -A of its projection: ``"heavy_tail"`` (1 + x above zero, 1/(1 - x) below; published
            code since June 2026) or ``"softplus"`` (before that, and in the paper). No tensor tells which.
        a_floor: smallest -A.
        is_outproj_norm: whether an RMSNorm over each head comes before the gate.
        mlp_width: hidden width of the gated MLP in every block (d_intermediate), rounded up to a multiple of 128 when
            the configuration is made; ``None`` means blocks without one.
        norm_eps: epsilon of every norm.
        rms_norm: RMSNorm between blocks; ``False`` means LayerNorm.
        residual_in_fp32: whether the stream between blocks stays float32 in a half-precision model.
        tie_embeddings: whether ``lm_head`` is the embedding.
        pad_vocab_multiple: see ``vocab_size``.
        dt_min, dt_max, dt_floor: initial step sizes are log-uniform between the first two, at least the third.

    Raises:
        ValueError: a value outside its range, or sizes that do not divide each other.
    """

    vocab_size: int
    num_layers: int
    width: int
    state_size: int = 128
    head_size: int = 64
    groups: int = 1
    expand: int = 2
    mimo_rank: int | None = None
    rope_fraction: float = 0.5
    a_activation: str = "heavy_tail"
    a_floor: float = 1e-4
    is_outproj_norm: bool = False
    mlp_width: int | None = None
    norm_eps: float = 1e-5
    rms_norm: bool = True
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    pad_vocab_multiple: int = 16
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if kind == "bool":
                good, accepted = isinstance(value, bool), "True and False"
            elif field.name == "rope_fraction":
                good, accepted = number and value in (0.5, 1.0), "0.5 and 1.0"
            elif field.name == "a_activation":
                good, accepted = value in ("heavy_tail", "softplus"), "'heavy_tail' and 'softplus'"
            elif kind == "float":
                good, accepted = number and 0 < value < math.inf, "positive numbers"
            else:
                good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
                good, accepted = good or (value is None and kind.endswith("None")), "integers from 1"
            if not good:
                raise ValueError(f"Mamba3Config: {field.name} is {value!r}; accepted are {accepted}")
        if self.dt_min > self.dt_max:
            raise ValueError(f"Mamba3Config: dt_min {self.dt_min} is larger than dt_max {self.dt_max}")
        for name, size, whole in (("head_size", self.head_size, self.inner), ("groups", self.groups, self.heads)):
            if whole % size:
                raise ValueError(f"Mamba3Config: {name} is {size}; accepted are divisors of {whole}")
        if not self.angles or (self.mimo_rank is not None and self.state_size % 2):
            raise ValueError(
                f"Mamba3Config: state_size is {self.state_size}; accepted are sizes of which a part of "
                f"{self.rope_fraction} holds a pair, even ones for MIMO"
            )
        object.__setattr__(self, "vocab_size", _round_up(self.vocab_size, self.pad_vocab_multiple))
        if self.mlp_width is not None:
            object.__setattr__(self, "mlp_width", _round_up(self.mlp_width, _MLP_MULTIPLE))

    @property
    def inner(self) -> int:
        """H·P: channels of all heads together."""
        return self.expand * self.width

    @property
    def heads(self) -> int:
        """H."""
        return self.inner // self.head_size

    @property
    def ranks(self) -> int:
        """R, which is 1 for SISO."""
        return 1 if self.mimo_rank is None else self.mimo_rank

    @property
    def angles(self) -> int:
        """S."""
        return int(self.state_size * self.rope_fraction) // 2


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _part(x: Tensor, *sizes: int) -> Tensor:
    """The last axis as ``sizes``, a view."""
    return x.view(*x.shape[:-1], *sizes)


def _heavy_tail(x: Tensor) -> Tensor:
    """Positive, 1 at zero, linear above and falling as 1/|x| below: a softplus that never dies out."""
    return torch.where(x >= 0, 1 + x, 1 / (1 - x.clamp(max=0)))


class HeadNorm(nn.Module):
    """RMSNorm over each head in float32 at least, gated afterwards; the result has the dtype of the weight."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.eps, self.heads = config.norm_eps, (config.heads, config.head_size)
        self.weight = nn.Parameter(torch.empty(config.inner))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y, gate ``(..., H, P)`` → the same shape."""
        wide = accumulation_dtype(y, gate, self.weight)
        y = F.rms_norm(y.to(wide), self.heads[1:], eps=self.eps) * self.weight.view(self.heads).to(wide)
        return (y * F.silu(gate.to(wide))).to(self.weight.dtype)

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)


class _Steps(NamedTuple):
    """How time is walked: everything else in a block is the same for whole, split and single-step forms."""

    scan: Callable[..., tuple[Tensor, Mamba3State]]


def _whole(lengths: Tensor | None, cu_seqlens: Tensor | None) -> _Steps:
    return _Steps(partial(mamba3, lengths=lengths, cu_seqlens=cu_seqlens))


def _scan_one(
    C: Tensor,
    B: Tensor,
    x: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    trap: Tensor,
    angles: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    D: Tensor,
    z: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Mamba3State]:
    """:func:`mamba3` for T = 1, by its step form."""
    C, B, x, log_decay, dt, trap, angles = (value[:, 0] for value in (C, B, x, log_decay, dt, trap, angles))
    gate = None if z is None else z[:, 0]
    y, state = mamba3_step(C, B, x, log_decay, dt, trap, angles, C_bias, B_bias, D, gate, **options)
    return y[:, None], state


_ONE = _Steps(_scan_one)


class Mamba3Mixer(nn.Module):
    """What stands between two norms, with a state of its own; usable alone.

    Args:
        config: its sizes; ``vocab_size`` does not matter here, ``num_layers`` scales the initial ``out_proj``.
    """

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.config = config
        heads, inner, ranks, N = config.heads, config.inner, config.ranks, config.state_size
        matrix = ranks * config.groups * N
        #: Rows of ``in_proj``: z, x, B, C, step sizes, decays, shares of the trapezoid rule, angles.
        self.rows = [inner, inner, matrix, matrix, heads, heads, heads, config.angles]
        self.in_proj = nn.Linear(config.width, sum(self.rows), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.B_bias = nn.Parameter(torch.empty(heads, ranks, N))
        self.C_bias = nn.Parameter(torch.empty(heads, ranks, N))
        self.B_norm = RMSNorm(N, eps=config.norm_eps)
        self.C_norm = RMSNorm(N, eps=config.norm_eps)
        if config.mimo_rank is not None:
            self.mimo_x = nn.Parameter(torch.empty(heads, ranks, config.head_size))
            self.mimo_z = nn.Parameter(torch.empty(heads, ranks, config.head_size))
            self.mimo_o = nn.Parameter(torch.empty(heads, ranks, config.head_size))
        self.D = nn.Parameter(torch.empty(heads))
        if config.is_outproj_norm:
            self.norm = HeadNorm(config)
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: Mamba3State | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Mamba3State]:
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
                f"Mamba3Mixer: x has shape {tuple(x.shape)}; accepted is (batch, T, width) "
                f"with width={self.config.width}"
            )
        check_ragged("Mamba3Mixer", lengths, cu_seqlens, x.shape[0], x.shape[1], x.device)
        if lengths is not None:
            x = blank(x, valid_steps(lengths, x.shape[1]))
        return self.mix(x, state, _whole(lengths, cu_seqlens))

    def step(self, x: Tensor, state: Mamba3State | None = None) -> tuple[Tensor, Mamba3State]:
        """One step: x ``(batch, width)`` → y ``(batch, width)`` and the state after it."""
        if x.dim() != 2 or x.shape[1] != self.config.width:
            raise ValueError(
                f"Mamba3Mixer.step: x has shape {tuple(x.shape)}; accepted is (batch, width) "
                f"with width={self.config.width}"
            )
        y, state = self.mix(x[:, None], state, _ONE)
        return y[:, 0], state

    def mix(self, x: Tensor, state: Mamba3State | None, steps: _Steps) -> tuple[Tensor, Mamba3State]:
        """:meth:`forward` and :meth:`step`, whichever way time is walked."""
        config = self.config
        mimo, normed = config.mimo_rank is not None, config.is_outproj_norm
        z, x, B, C, dt, A, trap, angles = self.in_proj(x).split(self.rows, -1)
        wide = accumulation_dtype(dt, self.dt_bias)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        A = (_heavy_tail if config.a_activation == "heavy_tail" else F.softplus)(A.to(wide)).clamp(min=config.a_floor)
        heads = (config.heads, config.head_size)
        matrices = (config.ranks,) * mimo + (config.groups, config.state_size)
        z = _part(z, *heads)
        options: dict[str, Any] = {}
        if mimo:
            options["mimo_x"] = self.mimo_x
            if not normed:
                options |= {"mimo_z": self.mimo_z, "mimo_o": self.mimo_o}
        y, state = steps.scan(
            self.C_norm(_part(C, *matrices)),
            self.B_norm(_part(B, *matrices)),
            _part(x, *heads),
            -A * dt,
            dt,
            trap,
            angles[:, :, None].expand(-1, -1, config.heads, -1),
            self.C_bias if mimo else self.C_bias.squeeze(1),
            self.B_bias if mimo else self.B_bias.squeeze(1),
            self.D,
            None if normed else z,
            state=state,
            **options,
        )
        if normed and mimo:  # each rank is normalised and gated by itself: y (batch, T, R, H, P)
            y = self.norm(y, z[:, :, None] * self.mimo_z.transpose(0, 1))
            y = (y * self.mimo_o.transpose(0, 1)).sum(2)
        elif normed:
            y = self.norm(y, z)
        return self.out_proj(y.flatten(-2)), state

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """state-spaces' initialisation: D and the biases of B and C are 1, softplus(dt_bias) log-uniform between
        ``dt_min`` and ``dt_max``, ranks share what comes in and their mean goes out, ``out_proj`` shrunk by the square
        root of the number of branches that add to the stream."""
        config = self.config
        for module in self.children():
            assert isinstance(module, nn.Linear | RMSNorm | HeadNorm)
            module.reset_parameters()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(config.dt_min), math.log(config.dt_max)).exp()
        dt = dt.clamp(min=config.dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        for parameter in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(parameter)
        if config.mimo_rank is not None:
            nn.init.constant_(self.mimo_x, 1 / config.mimo_rank)
            nn.init.ones_(self.mimo_z)
            nn.init.constant_(self.mimo_o, 1 / config.mimo_rank)
        self.out_proj.weight.div_(math.sqrt(_branches(config)))


def _branches(config: Mamba3Config) -> int:
    return config.num_layers * (1 if config.mlp_width is None else 2)


class Mamba3(nn.Module):
    """The language model: tokens in, logits and state out."""

    def __init__(self, config: Mamba3Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, (Block(config, Mamba3Mixer(config)) for _ in range(config.num_layers)))
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
            raise ValueError(f"Mamba3: tokens have shape {tuple(tokens.shape)}; accepted is (batch, T)")
        check_ragged("Mamba3", lengths, cu_seqlens, tokens.shape[0], tokens.shape[1], tokens.device)
        if lengths is not None:
            tokens = blank(tokens, valid_steps(lengths, tokens.shape[1]), 0)
        return self._walk(tokens, state, _whole(lengths, cu_seqlens))

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token for every row: ids ``(batch,)`` → logits ``(batch, vocab_size)`` and the state after it."""
        if token.dim() != 1:
            raise ValueError(f"Mamba3.step: token has shape {tuple(token.shape)}; accepted is (batch,)")
        logits, state = self._walk(token[:, None], state, _ONE)
        return logits[:, 0], state

    def _walk(self, tokens: Tensor, state: ModelState | None, steps: _Steps) -> tuple[Tensor, ModelState]:
        check_call(self, tokens, state, Mamba3State)
        x, state = self.backbone(tokens, state, steps)
        return self.lm_head(x), state

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token of ``batch_size`` sequences, on the model's device: zeros."""
        config, like = self.config, self.backbone.embedding.weight
        dtype = accumulation_dtype(like)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=like.device)

        heads, N = config.heads, config.state_size
        sizes = (
            (heads, config.angles),
            (heads, config.head_size, N),
            (config.ranks, heads, N),
            (heads, config.head_size),
        )
        return ModelState(tuple(Mamba3State(*[zeros(*size) for size in sizes]) for _ in range(config.num_layers)))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in backward instead of keeping its activations."""
        self.backbone.grad_checkpointing = enable

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups as state-spaces marks them: D and dt_bias never decay, nor do norms and other biases, the
        three-dimensional ones of B and C included; projections, those of MIMO too, and the embedding do. A tied head is
        listed once, as the embedding.

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            return 1.0, weight_decay if parameter.dim() >= 2 and not name.endswith("bias") else 0.0

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """state-spaces' initialisation; see :meth:`Mamba3Mixer.reset_parameters`. ``fc2`` shrinks as ``out_proj``."""
        self.lm_head.reset_parameters()
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)  # last: a tied head starts as the embedding
        for module in self.backbone.modules():
            if isinstance(module, Mamba3Mixer | RMSNorm | LayerNorm):
                module.reset_parameters()
            elif isinstance(module, GatedMLP):
                module.fc1.reset_parameters()
                module.fc2.reset_parameters()
                module.fc2.weight.div_(math.sqrt(_branches(self.config)))
