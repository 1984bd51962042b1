"""Mamba-3: a state space read by the trapezoid rule, with rotating keys, of rank one (SISO) or R (MIMO).

Legend (B and C are the paper's matrices, so sizes are spelled out): batch, T time, H heads, P width of a head, N state
size, G groups, R rank (SISO: 1), S rotary angles.

    φ_t = φ_{t-1} + π tanh(angles_t) dt_t                    modulo 2π
    k_t = rotate(B_t + B_bias, φ_t)     q_t = rotate(C_t + C_bias, φ_t)     v_t = x_t ⊙ mimo_x  (SISO: x_t)
    λ_t = sigmoid(trap_t)               α_t = exp(log_decay_t)
    h_t = α_t (h_{t-1} + (1 - λ_t) dt_t v_{t-1} k_{t-1}ᵀ) + λ_t dt_t v_t k_tᵀ           h ∈ R^{P×N} for every head
    y_t = (h_t q_t + D v_t) ⊙ silu(z_t ⊙ mimo_z)  (without z: ungated),  then Σ over ranks of y_t ⊙ mimo_o

Outer products are summed over the ranks. Source: Lahoti et al. 2026, "Mamba-3", arXiv 2603.15569; state-spaces'
kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from statewise.ops.checks import accumulation_dtype, check_shapes, check_state
from statewise.ops.dispatch import choose
from statewise.ops.mamba3 import parallel, reference
from statewise.ops.ragged import blank, check_ragged, run_packed, valid_steps
from statewise.state import Mamba3State

__all__ = ["mamba3", "mamba3_step"]


def mamba3(
    C: Tensor,
    B: Tensor,
    x: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    trap: Tensor,
    angles: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    rotary: str | None = None,
    state: Mamba3State | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Mamba3State]:
    """The scan over a whole sequence, continued from ``state``.

    Args:
        C, B: ``(batch, T, G, N)``, or ``(batch, T, R, G, N)`` with ``mimo_x``; group g serves heads g·(H/G) onwards.
        x: inputs ``(batch, T, H, P)``.
        log_decay: ``(batch, T, H)``, ≤ 0: A·dt.
        dt: step sizes ``(batch, T, H)``, ≥ 0, after softplus.
        trap: ``(batch, T, H)``, before its sigmoid: how much of a step weighs the present token.
        angles: ``(batch, T, H, S)``, before tanh, 2·S ≤ N.
        C_bias, B_bias: ``(H, N)``, or ``(H, R, N)``.
        D: skip weight ``(H,)``; ``None`` means no skip.
        z: gate ``(batch, T, H, P)``; ``None`` means no gate.
        mimo_x: ``(H, R, P)``, what makes R inputs of x; ``None`` means SISO.
        mimo_z: ``(H, R, P)``, what makes R gates of z; given when both ``mimo_x`` and ``z`` are.
        mimo_o: ``(H, R, P)``, weights of the ranks in the output; ``None`` leaves them apart.
        rotary: which entries are rotated together: ``"pairwise"`` 2i and 2i+1, ``"halved"`` i and i+N/2; ``None``
            means what the published kernels do: pairwise for SISO, halved for MIMO.
        state: where to continue; ``None`` means zeros.
        lengths: ``(batch,)`` int64, right-padded rows: see the contract's section 3.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then has n rows.
        backend: ``None`` (fastest), ``"reference"`` or ``"torch"``.

    Returns:
        y ``(batch, T, H, P)`` of x's dtype (with ``mimo_x`` but no ``mimo_o``: ``(batch, T, R, H, P)``), and
        ``Mamba3State(angle, ssm, k, v)`` after the last token: angle ``(batch, H, S)`` in [0, 2π), ssm
        ``(batch, H, P, N)``, k ``(batch, R, H, N)`` rotated, v ``(batch, H, P)``, the last x itself; float32 (float64
        if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    given = (C, B, x, log_decay, dt, trap, angles, C_bias, B_bias, D, z, mimo_x, mimo_z, mimo_o)
    sizes, halved = _check("mamba3", "batch T", rotary, *given)
    batch, time = sizes["batch"], sizes["T"]
    rows = check_ragged("mamba3", lengths, cu_seqlens, batch, time, x.device)
    form = reference if choose("mamba3", backend, x.device) == "reference" else parallel
    dtype = accumulation_dtype(*given)
    begin = _start("mamba3", state, rows, sizes, x, dtype)
    if time == 0:
        ranks = () if mimo_x is None or mimo_o is not None else (sizes["R"],)
        return x.new_zeros(batch, 0, *ranks, *x.shape[2:]), begin
    biases = [_ranked(bias, -2, mimo_x).to(dtype) for bias in (C_bias, B_bias)]

    def run(
        inputs: Sequence[Tensor], leaves: Sequence[Tensor], counts: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        valid = None if counts is None else valid_steps(counts, inputs[0].shape[1])
        if valid is not None:  # a step of size zero turns nothing, forgets nothing and adds nothing
            inputs = [blank(value, valid) for value in inputs]
        C_, B_, x_, log_decay_, dt_, trap_, angles_, *gate = (value.to(dtype) for value in inputs)
        C_, B_, v = _ranked(C_, -3, mimo_x), _ranked(B_, -3, mimo_x), _spread(x_, mimo_x)
        angle, ssm, k, last = leaves
        y, angle, ssm = form.mamba3(
            C_,
            B_,
            v,
            log_decay_,
            dt_,
            torch.sigmoid(trap_),
            _turn(angles_, dt_),
            *biases,
            halved,
            (angle, ssm, k, _spread(last, mimo_x)),
        )
        y = _finish(y, v, D, gate[0] if gate else None, mimo_x, mimo_z, mimo_o).to(x.dtype)
        if counts is None:
            return y, (angle, ssm, _key(B_[:, -1], biases[1], angle, halved), x_[:, -1].clone())
        # The angle stands still in padding, so it is the last token's own.
        place = (counts.long() - 1).clamp(min=0)
        row = torch.arange(place.shape[0], device=place.device)
        ends = (angle, ssm, _key(B_[row, place], biases[1], angle, halved), x_[row, place])
        kept = [
            torch.where((counts > 0).view(-1, *[1] * (e.dim() - 1)), e, b) for e, b in zip(ends, leaves, strict=True)
        ]
        assert valid is not None
        return blank(y, valid), kept

    inputs = (C, B, x, log_decay, dt, trap, angles, *(() if z is None else (z,)))
    if cu_seqlens is not None:
        y, new = run_packed(run, inputs, begin, cu_seqlens)
        return y, Mamba3State(*new)
    y, end = run(inputs, begin, lengths)
    return y, Mamba3State(*end)


def mamba3_step(
    C: Tensor,
    B: Tensor,
    x: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    trap: Tensor,
    angles: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    rotary: str | None = None,
    state: Mamba3State | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Mamba3State]:
    """One token: no T axis anywhere, y ``(batch, H, P)``. Otherwise as :func:`mamba3`."""
    given = (C, B, x, log_decay, dt, trap, angles, C_bias, B_bias, D, z, mimo_x, mimo_z, mimo_o)
    sizes, halved = _check("mamba3_step", "batch", rotary, *given)
    choose("mamba3", backend, x.device)
    dtype = accumulation_dtype(*given)
    angle, ssm, k, last = _start("mamba3_step", state, sizes["batch"], sizes, x, dtype)
    C_, B_, x_, log_decay_, dt_, trap_, angles_ = (value.to(dtype) for value in (C, B, x, log_decay, dt, trap, angles))
    v = _spread(x_, mimo_x)
    y, (angle, ssm, k, _) = reference.step(
        _ranked(C_, -3, mimo_x),
        _ranked(B_, -3, mimo_x),
        v,
        log_decay_,
        dt_,
        torch.sigmoid(trap_),
        _turn(angles_, dt_),
        _ranked(C_bias, -2, mimo_x).to(dtype),
        _ranked(B_bias, -2, mimo_x).to(dtype),
        halved,
        (angle, ssm, k, _spread(last, mimo_x)),
    )
    y = _finish(y, v, D, None if z is None else z.to(dtype), mimo_x, mimo_z, mimo_o).to(x.dtype)
    return y, Mamba3State(angle, ssm, k, x_.clone())


def _ranked(x: Tensor, axis: int, mimo: Tensor | None) -> Tensor:
    """With the axis of the ranks, which SISO leaves out."""
    return x.unsqueeze(axis) if mimo is None else x


def _spread(x: Tensor, mimo: Tensor | None) -> Tensor:
    """``(..., H, P)`` → ``(..., R, H, P)``."""
    x = x.unsqueeze(-3)
    return x if mimo is None else x * mimo.transpose(0, 1).to(x.dtype)


def _turn(angles: Tensor, dt: Tensor) -> Tensor:
    """What the rotary angle moves by, ``(..., H, S)``, less whole turns: large steps keep their digits in sums."""
    turn = math.pi * torch.tanh(angles) * dt[..., None]
    return turn - reference.TURN * torch.round(turn.detach() / reference.TURN)


def _key(B: Tensor, bias: Tensor, angle: Tensor, halved: bool) -> Tensor:
    """The key of one token: B ``(batch, R, G, N)`` → ``(batch, R, H, N)``."""
    B = B.repeat_interleave(angle.shape[1] // B.shape[2], 2)
    return reference.rotate(B + bias.transpose(0, 1), angle[:, None], halved)


def _finish(
    y: Tensor,
    v: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
) -> Tensor:
    if D is not None:
        y = y + D[:, None].to(y.dtype) * v
    if z is not None:
        y = y * F.silu(_spread(z, mimo_z))
    if mimo_x is None:
        return y.squeeze(-3)
    return y if mimo_o is None else (y * mimo_o.transpose(0, 1).to(y.dtype)).sum(-3)


def _start(
    op: str, state: Mamba3State | None, rows: int, sizes: dict[str, int], x: Tensor, dtype: torch.dtype
) -> Mamba3State:
    H, P, N = sizes["H"], sizes["P"], sizes["N"]
    shapes = ((rows, H, sizes["S"]), (rows, H, P, N), (rows, sizes.get("R", 1), H, N), (rows, H, P))
    if state is None:
        return Mamba3State(*[torch.zeros(shape, dtype=dtype, device=x.device) for shape in shapes])
    if not isinstance(state, tuple) or len(state) != 4:
        raise ValueError(f"{op}: state must be a Mamba3State(angle, ssm, k, v), got {type(state).__name__}")
    for name, leaf, shape in zip(Mamba3State._fields, state, shapes, strict=True):
        check_state(op, f"state.{name}", leaf, shape, x.device)
    return Mamba3State(*[leaf.to(dtype) for leaf in state])


def _check(
    op: str,
    lead: str,
    rotary: str | None,
    C: Tensor,
    B: Tensor,
    x: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    trap: Tensor,
    angles: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
) -> tuple[dict[str, int], bool]:
    """Size by letter, and whether rotated pairs lie N/2 apart."""
    mimo = mimo_x is not None
    if (mimo_z is not None) != (mimo and z is not None) or (mimo_o is not None and not mimo):
        raise ValueError(
            f"{op}: mimo_z goes with mimo_x and z, mimo_o with mimo_x; given {_told(mimo_x, mimo_z, mimo_o, z)}"
        )
    if rotary not in (None, "pairwise", "halved"):
        raise ValueError(f"{op}: rotary is {rotary!r}; accepted are None, 'pairwise', 'halved'")
    halved = mimo if rotary is None else rotary == "halved"
    ranks = "R " if mimo else ""
    optional = {"D": (D, "H"), "z": (z, f"{lead} H P"), "mimo_z": (mimo_z, "H R P"), "mimo_o": (mimo_o, "H R P")}
    if mimo_x is not None:
        optional = {"mimo_x": (mimo_x, "H R P"), **optional}
    bias = f"H {ranks}N"
    sizes = check_shapes(
        op,
        x=(x, f"{lead} H P"),
        C=(C, f"{lead} {ranks}G N"),
        B=(B, f"{lead} {ranks}G N"),
        log_decay=(log_decay, f"{lead} H"),
        dt=(dt, f"{lead} H"),
        trap=(trap, f"{lead} H"),
        angles=(angles, f"{lead} H S"),
        C_bias=(C_bias, bias),
        B_bias=(B_bias, bias),
        **{name: (value, spec) for name, (value, spec) in optional.items() if value is not None},
    )
    if sizes["G"] < 1 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: B and C have {sizes['G']} groups, which do not divide {sizes['H']} heads")
    if 2 * sizes["S"] > sizes["N"] or (halved and sizes["N"] % 2):
        raise ValueError(f"{op}: {sizes['S']} angles rotate as many pairs, which {sizes['N']} entries do not hold")
    return sizes, halved


def _told(*arguments: Tensor | None) -> str:
    names = ("mimo_x", "mimo_z", "mimo_o", "z")
    return ", ".join(name for name, value in zip(names, arguments, strict=True) if value is not None) or "none of them"
