"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048), annotated: read it beside the paper's section 3 and appendix.

Legend: B batch, T time, C width, n packed sequences.

A transformer block asks "which earlier tokens do I attend to?"; an RWKV-4 block keeps a running average instead. Its
two halves are

    time mixing     x += output(sigmoid(r) * wkv(k, v))        what the past holds that I want
    channel mixing  x += sigmoid(r) * value(relu(key)^2)       what I make of it

and in both, every input is first mixed with the same channel of the token before ("token shift"). The only memory is
therefore five vectors a block: the last input of either half, and the average as (numerator, denominator, maximum).

Parameters carry the published files' names and shapes, so a checkpoint is read without translation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statewise.models.language_model import check_call, group_parameters
from statewise.models.mixing import for_projections, mix_one
from statewise.ops.checks import accumulation_dtype
from statewise.ops.ragged import blank, check_ragged, valid_steps
from statewise.ops.token_mix import token_mix
from statewise.ops.wkv4 import wkv4, wkv4_step
from statewise.state import ModelState, RWKV4LayerState, WKV4State

__all__ = ["RWKV4", "RWKV4Config"]


@dataclasses.dataclass(frozen=True)
class RWKV4Config:
    """Sizes of an RWKV-4.

    Args:
        vocab_size: rows of the embedding and columns of the logits.
        num_layers: blocks.
        width: channels C.
        ffn_width: hidden channels of the channel mixing; ``None`` means 4·width.

    Raises:
        ValueError: a size that is no positive integer.
    """

    vocab_size: int
    num_layers: int
    width: int
    ffn_width: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"RWKV4Config: {field.name} is {value!r}; accepted are integers from 1")


class _Steps(NamedTuple):
    """How time is walked: everything else in a block is the same for whole, split and single-step forms."""

    mix: Callable[..., tuple[tuple[Tensor, ...], Tensor]]
    wkv: Callable[..., tuple[Tensor, WKV4State]]


def _single(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: WKV4State | None) -> tuple[Tensor, WKV4State]:
    """:func:`wkv4` for T = 1, by its step form."""
    y, state = wkv4_step(k[:, 0], v[:, 0], log_w, u, state)
    return y[:, None], state


def _from_before(*shares: Tensor) -> Tensor:
    """``(M, C)``: what is left to the token before where ``shares`` ``(1, 1, C)`` say how much of a mixture is this
    token's."""
    return 1 - torch.cat(shares).flatten(1)


class TimeMix(nn.Module):
    """Paper eq. 11-17: keys and values enter the average, the receptance decides what is let out."""

    def __init__(self, config: RWKV4Config) -> None:
        super().__init__()
        C = config.width
        self.time_decay = nn.Parameter(torch.empty(C))  # log_w = -exp(time_decay): a decay below 1 whatever is learnt
        self.time_first = nn.Parameter(torch.empty(C))  # u: what the present token's key gets on top
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)

    def forward(
        self, x: Tensor, shift: Tensor | None, wkv: WKV4State | None, steps: _Steps
    ) -> tuple[Tensor, Tensor, WKV4State]:
        """x ``(B, T, C)`` → what it adds to the stream, and the new shift and wkv states."""
        mix = _from_before(self.time_mix_k, self.time_mix_v, self.time_mix_r)
        (xk, xv, xr), shift = steps.mix(x, mix, shift)
        k, v, r = self.key(xk), self.value(xv), self.receptance(xr)
        # Decay in float32 at least: its rounding error is raised to the power of the distance it has to bridge.
        log_w = -torch.exp(self.time_decay.to(accumulation_dtype(self.time_decay)))
        y, wkv = steps.wkv(k, v, log_w, self.time_first, wkv)
        return self.output(torch.sigmoid(r) * y), shift, wkv


class ChannelMix(nn.Module):
    """Paper eq. 18-20: the feed-forward half, with a gate and a squared ReLU."""

    def __init__(self, config: RWKV4Config) -> None:
        super().__init__()
        C, hidden = config.width, config.ffn_width or 4 * config.width
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

    def __init__(self, config: RWKV4Config, layer: int) -> None:
        super().__init__()
        self.first = layer == 0
        if self.first:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(self, x: Tensor, state: RWKV4LayerState | None, steps: _Steps) -> tuple[Tensor, RWKV4LayerState]:
        """x ``(B, T, C)`` → x and this layer's new state. What is shifted is the normed input, not the stream."""
        att_shift, wkv, ffn_shift = (None, None, None) if state is None else state
        if self.first:
            x = self.ln0(x)
        added, att_shift, wkv = self.att(for_projections(self.ln1(x)), att_shift, wkv, steps)
        x = x + added
        added, ffn_shift = self.ffn(for_projections(self.ln2(x)), ffn_shift, steps)
        return x + added, RWKV4LayerState(att_shift, wkv, ffn_shift)


class RWKV4(nn.Module):
    """The language model: tokens in, logits and state out."""

    def __init__(self, config: RWKV4Config) -> None:
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
            state: where to continue; ``None`` means the beginning.
            lengths: ``(B,)`` int64, right-padded rows; padding may hold any integer.
            cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then has n rows.

        Returns:
            logits ``(B, T, vocab_size)``, undefined past a row's length, and the state after each row's last token
            (float32; float64 for a float64 model).

        Raises:
            ValueError: tokens of the wrong shape, dtype or range, or a state of another model.
        """
        if tokens.dim() != 2:
            raise ValueError(f"RWKV4: tokens have shape {tuple(tokens.shape)}; accepted is (B, T)")
        check_ragged("RWKV4", lengths, cu_seqlens, tokens.shape[0], tokens.shape[1], tokens.device)
        if lengths is not None:
            tokens = blank(tokens, valid_steps(lengths, tokens.shape[1]), 0)
        steps = _Steps(
            partial(token_mix, lengths=lengths, cu_seqlens=cu_seqlens),
            partial(wkv4, lengths=lengths, cu_seqlens=cu_seqlens),
        )
        return self._walk(tokens, state, steps)

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token for every row: ids ``(B,)`` → logits ``(B, vocab_size)`` and the state after it."""
        if token.dim() != 1:
            raise ValueError(f"RWKV4.step: token has shape {tuple(token.shape)}; accepted is (B,)")
        logits, state = self._walk(token[:, None], state, _Steps(mix_one, _single))
        return logits[:, 0], state

    def _walk(self, tokens: Tensor, state: ModelState | None, steps: _Steps) -> tuple[Tensor, ModelState]:
        check_call(self, tokens, state, RWKV4LayerState)
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
        """The state before the first token of ``batch_size`` sequences: empty sums, whose maximum is -inf."""
        like = self.emb.weight
        dtype = accumulation_dtype(like)

        def full(value: float) -> Tensor:
            return torch.full((batch_size, self.config.width), value, dtype=dtype, device=like.device)

        return ModelState(
            tuple(RWKV4LayerState(full(0), WKV4State(full(0), full(0), full(-math.inf)), full(0)) for _ in self.blocks)
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups: official RWKV-4 has one rate and no decay; a decay asked for reaches matrices alone.

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            return 1.0, weight_decay if name.endswith(".weight") and parameter.dim() >= 2 else 0.0

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of RWKV-LM's `RWKV-v4`; with one layer, where it would divide by zero, that layer counts
        as the first of many."""
        nn.init.orthogonal_(self.emb.weight, gain=1e-4 * math.sqrt(max(self.emb.weight.shape)))
        _orthogonal(self.head.weight, 0.5)
        self.ln_out.reset_parameters()
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            _reset_block(block, layer, self.config)


def _orthogonal(weight: Tensor, scale: float) -> None:
    rows, columns = weight.shape
    nn.init.orthogonal_(weight, gain=scale * math.sqrt(max(rows / columns, 1)))


def _reset_block(block: Block, layer: int, config: RWKV4Config) -> None:
    C, depth = config.width, config.num_layers
    rising = layer / max(depth - 1, 1)  # 0 → 1 over layers
    falling = 1 - layer / depth  # 1 → 0
    n = torch.arange(C, dtype=torch.float32)
    share = n / C
    att, ffn = block.att, block.ffn
    vectors = {
        # From channels that remember for long (small n) to channels that forget at once.
        att.time_decay: -5 + 8 * (n / max(C - 1, 1)) ** (0.7 + 1.3 * rising),
        # A zigzag breaks the symmetry between neighbouring channels.
        att.time_first: math.log(0.3) + 0.5 * ((n + 1) % 3 - 1),
        att.time_mix_k: share**falling,
        att.time_mix_v: share**falling + 0.3 * rising,
        att.time_mix_r: share ** (0.5 * falling),
        ffn.time_mix_k: share**falling,
        ffn.time_mix_r: share**falling,
    }
    for parameter, value in vectors.items():
        parameter.copy_(value.expand_as(parameter))
    # A block starts as the identity: what leaves either half is zero until trained.
    for projection in (att.key, att.receptance, att.output, ffn.receptance, ffn.value):
        nn.init.zeros_(projection.weight)
    _orthogonal(att.value.weight, 1.0)
    _orthogonal(ffn.key.weight, 1.0)
    for norm in (block.ln1, block.ln2, *([block.ln0] if block.first else [])):
        norm.reset_parameters()
