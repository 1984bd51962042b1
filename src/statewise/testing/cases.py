"""The op table: one row an operator (or an option of one that changes its arithmetic). Every law runs over every row.

Legend: B rows, T time, C channels, H heads, K key rows, V value columns, N SSM state size, G groups, W window.
Sizes are small and unequal, so that a transposed or swapped axis cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from statewise import ops
from statewise.state import Mamba3State, WKV4State

__all__ = ["CASES", "OpCase"]

Draw = Callable[..., Tensor]


def _alone(y: Tensor) -> Tensor:
    return y


def _last_axis(ys: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(ys, -1)


@dataclass(frozen=True)
class OpCase:
    """How to call an operator with drawn inputs.

    Attributes:
        id: name of the row.
        op: public name of the operator.
        time: names of arguments with a time axis; the rest of :attr:`draw`'s are shared by all steps.
        draw: (normal sampler, B, T) → all tensor arguments by name.
        state: (normal sampler, rows) → a state in mid-flow.
        options: further keyword arguments.
        chunk: length of a chunk of the parallel form: where cuts are likeliest to hurt.
        join: makes one tensor of what an operator of several outputs returns.
        device: where drawn tensors lie; they are drawn on the CPU, so they are the same everywhere.
    """

    id: str
    op: str
    time: tuple[str, ...]
    draw: Callable[[Draw, int, int], dict[str, Tensor]]
    state: Callable[[Draw, int], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    chunk: int = 16
    join: Callable[[Any], Tensor] = _alone
    device: str = "cpu"

    def call(self, inputs: Mapping[str, Tensor], state: Any = None, **how: Any) -> tuple[Tensor, Any]:
        """The whole-sequence form."""
        y, end = getattr(ops, self.op)(**inputs, state=state, **self.options, **how)
        return self.join(y), end

    def step(self, inputs: Mapping[str, Tensor], state: Any = None, **how: Any) -> tuple[Tensor, Any]:
        """The one-token form; ``inputs`` have no time axis."""
        y, end = getattr(ops, f"{self.op}_step")(**inputs, state=state, **self.options, **how)
        return self.join(y), end

    def inputs(self, batch: int, time: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Drawn arguments, the same for the same seed."""
        return self.draw(_sampler(dtype, seed, self.device), batch, time)

    def begin(self, rows: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
        """A drawn state; accumulation dtype when ``dtype`` is a half type."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self.state(_sampler(wide, seed, self.device), rows)


def _sampler(dtype: torch.dtype, seed: int, device: str) -> Draw:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return draw


def _wkv4(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
    C = 5
    return {"k": 2 * draw(B, T, C), "v": draw(B, T, C), "log_w": -torch.exp(draw(C)), "u": draw(C)}


def _wkv4_state(draw: Draw, rows: int) -> WKV4State:
    return WKV4State(draw(rows, 5), 0.1 + draw(rows, 5).abs(), draw(rows, 5))


def _wkv6(decay: str, bonus: str = "HK") -> Callable[[Draw, int, int], dict[str, Tensor]]:
    def draw_all(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
        size = {"B": B, "T": T, "H": 2, "K": 4}
        return {
            "r": draw(B, T, 2, 4),
            "log_w": -torch.exp(draw(*[size[letter] for letter in decay])),
            "k": draw(B, T, 2, 4),
            "v": draw(B, T, 2, 3),
            "u": draw(*[size[letter] for letter in bonus]),
        }

    return draw_all


def _wkv7(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
    H, K, V = 2, 4, 3
    direction = torch.nn.functional.normalize(draw(B, T, H, K), dim=-1)
    rate = torch.sigmoid(draw(B, T, H, K))
    return {
        "r": draw(B, T, H, K),
        "log_w": -0.6065306597 * torch.sigmoid(2 * draw(B, T, H, K)),
        "k": draw(B, T, H, K),
        "v": draw(B, T, H, V),
        "a": -direction,
        "b": direction * rate,
    }


def _scan(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
    channels, N = 6, 3
    return {
        "x": draw(B, T, channels),
        "dt": torch.exp(draw(B, T, channels) - 2),
        "A": -torch.exp(draw(channels, N)),
        "B": draw(B, T, N),
        "C": draw(B, T, N),
    }


def _scan_full(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
    inputs = _scan(draw, B, T)
    extra = {"D": draw(6), "z": draw(B, T, 6), "dt_bias": draw(6), "dt": draw(B, T, 6)}
    grouped = {"B": draw(B, T, 2, 3), "C": draw(B, T, 2, 3)}
    return {**inputs, **extra, **grouped}


def _ssd(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
    H, P, N = 4, 3, 5
    return {
        "x": draw(B, T, H, P),
        "dt": torch.exp(draw(B, T, H) - 2),
        "A": -torch.exp(draw(H)),
        "B": draw(B, T, 1, N),
        "C": draw(B, T, 1, N),
    }


def _ssd_full(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
    inputs = _ssd(draw, B, T)
    extra = {"D": draw(4, 3), "z": draw(B, T, 4, 3), "dt_bias": draw(4), "dt": draw(B, T, 4)}
    return {**inputs, **extra, "B": draw(B, T, 2, 5), "C": draw(B, T, 2, 5)}


def _mamba3(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
    H, P, N, S = 4, 3, 6, 2
    return {
        "C": draw(B, T, 2, N),
        "B": draw(B, T, 2, N),
        "x": draw(B, T, H, P),
        "log_decay": -torch.exp(draw(B, T, H) - 2),
        "dt": torch.exp(draw(B, T, H) - 2),
        "trap": draw(B, T, H),
        "angles": draw(B, T, H, S),
        "C_bias": draw(H, N),
        "B_bias": draw(H, N),
    }


def _mamba3_ranks(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
    H, R, P, N = 4, 2, 3, 6
    ranked = {"C": draw(B, T, R, 1, N), "B": draw(B, T, R, 1, N), "C_bias": draw(H, R, N), "B_bias": draw(H, R, N)}
    mimo = {"mimo_x": draw(H, R, P), "mimo_z": draw(H, R, P), "mimo_o": draw(H, R, P)}
    return {**_mamba3(draw, B, T), **ranked, "D": draw(H), "z": draw(B, T, H, P), **mimo}


def _mamba3_state(ranks: int) -> Callable[[Draw, int], Mamba3State]:
    return lambda draw, n: Mamba3State(draw(n, 4, 2), draw(n, 4, 3, 6), draw(n, ranks, 4, 6), draw(n, 4, 3))


def _conv(width: int, bias: bool) -> Callable[[Draw, int, int], dict[str, Tensor]]:
    def draw_all(draw: Draw, B: int, T: int) -> dict[str, Tensor]:
        inputs = {"x": draw(B, T, 5), "weight": draw(5, width)}
        return {**inputs, "bias": draw(5)} if bias else inputs

    return draw_all


CASES = (
    OpCase("token_shift", "token_shift", ("x",), lambda draw, B, T: {"x": draw(B, T, 5)}, lambda draw, n: draw(n, 5)),
    OpCase(
        "token_mix",
        "token_mix",
        ("x",),
        lambda draw, B, T: {"x": draw(B, T, 5), "mix": draw(3, 5)},
        lambda draw, n: draw(n, 5),
        join=_last_axis,
    ),
    OpCase(
        "conv-w4-silu",
        "causal_conv1d",
        ("x",),
        _conv(4, True),
        lambda draw, n: draw(n, 3, 5),
        {"activation": "silu"},
    ),
    OpCase("conv-w2", "causal_conv1d", ("x",), _conv(2, False), lambda draw, n: draw(n, 1, 5)),
    OpCase("conv-w1", "causal_conv1d", ("x",), _conv(1, True), lambda draw, n: draw(n, 0, 5)),
    OpCase("wkv4", "wkv4", ("k", "v"), _wkv4, _wkv4_state),
    OpCase("wkv6", "wkv6", ("r", "log_w", "k", "v"), _wkv6("BTHK"), lambda draw, n: draw(n, 2, 4, 3), chunk=64),
    OpCase("wkv6-constant", "wkv6", ("r", "k", "v"), _wkv6("HK"), lambda draw, n: draw(n, 2, 4, 3), chunk=64),
    OpCase("wkv6-heads", "wkv6", ("r", "k", "v"), _wkv6("H", "H"), lambda draw, n: draw(n, 2, 4, 3), chunk=64),
    OpCase("wkv7", "wkv7", ("r", "log_w", "k", "v", "a", "b"), _wkv7, lambda draw, n: draw(n, 2, 4, 3)),
    OpCase("scan", "selective_scan", ("x", "dt", "B", "C"), _scan, lambda draw, n: draw(n, 6, 3)),
    OpCase(
        "scan-full",
        "selective_scan",
        ("x", "dt", "B", "C", "z"),
        _scan_full,
        lambda draw, n: draw(n, 6, 3),
        {"dt_softplus": True},
    ),
    OpCase("ssd", "ssd", ("x", "dt", "B", "C"), _ssd, lambda draw, n: draw(n, 4, 3, 5), chunk=64),
    OpCase(
        "ssd-full",
        "ssd",
        ("x", "dt", "B", "C", "z"),
        _ssd_full,
        lambda draw, n: draw(n, 4, 3, 5),
        {"dt_softplus": True, "dt_limit": (0.05, 1.5)},
        chunk=64,
    ),
    OpCase(
        "mamba3",
        "mamba3",
        ("C", "B", "x", "log_decay", "dt", "trap", "angles"),
        _mamba3,
        _mamba3_state(1),
        chunk=64,
    ),
    OpCase(
        "mamba3-ranks",
        "mamba3",
        ("C", "B", "x", "log_decay", "dt", "trap", "angles", "z"),
        _mamba3_ranks,
        _mamba3_state(2),
    ),
)
