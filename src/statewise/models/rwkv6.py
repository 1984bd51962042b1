"""RWKV-6 "Finch" (Peng et al. 2024, arXiv 2404.05892), readable beside the paper's section 4.2.

Legend: B batch, T time, C width, H heads, N head size (K = V = N), D rank of a low-rank pair, n packed sequences.

A block is x += att(ln1 x); x += ffn(ln2 x). Both parts mix every channel with that of the token before (token shift);
in `att` the token itself has a say in how much, and in how fast each key row of the recurrence
:func:`statewise.ops.wkv6` forgets. Parameters carry the published files' names and shapes (x060), so a checkpoint is
read without translation.
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
from statewise.ops.token_shift import token_shift, token_shift_step
from statewise.ops.wkv6 import wkv6, wkv6_step
from statewise.state import ModelState, RWKV6LayerState

__all__ = ["RWKV6", "RWKV6Config"]

#: Published code multiplies an eps of 1e-5 by 8², whatever the head size.
_GROUP_NORM_EPS = 64e-5
#: The mixtures whose shares a token decides about, in the order of `time_maa_w1` and `time_maa_w2`.
_MIXTURES = ("w", "k", "v", "r", "g")


@dataclasses.dataclass(frozen=True)
class RWKV6Config:
    """Sizes of an RWKV-6.

    Args:
        vocab_size: rows of the embedding and columns of the logits.
        num_layers: blocks.
        width: channels C; a multiple of ``head_size``.
        head_size: N; 64 in every release.
        ffn_width: hidden channels of the channel mixing; ``None`` means 3.5·width rounded down to a multiple of 32, at
            least 32.
        mix_rank: rank of `time_maa_w1`, `time_maa_w2`, for each of five mixtures; ``None`` means 32, and 64 from width
            4096 on, as released.
        decay_rank: rank of `time_decay_w1`, `time_decay_w2`; ``None`` means twice the former rule, 64 or 128.
        learned_state: every block's `att` holds `time_state` (H, N, N), from which its recurrence begins where no state
            is given: what :mod:`statewise.training.state_tuning` learns. Its axes are the files', (H, V, K).

    Raises:
        ValueError: a size that is no positive integer, or a width that heads do not divide.
    """

    vocab_size: int
    num_layers: int
    width: int
    head_size: int = 64
    ffn_width: int | None = None
    mix_rank: int | None = None
    decay_rank: int | None = None
    learned_state: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.learned_state, bool):
            raise ValueError(f"RWKV6Config: learned_state is {self.learned_state!r}; accepted are True and False")
        for field in dataclasses.fields(self)[:-1]:
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"RWKV6Config: {field.name} is {value!r}; accepted are integers from 1")
        if self.width % self.head_size:
            raise ValueError(
                f"RWKV6Config: width {self.width} is not a multiple of head_size {self.head_size}; "
                "give a head_size that divides it"
            )

    def rank(self, name: str) -> int:
        """The rank of the pair ``"mix"`` or ``"decay"``: as given, or by the rule."""
        given: int | None = getattr(self, f"{name}_rank")
        if given is not None:
            return given
        return {"mix": 32, "decay": 64}[name] * (2 if self.width >= 4096 else 1)


class _Steps(NamedTuple):
    """How time is walked: everything else in a block is the same for whole, split and single-step forms."""

    shift: Callable[..., tuple[Tensor, Tensor]]
    mix: Callable[..., tuple[tuple[Tensor, ...], Tensor]]
    wkv: Callable[..., tuple[Tensor, Tensor]]
    rows: int  # of a state


def _shift_one(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`token_shift` for T = 1, by its step form."""
    before, last = token_shift_step(x[:, 0], state)
    return before[:, None], last


def _single(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`wkv6` for T = 1, by its step form."""
    y, state = wkv6_step(r[:, 0], log_w[:, 0], k[:, 0], v[:, 0], u, state)
    return y[:, None], state


class TimeMix(nn.Module):
    """The recurrence and what feeds it. Submodules are projections without bias, `ln_x` one group per head."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        C, N = config.width, config.head_size
        self.heads, self.head_size = C // N, N

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        # How much of the token before each mixture takes: x of the one that decides, then those decided about.
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(), vector(), vector()
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(), vector(), vector()
        rank = config.rank("mix")
        self.time_maa_w1 = nn.Parameter(torch.empty(C, len(_MIXTURES) * rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(_MIXTURES), rank, C))
        rank = config.rank("decay")
        self.time_decay = vector()  # log_w = -exp(time_decay + what the token adds): a decay below 1 in any case
        self.time_decay_w1 = nn.Parameter(torch.empty(C, rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(rank, C))
        self.time_faaaa = nn.Parameter(torch.empty(self.heads, N))  # u: how much of the present token is read
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C, bias=False)
        self.time_state = nn.Parameter(torch.empty(self.heads, N, N)) if config.learned_state else None
        self.ln_x = nn.GroupNorm(self.heads, C, eps=_GROUP_NORM_EPS)

    def forward(
        self, x: Tensor, shift: Tensor | None, wkv: Tensor | None, steps: _Steps
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x ``(B, T, C)`` → what it adds to the stream, and the new shift and wkv states."""
        before, shift = steps.shift(x, shift)
        xw, xk, xv, xr, xg = self._mixtures(x, before)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # Decay in float32 at least: its rounding error is raised to the power of the distance it has to bridge.
        w = torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        wide = accumulation_dtype(w)
        log_w = -torch.exp(self.time_decay.to(wide) + w.to(wide))
        r, log_w, k, v = (self._per_head(z) for z in (r, log_w, k, v))  # (B, T, H, N)
        wkv = first_wkv(self.time_state, steps.rows) if wkv is None else wkv
        y, wkv = steps.wkv(r, log_w, k, v, self.time_faaaa, wkv)
        y = self.ln_x(y.reshape(-1, x.shape[-1])).reshape(x.shape)
        return self.output(y * F.silu(self.gate(xg))), shift, wkv

    def _mixtures(self, x: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        """``(B, T, C)`` for each of w, k, v, r, g: by shares that a low-rank pair decides for every token anew."""
        wide = accumulation_dtype(x, self.time_maa_x)
        here = x.to(wide)
        change = before.to(wide) - here
        deciding = (here + change * self.time_maa_x.to(wide)).to(x.dtype)
        hidden = torch.tanh(deciding @ self.time_maa_w1)  # (B, T, 5D), a rank beside the other
        hidden = hidden.reshape(-1, *self.time_maa_w2.shape[:2]).transpose(0, 1)  # (5, BT, D)
        decided = torch.bmm(hidden, self.time_maa_w2).reshape(len(_MIXTURES), *x.shape)
        shares = [getattr(self, f"time_maa_{name}") for name in _MIXTURES]
        return tuple(
            (here + change * (share.to(wide) + more.to(wide))).to(x.dtype)
            for share, more in zip(shares, decided.unbind(0), strict=True)
        )

    def _per_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, self.head_size)


class ChannelMix(nn.Module):
    """sigmoid(receptance(mixture)) · value(relu(key(mixture))²), as in its ancestors."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        C = config.width
        hidden = config.ffn_width or max(int(3.5 * C) // 32 * 32, 32)
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, hidden, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(hidden, C, bias=False)

    def forward(self, x: Tensor, shift: Tensor | None, steps: _Steps) -> tuple[Tensor, Tensor]:
        """x ``(B, T, C)`` → what it adds to the stream, and the new shift state."""
        (xk, xr), shift = steps.mix(x, torch.cat([self.time_maa_k, self.time_maa_r]).flatten(1), shift)
        hidden = torch.relu(self.key(xk)).square()
        return torch.sigmoid(self.receptance(xr)) * self.value(hidden), shift


class Block(nn.Module):
    """One layer; the first also normalises the embedding."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__()
        self.first = layer == 0
        if self.first:
            self.ln0 = nn.LayerNorm(config.width)
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(self, x: Tensor, state: RWKV6LayerState | None, steps: _Steps) -> tuple[Tensor, RWKV6LayerState]:
        """x ``(B, T, C)`` → x and this layer's new state. What is shifted is the normed input, not the stream."""
        att_shift, wkv, ffn_shift = (None, None, None) if state is None else state
        if self.first:
            x = self.ln0(x)
        added, att_shift, wkv = self.att(for_projections(self.ln1(x)), att_shift, wkv, steps)
        x = x + added
        added, ffn_shift = self.ffn(for_projections(self.ln2(x)), ffn_shift, steps)
        return x + added, RWKV6LayerState(att_shift, wkv, ffn_shift)


class RWKV6(nn.Module):
    """The language model: tokens in, logits and state out."""

    def __init__(self, config: RWKV6Config) -> None:
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
            raise ValueError(f"RWKV6: tokens have shape {tuple(tokens.shape)}; accepted is (B, T)")
        rows = check_ragged("RWKV6", lengths, cu_seqlens, tokens.shape[0], tokens.shape[1], tokens.device)
        if lengths is not None:
            tokens = blank(tokens, valid_steps(lengths, tokens.shape[1]), 0)
        steps = _Steps(
            partial(token_shift, lengths=lengths, cu_seqlens=cu_seqlens),
            partial(token_mix, lengths=lengths, cu_seqlens=cu_seqlens),
            partial(wkv6, lengths=lengths, cu_seqlens=cu_seqlens),
            rows,
        )
        return self._walk(tokens, state, steps)

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token for every row: ids ``(B,)`` → logits ``(B, vocab_size)`` and the state after it."""
        if token.dim() != 1:
            raise ValueError(f"RWKV6.step: token has shape {tuple(token.shape)}; accepted is (B,)")
        logits, state = self._walk(token[:, None], state, _Steps(_shift_one, mix_one, _single, len(token)))
        return logits[:, 0], state

    def _walk(self, tokens: Tensor, state: ModelState | None, steps: _Steps) -> tuple[Tensor, ModelState]:
        check_call(self, tokens, state, RWKV6LayerState)
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
            layers.append(RWKV6LayerState(zeros(C), zeros(C // N, N, N) if wkv is None else wkv, zeros(C)))
        return ModelState(tuple(layers))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The official optimiser groups: `time_decay` at twice the rate; decay on matrices named ``.weight``
        and on `time_state`.

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            decays = (name.endswith(".weight") and parameter.squeeze().dim() >= 2) or name.endswith("time_state")
            return 2.0 if name.endswith("att.time_decay") else 1.0, weight_decay if decays else 0.0

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of RWKV-LM's `RWKV-v5` for x060; with one layer, where it would divide by zero, that layer
        counts as the first of many."""
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        rows, columns = self.head.weight.shape
        nn.init.orthogonal_(self.head.weight, gain=0.5 * math.sqrt(max(rows / columns, 1)))
        self.ln_out.reset_parameters()
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            _reset_block(block, layer, self.config)


def _reset_block(block: Block, layer: int, config: RWKV6Config) -> None:
    C, depth = config.width, config.num_layers
    rising = layer / max(depth - 1, 1)  # 0 → 1 over layers
    falling = 1 - layer / depth  # 1 → 0
    n = torch.arange(C, dtype=torch.float32)
    share = n / C
    ramp = n / max(C - 1, 1)  # 0 → 1 over channels
    att, ffn = block.att, block.ffn
    vectors = {
        att.time_maa_x: 1 - share**falling,
        att.time_maa_w: 1 - share**falling,
        att.time_maa_k: 1 - share**falling,
        att.time_maa_v: 1 - (share**falling + 0.3 * rising),
        att.time_maa_r: 1 - share ** (0.5 * falling),
        att.time_maa_g: 1 - share ** (0.5 * falling),
        # From rows that remember for long (small n) to rows that forget sooner.
        att.time_decay: -6 + 5 * ramp ** (0.7 + 1.3 * rising),
        att.time_faaaa: rising * (1 - ramp) + 0.1 * ((n + 1) % 3 - 1),
        ffn.time_maa_k: 1 - share ** (falling**3),
        ffn.time_maa_r: 1 - share ** (falling**3),
    }
    for parameter, value in vectors.items():
        parameter.copy_(value.view_as(parameter))
    for first, second in ((att.time_maa_w1, att.time_maa_w2), (att.time_decay_w1, att.time_decay_w2)):
        nn.init.zeros_(first)
        nn.init.uniform_(second, -0.01, 0.01)
    nn.init.orthogonal_(att.receptance.weight)
    nn.init.orthogonal_(att.key.weight, gain=0.1)
    nn.init.orthogonal_(att.gate.weight, gain=0.1)
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
