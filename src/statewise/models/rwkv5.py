"""RWKV-5 "Eagle" (Peng et al. 2024, arXiv 2404.05892), readable beside the paper's section 4.1.

Legend: B batch, T time, C width, H heads, N head size (K = V = N), M mixtures, n packed sequences.

A block is x += att(ln1 x); x += ffn(ln2 x). Both parts mix every channel with that of the token before (token shift);
`att` remembers keys and values in a matrix per head, :func:`statewise.ops.wkv6` with a decay that time does not change.
Parameters carry the published files' names and shapes, so a checkpoint is read without translation.

Three generations were published, the last of which is the paper's:

    5.0   decay and bonus per head, `time_decay` and `time_first` (H,), u = exp(time_first)
    5.1   a gate, `time_mix_g` and `gate.weight`; the bonus is `time_faaaa` (H,), u itself
    5.2   decay and bonus per key row, `time_decay` and `time_faaaa` (H, N)
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
from torch.utils.checkpoint import checkpoint

from statewise.models.language_model import check_call, group_parameters
from statewise.models.learned_state import first_wkv
from statewise.models.mixing import for_projections, mix_one
from statewise.ops.checks import accumulation_dtype
from statewise.ops.ragged import blank, check_ragged, valid_steps
from statewise.ops.token_mix import token_mix
from statewise.ops.wkv6 import wkv6, wkv6_step
from statewise.state import ModelState, RWKV5LayerState

__all__ = ["RWKV5", "RWKV5Config"]

_VERSIONS = ("5.0", "5.1", "5.2")
#: Published code divides by 8 what it normalises with an eps of 1e-5: the same as 8² times that eps. Fixed, whatever
#: the head size.
_GROUP_NORM_EPS = 64e-5


@dataclasses.dataclass(frozen=True)
class RWKV5Config:
    """Sizes of an RWKV-5.

    Args:
        vocab_size: rows of the embedding and columns of the logits.
        num_layers: blocks.
        width: channels C; a multiple of ``head_size``.
        head_size: N; 64 in every release.
        ffn_width: hidden channels of the channel mixing; ``None`` means 3.5·width rounded down to a multiple of 32, at
            least 32.
        version: ``"5.0"``, ``"5.1"`` or ``"5.2"``: see the top of this file.
        learned_state: every block's `att` holds `time_state` (H, N, N), from which its recurrence begins where no state
            is given: what :mod:`statewise.training.state_tuning` learns. Its axes are the files', (H, V, K).

    Raises:
        ValueError: a size that is no positive integer, a width that heads do not divide, or an unknown version.
    """

    vocab_size: int
    num_layers: int
    width: int
    head_size: int = 64
    ffn_width: int | None = None
    version: str = "5.2"
    learned_state: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "width", "head_size", "ffn_width"):
            value = getattr(self, name)
            if value is None and name == "ffn_width":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"RWKV5Config: {name} is {value!r}; accepted are integers from 1")
        if self.width % self.head_size:
            raise ValueError(
                f"RWKV5Config: width {self.width} is not a multiple of head_size {self.head_size}; "
                "give a head_size that divides it"
            )
        if not isinstance(self.learned_state, bool):
            raise ValueError(f"RWKV5Config: learned_state is {self.learned_state!r}; accepted are True and False")
        if self.version not in _VERSIONS:
            raise ValueError(
                f"RWKV5Config: version is {self.version!r}; accepted are {', '.join(map(repr, _VERSIONS))}"
            )


class _Steps(NamedTuple):
    """How time is walked: everything else in a block is the same for whole, split and single-step forms."""

    mix: Callable[..., tuple[tuple[Tensor, ...], Tensor]]
    wkv: Callable[..., tuple[Tensor, Tensor]]
    rows: int  # of a state


def _single(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`wkv6` with a constant decay for T = 1, by its step form."""
    y, state = wkv6_step(r[:, 0], log_w, k[:, 0], v[:, 0], u, state)
    return y[:, None], state


def _from_before(*shares: Tensor) -> Tensor:
    """``(M, C)``: what is left to the token before where ``shares`` ``(1, 1, C)`` say how much of a mixture is this
    token's."""
    return 1 - torch.cat(shares).flatten(1)


class TimeMix(nn.Module):
    """The recurrence and what feeds it. Submodules are projections without bias, `ln_x` one group per head."""

    def __init__(self, config: RWKV5Config) -> None:
        super().__init__()
        C, N = config.width, config.head_size
        self.heads, self.head_size = C // N, N
        self.gated = config.version != "5.0"
        rates = (self.heads, N) if config.version == "5.2" else (self.heads,)
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.time_decay = nn.Parameter(torch.empty(rates))  # log_w = -exp(time_decay): a decay below 1 in any case
        if self.gated:
            self.time_mix_g = nn.Parameter(torch.empty(1, 1, C))
            self.time_faaaa = nn.Parameter(torch.empty(rates))  # u: how much of the present token is read
            self.gate = nn.Linear(C, C, bias=False)
        else:
            self.time_first = nn.Parameter(torch.empty(rates))  # log u
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.time_state = nn.Parameter(torch.empty(self.heads, N, N)) if config.learned_state else None
        self.ln_x = nn.GroupNorm(self.heads, C, eps=_GROUP_NORM_EPS)

    def forward(
        self, x: Tensor, shift: Tensor | None, wkv: Tensor | None, steps: _Steps
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x ``(B, T, C)`` → what it adds to the stream, and the new shift and wkv states."""
        shares = [self.time_mix_k, self.time_mix_v, self.time_mix_r, *([self.time_mix_g] if self.gated else [])]
        (xk, xv, xr, *rest), shift = steps.mix(x, _from_before(*shares), shift)
        r, k, v = (self._per_head(z) for z in (self.receptance(xr), self.key(xk), self.value(xv)))  # (B, T, H, N)
        # Decay in float32 at least: its rounding error is raised to the power of the distance it has to bridge.
        wide = accumulation_dtype(self.time_decay)
        log_w = -torch.exp(self.time_decay.to(wide))
        u = self.time_faaaa if self.gated else torch.exp(self.time_first.to(wide))
        wkv = first_wkv(self.time_state, steps.rows) if wkv is None else wkv
        y, wkv = steps.wkv(r, log_w, k, v, u, wkv)
        y = self.ln_x(y.reshape(-1, x.shape[-1])).reshape(x.shape)
        if self.gated:
            y = y * F.silu(self.gate(rest[0]))
        return self.output(y), shift, wkv

    def _per_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, self.head_size)


class ChannelMix(nn.Module):
    """sigmoid(receptance(mixture)) · value(relu(key(mixture))²), as in RWKV-4."""

    def __init__(self, config: RWKV5Config) -> None:
        super().__init__()
        C = config.width
        hidden = config.ffn_width or max(int(3.5 * C) // 32 * 32, 32)
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, hidden, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor, shift: Tensor | None, steps: _Steps) -> tuple[Tensor, Tensor]:
        """x ``(B, T, C)`` → what it adds to the stream, and the new shift state."""
        (xk, xr), shift = steps.mix(x, _from_before(self.time_mix_k, self.time_mix_r), shift)
        hidden = torch.relu(self.key(xk)).square()
        return torch.sigmoid(self.receptance(xr)) * self.value(hidden), shift


class Block(nn.Module):
    """One layer; the first also normalises the embedding."""

    def __init__(self, config: RWKV5Config, layer: int) -> None:
        super().__init__()
        self.first = layer == 0
        if self.first:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(self, x: Tensor, state: RWKV5LayerState | None, steps: _Steps) -> tuple[Tensor, RWKV5LayerState]:
        """x ``(B, T, C)`` → x and this layer's new state. What is shifted is the normed input, not the stream."""
        att_shift, wkv, ffn_shift = (None, None, None) if state is None else state
        if self.first:
            x = self.ln0(x)
        added, att_shift, wkv = self.att(for_projections(self.ln1(x)), att_shift, wkv, steps)
        x = x + added
        added, ffn_shift = self.ffn(for_projections(self.ln2(x)), ffn_shift, steps)
        return x + added, RWKV5LayerState(att_shift, wkv, ffn_shift)


class RWKV5(nn.Module):
    """The language model: tokens in, logits and state out."""

    def __init__(self, config: RWKV5Config) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.ln_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.grad_checkpointing = False
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
            tokens: ids ``(B, T)``, integer.
            state: where to continue; ``None`` means the beginning, as :meth:`init_state` gives it.
            lengths: ``(B,)`` int64, right-padded rows; padding may hold any integer.
            cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then has n rows.

        Returns:
            logits ``(B, T, vocab_size)``, undefined past a row's length, and the state after each row's last token
            (float32; float64 for a float64 model).

        Raises:
            ValueError: tokens of the wrong shape, dtype or range, or a state of another model.
        """
        if tokens.dim() != 2:
            raise ValueError(f"RWKV5: tokens have shape {tuple(tokens.shape)}; accepted is (B, T)")
        rows = check_ragged("RWKV5", lengths, cu_seqlens, tokens.shape[0], tokens.shape[1], tokens.device)
        if lengths is not None:
            tokens = blank(tokens, valid_steps(lengths, tokens.shape[1]), 0)
        steps = _Steps(
            partial(token_mix, lengths=lengths, cu_seqlens=cu_seqlens),
            partial(wkv6, lengths=lengths, cu_seqlens=cu_seqlens),
            rows,
        )
        return self._walk(tokens, state, steps)

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token for every row: ids ``(B,)`` → logits ``(B, vocab_size)`` and the state after it."""
        if token.dim() != 1:
            raise ValueError(f"RWKV5.step: token has shape {tuple(token.shape)}; accepted is (B,)")
        logits, state = self._walk(token[:, None], state, _Steps(mix_one, _single, len(token)))
        return logits[:, 0], state

    def _walk(self, tokens: Tensor, state: ModelState | None, steps: _Steps) -> tuple[Tensor, ModelState]:
        check_call(self, tokens, state, RWKV5LayerState)
        x = self.emb(tokens)
        new = []
        for block, old in zip(self.blocks, [None] * len(self.blocks) if state is None else state.layers, strict=True):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x, layer = checkpoint(block, x, old, steps, use_reentrant=False)
            else:
                x, layer = block(x, old, steps)
            new.append(layer)
        return self.head(self.ln_out(x)), ModelState(tuple(new))

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token of ``batch_size`` sequences, on the model's device: zeros, or what was
        learnt (``config.learned_state``), through which gradients pass."""
        C, N = self.config.width, self.config.head_size
        like = self.emb.weight
        dtype = accumulation_dtype(like)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=like.device)

        block: Any  # or what a Block was wrapped in
        layers = []
        for block in self.blocks:
            wkv = first_wkv(block.att.time_state, batch_size)
            layers.append(RWKV5LayerState(zeros(C), zeros(C // N, N, N) if wkv is None else wkv, zeros(C)))
        return ModelState(tuple(layers))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The official optimiser groups: `time_decay` at twice the rate, 5.0's `time_first` at three times; decay on
        matrices named ``.weight`` and on `time_state`.

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """
        scales = {"time_decay": 2.0, "time_first": 3.0}

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            decays = (name.endswith(".weight") and parameter.squeeze().dim() >= 2) or name.endswith("time_state")
            return scales.get(name.rpartition(".")[2], 1.0), weight_decay if decays else 0.0

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of RWKV-LM's `RWKV-v5` (5.0 and 5.1: of its `RWKV-v4neo`); with one layer or one head,
        where it would divide by zero, that one counts as the first of many."""
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        rows, columns = self.head.weight.shape
        nn.init.orthogonal_(self.head.weight, gain=0.5 * math.sqrt(max(rows / columns, 1)))
        self.ln_out.reset_parameters()
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            _reset_block(block, layer, self.config)


def _reset_block(block: Block, layer: int, config: RWKV5Config) -> None:
    C, depth = config.width, config.num_layers
    rising = layer / max(depth - 1, 1)  # 0 → 1 over layers
    falling = 1 - layer / depth  # 1 → 0
    share = torch.arange(C, dtype=torch.float32) / C
    att, ffn = block.att, block.ffn
    n = torch.arange(att.time_decay.numel(), dtype=torch.float32)  # channels, or heads before 5.2
    ramp = n / max(len(n) - 1, 1)
    vectors = {
        # From rows that remember for long (small n) to rows that forget sooner.
        att.time_decay: -6 + 5 * ramp ** (0.7 + 1.3 * rising),
        att.time_mix_k: share**falling,
        att.time_mix_v: share**falling + 0.3 * rising,
        att.time_mix_r: share ** (0.5 * falling),
        ffn.time_mix_k: share**falling,
        ffn.time_mix_r: share**falling,
    }
    if att.gated:
        vectors[att.time_mix_g] = share ** (0.5 * falling)
        zigzag = 0.1 * ((n + 1) % 3 - 1) if config.version == "5.2" else 0.0
        vectors[att.time_faaaa] = rising * (1 - ramp) + zigzag
        nn.init.orthogonal_(att.gate.weight, gain=0.1)
    else:
        vectors[att.time_first] = torch.full_like(n, -3.0)
    for parameter, value in vectors.items():
        parameter.copy_(value.view_as(parameter))
    nn.init.orthogonal_(att.receptance.weight)
    nn.init.orthogonal_(att.key.weight, gain=0.1)
    nn.init.orthogonal_(att.value.weight)
    nn.init.orthogonal_(ffn.key.weight)
    # A block starts as the identity: what leaves either half is zero until trained.
    for projection in (att.output, ffn.receptance, ffn.value):
        nn.init.zeros_(projection.weight)
    for norm in (block.ln1, block.ln2, *([block.ln0] if block.first else [])):
        norm.reset_parameters()
    nn.init.constant_(att.ln_x.weight, ((1 + layer) / depth) ** 0.7)
    nn.init.zeros_(att.ln_x.bias)
    if att.time_state is not None:
        nn.init.zeros_(att.time_state)
