"""RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456), readable beside the paper's section 4 and appendix.

Legend: B batch, T time, C width, H heads, N head size (K = V = N), D rank of a low-rank pair, n packed sequences.

A block is x += att(ln1 x); x += ffn(ln2 x). Both parts mix every channel with that of the token before (token shift);
`att` turns the mixtures into the six inputs of the recurrence :func:`statewise.ops.wkv7`. Parameters carry the
published files' names and shapes, so a checkpoint is read without translation. RWKV-7a (`DeepEmbed`) is a field of the
configuration, as published in RWKV-LM's `RWKV-v7/rwkv_v7a_demo.py`.
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
from statewise.ops.wkv7 import wkv7, wkv7_step
from statewise.state import ModelState, RWKV7LayerState

__all__ = ["RWKV7", "RWKV7Config"]

#: Decays lie between exp(-exp(-1/2)) = 0.545 and 1.
_FASTEST_DECAY = math.exp(-0.5)
#: In every published release, whatever the head size.
_GROUP_NORM_EPS = 64e-5


@dataclasses.dataclass(frozen=True)
class RWKV7Config:
    """Sizes of an RWKV-7.

    Args:
        vocab_size: rows of the embedding and columns of the logits.
        num_layers: blocks.
        width: channels C; a multiple of ``head_size``.
        head_size: N; 64 in every release.
        ffn_width: hidden channels of the channel mixing; ``None`` means 4·width.
        decay_rank: rank of w1, w2; ``None`` means the released checkpoints' rule: 1.8·√C, as every rank rounded to a
            multiple of 32 and at least 32. (RWKV-LM's `train_temp` and fla use 2.5, 2.5, 1.7 and 5 times √C.)
        iclr_rank: rank of a1, a2 (the in-context learning rate); ``None`` means 1.8·√C.
        value_rank: rank of v1, v2 (the value residual); ``None`` means 1.3·√C.
        gate_rank: rank of g1, g2; ``None`` means 0.6·C^0.8.
        group_norm_eps: epsilon of the heads' norm; in flash-linear-attention it follows the head size.
        keeps_unused: block 0 holds ``v0``, ``v1`` and ``v2``, which training checkpoints have and nothing reads.
        deep_embed: RWKV-7a's: the rank of a matrix that each token has to itself in the channel mixing of every block;
            32 in its releases, 0 for a plain RWKV-7.
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
    decay_rank: int | None = None
    iclr_rank: int | None = None
    value_rank: int | None = None
    gate_rank: int | None = None
    group_norm_eps: float = _GROUP_NORM_EPS
    keeps_unused: bool = False
    deep_embed: int = 0
    learned_state: bool = False

    def __post_init__(self) -> None:
        for name in ("keeps_unused", "learned_state"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"RWKV7Config: {name} is {getattr(self, name)!r}; accepted are True and False")
        if not isinstance(self.group_norm_eps, float) or not 0 < self.group_norm_eps < 1:
            raise ValueError(f"RWKV7Config: group_norm_eps is {self.group_norm_eps!r}; accepted are 0 < eps < 1")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("bool", "float") or (value is None and field.default is None):
                continue
            least = 0 if field.name == "deep_embed" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"RWKV7Config: {field.name} is {value!r}; accepted are integers from {least}")
        if self.width % self.head_size:
            raise ValueError(
                f"RWKV7Config: width {self.width} is not a multiple of head_size {self.head_size}; "
                "give a head_size that divides it"
            )

    def rank(self, name: str) -> int:
        """The rank of the pair ``"decay"``, ``"iclr"``, ``"value"`` or ``"gate"``: as given, or by the rule."""
        given: int | None = getattr(self, f"{name}_rank")
        if given is not None:
            return given
        factor, power = {"decay": (1.8, 0.5), "iclr": (1.8, 0.5), "value": (1.3, 0.5), "gate": (0.6, 0.8)}[name]
        return max(32, round(factor * math.pow(self.width, power) / 32) * 32)


class _Steps(NamedTuple):
    """How time is walked: everything else in a block is the same for whole, split and single-step forms."""

    mix: Callable[..., tuple[tuple[Tensor, ...], Tensor]]
    wkv: Callable[..., tuple[Tensor, Tensor]]
    rows: int  # of a state


def _single(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`wkv7` for T = 1, by its step form."""
    y, state = wkv7_step(r[:, 0], log_w[:, 0], k[:, 0], v[:, 0], a[:, 0], b[:, 0], state)
    return y[:, None], state


class TimeMix(nn.Module):
    """The recurrence and what feeds it. Submodules are projections without bias, `ln_x` one group per head."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        C, N = config.width, config.head_size
        self.heads, self.head_size = C // N, N

        def pair(rank: int) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.empty(C, rank)), nn.Parameter(torch.empty(rank, C))

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector() for _ in range(6))
        self.w0, (self.w1, self.w2) = vector(), pair(config.rank("decay"))
        self.a0, (self.a1, self.a2) = vector(), pair(config.rank("iclr"))
        if layer > 0:  # the first block's values are what later blocks mix in
            self.v0, (self.v1, self.v2) = vector(), pair(config.rank("value"))
        elif config.keeps_unused:
            rank = config.rank("value")
            for name, shape in (("v0", (1, 1, C)), ("v1", (C, rank)), ("v2", (rank, C))):
                self.register_buffer(name, torch.zeros(shape))
        self.g1, self.g2 = pair(config.rank("gate"))
        self.k_k, self.k_a = vector(), vector()
        self.r_k = nn.Parameter(torch.empty(self.heads, N))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.time_state = nn.Parameter(torch.empty(self.heads, N, N)) if config.learned_state else None
        self.ln_x = nn.GroupNorm(self.heads, C, eps=config.group_norm_eps)

    def forward(
        self, x: Tensor, v_first: Tensor | None, shift: Tensor | None, wkv: Tensor | None, steps: _Steps
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x ``(B, T, C)`` → what it adds to the stream, the first block's values, and the new shift and wkv states."""
        mix = torch.cat([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]).flatten(1)
        (xr, xw, xk, xv, xa, xg), shift = steps.mix(x, mix, shift)

        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # Decay in float32 at least: its rounding error is raised to the power of the distance it has to bridge.
        w = torch.tanh(xw @ self.w1) @ self.w2
        wide = accumulation_dtype(w)
        log_w = -_FASTEST_DECAY * torch.sigmoid(self.w0.to(wide) + w.to(wide))
        iclr = torch.sigmoid(self.a0 + xa @ self.a1 @ self.a2)
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + xv @ self.v1 @ self.v2)
        kappa = F.normalize(self._per_head(k * self.k_k).to(wide), dim=-1, eps=1e-12)  # from k as it is here ...
        k = k * (1 + (iclr - 1) * self.k_a)  # ... not from this one

        r, log_w, k, v, iclr = (self._per_head(z) for z in (r, log_w, k, v, iclr))  # (B, T, H, N)
        wkv = first_wkv(self.time_state, steps.rows) if wkv is None else wkv
        y, wkv = steps.wkv(r, log_w, k, v, -kappa, kappa * iclr, wkv)
        y = self.ln_x(y.reshape(-1, x.shape[-1])).reshape(x.shape)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        return self.output((y + bonus.flatten(-2)) * gate), v_first, shift, wkv

    def _per_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, self.head_size)


class ChannelMix(nn.Module):
    """value(relu(key(mixture))²); unlike its ancestors without a receptance.

    RWKV-7a's DeepEmbed scales the hidden channels by ((x s1) E) s2 + s0, with a matrix E (R, R) for each token of the
    vocabulary: a row of `s_emb`, and what `s_emb_x` makes of the token's normed embedding. x is not the mixture: it is
    this token's alone, so that the state stays what it was.
    """

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        hidden = config.ffn_width or 4 * config.width
        self.x_k = nn.Parameter(torch.empty(1, 1, config.width))
        self.key = nn.Linear(config.width, hidden, bias=False)
        self.value = nn.Linear(hidden, config.width, bias=False)
        self.rank = R = config.deep_embed
        if R:
            self.s_emb = nn.Embedding(config.vocab_size, R * R)
            self.s_emb_x = nn.Linear(config.width, R * R, bias=False)
            self.s1 = nn.Parameter(torch.empty(config.width, R))
            self.s2 = nn.Parameter(torch.empty(R, hidden))
            self.s0 = nn.Parameter(torch.empty(1, 1, hidden))

    def forward(
        self, x: Tensor, tokens: Tensor, embedded: Tensor | None, shift: Tensor | None, steps: _Steps
    ) -> tuple[Tensor, Tensor]:
        """x ``(B, T, C)`` → what it adds to the stream, and the new shift state.

        ``tokens`` ``(B, T)`` and their normed embeddings ``embedded`` ``(B, T, C)`` are DeepEmbed's."""
        (xk,), shift = steps.mix(x, self.x_k.flatten(1), shift)
        hidden = torch.relu(self.key(xk)).square()
        if embedded is not None:
            E = (self.s_emb(tokens) + self.s_emb_x(embedded)).unflatten(-1, (self.rank, self.rank))
            own = ((x @ self.s1)[..., None, :] @ E)[..., 0, :]  # (B, T, R)
            hidden = hidden * (own @ self.s2 + self.s0).to(hidden.dtype)
        return self.value(hidden), shift


class Block(nn.Module):
    """One layer; the first also normalises the embedding."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.width)
        self.first, self.deep = layer == 0, config.deep_embed > 0
        self.ln1 = nn.LayerNorm(config.width)
        self.ln2 = nn.LayerNorm(config.width)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        v_first: Tensor | None,
        embedded: Tensor | None,
        state: RWKV7LayerState | None,
        steps: _Steps,
    ) -> tuple[Tensor, Tensor, Tensor | None, RWKV7LayerState]:
        """x ``(B, T, C)`` → x, what the first block leaves to the others (its values and, for DeepEmbed, the normed
        embeddings), and this layer's new state."""
        att_shift, wkv, ffn_shift = (None, None, None) if state is None else state
        if self.first:
            x = self.ln0(x)
            embedded = x if self.deep else None
        added, v_first, att_shift, wkv = self.att(for_projections(self.ln1(x)), v_first, att_shift, wkv, steps)
        x = x + added
        added, ffn_shift = self.ffn(for_projections(self.ln2(x)), tokens, embedded, ffn_shift, steps)
        return x + added, v_first, embedded, RWKV7LayerState(att_shift, wkv, ffn_shift)


class RWKV7(nn.Module):
    """The language model: tokens in, logits and state out."""

    def __init__(self, config: RWKV7Config) -> None:
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
            raise ValueError(f"RWKV7: tokens have shape {tuple(tokens.shape)}; accepted is (B, T)")
        rows = check_ragged("RWKV7", lengths, cu_seqlens, tokens.shape[0], tokens.shape[1], tokens.device)
        if lengths is not None:
            tokens = blank(tokens, valid_steps(lengths, tokens.shape[1]), 0)
        steps = _Steps(
            partial(token_mix, lengths=lengths, cu_seqlens=cu_seqlens),
            partial(wkv7, lengths=lengths, cu_seqlens=cu_seqlens),
            rows,
        )
        return self._walk(tokens, state, steps)

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """One token for every row: ids ``(B,)`` → logits ``(B, vocab_size)`` and the state after it."""
        if token.dim() != 1:
            raise ValueError(f"RWKV7.step: token has shape {tuple(token.shape)}; accepted is (B,)")
        logits, state = self._walk(token[:, None], state, _Steps(mix_one, _single, len(token)))
        return logits[:, 0], state

    def _walk(self, tokens: Tensor, state: ModelState | None, steps: _Steps) -> tuple[Tensor, ModelState]:
        check_call(self, tokens, state, RWKV7LayerState)
        x = self.emb(tokens)
        v_first = embedded = None
        new = []
        for block, old in zip(self.blocks, [None] * len(self.blocks) if state is None else state.layers, strict=True):
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x, v_first, embedded, layer = checkpoint(
                    block, x, tokens, v_first, embedded, old, steps, use_reentrant=False
                )
            else:
                x, v_first, embedded, layer = block(x, tokens, v_first, embedded, old, steps)
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
            layers.append(RWKV7LayerState(zeros(C), zeros(C // N, N, N) if wkv is None else wkv, zeros(C)))
        return ModelState(tuple(layers))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training recomputes each block in backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The official optimiser groups: `att.w0` at twice the rate; decay on matrices named ``.weight`` and
        on `time_state`. (None were published for DeepEmbed: its matrices are held like all others.)

        Returns:
            dicts with ``params``, ``names``, ``lr_scale`` and ``weight_decay``; every parameter in exactly one.
        """

        def rule(name: str, parameter: Tensor) -> tuple[float, float]:
            decays = (name.endswith(".weight") and parameter.squeeze().dim() >= 2) or name.endswith("time_state")
            return 2.0 if name.endswith("att.w0") else 1.0, weight_decay if decays else 0.0

        return group_parameters(self, rule)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The initialisation of RWKV-LM's `RWKV-v7/train_temp`; with one layer, where it would divide by zero, that
        layer counts as the first of many. DeepEmbed, for which none was published, begins without effect: a scale of 1,
        every token's matrix the identity."""
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        rows, columns = self.head.weight.shape
        nn.init.orthogonal_(self.head.weight, gain=0.5 * math.sqrt(max(rows / columns, 1)))
        self.ln_out.reset_parameters()
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            _reset_block(block, layer, self.config)


def _reset_block(block: Block, layer: int, config: RWKV7Config) -> None:
    C, N, depth = config.width, config.head_size, config.num_layers
    rising = layer / max(depth - 1, 1)  # 0 → 1 over layers
    falling = 1 - layer / depth  # 1 → 0
    n = torch.arange(C, dtype=torch.float32)
    ramp = n / max(C - 1, 1)  # 0 → 1 over channels
    z = ((n % N) - (N - 1) / 2) / max((N - 1) / 2, 0.5)
    zigzag = z * z.abs()  # -1 → 1 over each head

    def mix(power: float) -> Tensor:
        return 1 - (n / C) ** power

    att, ffn = block.att, block.ffn
    vectors = {
        att.x_r: mix(0.2 * falling),
        att.x_w: mix(0.9 * falling),
        att.x_k: mix(0.7 * falling),
        att.x_v: mix(0.7 * falling),
        att.x_a: mix(0.9 * falling),
        att.x_g: mix(0.2 * falling),
        att.w0: -6 + 6 * ramp ** (1 + rising**0.3) + 0.5 + 2.5 * zigzag,
        att.a0: -0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5),
        att.k_k: 0.71 - 0.1 * (ramp - 0.5),
        att.k_a: torch.full_like(n, 1.02),
        ffn.x_k: mix(falling**4),
    }
    pairs = [(att.w1, att.w2), (att.a1, att.a2), (att.g1, att.g2)]
    if layer > 0:
        vectors[att.v0] = 0.73 - 0.4 * (ramp - 0.5)
        pairs.append((att.v1, att.v2))
    for parameter, value in vectors.items():
        parameter.copy_(value.expand_as(parameter))
    for first, second in pairs:
        nn.init.zeros_(first)
        nn.init.orthogonal_(second, gain=0.1 * math.sqrt(max(second.shape[0] / second.shape[1], 1)))
    nn.init.constant_(att.r_k, -0.04)
    nn.init.orthogonal_(att.receptance.weight)
    nn.init.orthogonal_(att.key.weight, gain=0.1)
    nn.init.orthogonal_(att.value.weight)
    nn.init.zeros_(att.output.weight)
    nn.init.orthogonal_(ffn.key.weight)
    nn.init.zeros_(ffn.value.weight)
    if ffn.rank:
        ffn.s_emb.weight.copy_(torch.eye(ffn.rank).flatten().expand_as(ffn.s_emb.weight))
        nn.init.zeros_(ffn.s_emb_x.weight)
        nn.init.zeros_(ffn.s1)
        nn.init.orthogonal_(ffn.s2, gain=0.1)
        nn.init.ones_(ffn.s0)
    for norm in (block.ln1, block.ln2, *([block.ln0] if block.first else [])):
        norm.reset_parameters()
    nn.init.constant_(att.ln_x.weight, ((1 + layer) / depth) ** 0.7)
    nn.init.zeros_(att.ln_x.bias)
    if att.time_state is not None:
        nn.init.zeros_(att.time_state)
