"""What the GPU kernels are compiled for, counted and measured on: the shapes of published benchmarks.

A case makes the arguments of an operator for any T, so that the same table serves ahead-of-time compilation (a few
tokens), counting (the real sizes, memory never touched) and measuring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["CASES", "GpuCase"]


@dataclass(frozen=True)
class GpuCase:
    """An operator at a published shape.

    Attributes:
        op: public name.
        batch, time: B and T of the benchmark.
        sizes: by letter, for the table.
        shapes: argument → its shape by letter, B and T first where it has them.
        wide: arguments that are float32 beside half activations.
        options: further keyword arguments.
        floor: tensors of the size of x that must move at least, forward and forward+backward.
    """

    op: str
    batch: int
    time: int
    sizes: Mapping[str, int]
    shapes: Mapping[str, str]
    wide: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None
    floor: tuple[int, int] = (0, 0)

    @property
    def label(self) -> str:
        letters = " ".join(f"{letter}{size}" for letter, size in self.sizes.items())
        return f"{self.op} B{self.batch} T{self.time} {letters}"

    def arguments(
        self,
        make: Callable[..., Tensor],
        dtype: torch.dtype,
        device: torch.device | str,
        batch: int | None = None,
        time: int | None = None,
    ) -> dict[str, Tensor]:
        """All tensor arguments, ``make(shape, dtype=, device=)`` each (``torch.empty``, ``torch.randn``)."""
        size = {**self.sizes, "B": batch or self.batch, "T": time or self.time}
        return {
            name: make(
                [size[letter] for letter in shape.split()],
                dtype=torch.float32 if name in self.wide and dtype != torch.float64 else dtype,
                device=device,
            )
            for name, shape in self.shapes.items()
        }


CASES: tuple[GpuCase, ...] = (
    GpuCase(
        "causal_conv1d",
        8,
        4096,
        {"C": 4096, "W": 4},
        {"x": "B T C", "weight": "C W", "bias": "C"},
        wide=("weight", "bias"),
        options={"activation": "silu"},
        floor=(2, 5),
    ),
    GpuCase("token_mix", 8, 4096, {"C": 2048, "M": 6}, {"x": "B T C", "mix": "M C"}, wide=("mix",), floor=(7, 15)),
    GpuCase(  # floor: x, z, y; then x, z, dy, dx, dz
        "ssd",
        8,
        4096,
        {"H": 64, "P": 64, "G": 1, "N": 128},
        {"x": "B T H P", "dt": "B T H", "A": "H", "B": "B T G N", "C": "B T G N", "D": "H", "z": "B T H P"},
        wide=("dt", "A", "D"),
        floor=(3, 8),
    ),
    GpuCase(  # few heads: in segments
        "ssd",
        1,
        4096,
        {"H": 24, "P": 64, "G": 1, "N": 128},
        {"x": "B T H P", "dt": "B T H", "A": "H", "B": "B T G N", "C": "B T G N", "D": "H", "z": "B T H P"},
        wide=("dt", "A", "D"),
        floor=(3, 8),
    ),
    GpuCase(
        "wkv6",
        8,
        4096,
        {"H": 32, "K": 64, "V": 64},
        {"r": "B T H K", "log_w": "B T H K", "k": "B T H K", "v": "B T H V", "u": "H K"},
        wide=("u",),
        floor=(5, 14),
    ),
    GpuCase(  # a constant decay: RWKV-5
        "wkv6",
        8,
        4096,
        {"H": 32, "K": 64, "V": 64},
        {"r": "B T H K", "log_w": "H K", "k": "B T H K", "v": "B T H V", "u": "H K"},
        wide=("log_w", "u"),
        floor=(4, 11),
    ),
    GpuCase(
        "selective_scan",
        8,
        4096,
        {"C": 4096, "N": 16},
        {"x": "B T C", "dt": "B T C", "A": "C N", "B": "B T N", "C": "B T N", "D": "C", "z": "B T C", "dt_bias": "C"},
        wide=("A", "D", "dt_bias"),
        options={"dt_softplus": True},
        floor=(4, 12),
    ),
    GpuCase(  # few channels: in segments
        "selective_scan",
        1,
        4096,
        {"C": 1536, "N": 16},
        {"x": "B T C", "dt": "B T C", "A": "C N", "B": "B T N", "C": "B T N", "D": "C", "z": "B T C", "dt_bias": "C"},
        wide=("A", "D", "dt_bias"),
        options={"dt_softplus": True},
        floor=(4, 12),
    ),
    GpuCase(  # floor: k, v, y; then k, v, dy, dk, dv
        "wkv4",
        32,
        1024,
        {"C": 768},
        {"k": "B T C", "v": "B T C", "log_w": "C", "u": "C"},
        wide=("log_w", "u"),
        floor=(3, 8),
    ),
    GpuCase(
        "bi_wkv",
        64,
        196,
        {"C": 384},
        {"k": "B T C", "v": "B T C", "log_w": "C", "u": "C"},
        wide=("log_w", "u"),
        floor=(3, 8),
    ),
    GpuCase(
        "bi_wkv",
        64,
        4096,
        {"C": 384},
        {"k": "B T C", "v": "B T C", "log_w": "C", "u": "C"},
        wide=("log_w", "u"),
        floor=(3, 8),
    ),
    GpuCase(
        "wkv7",
        8,
        4096,
        {"H": 32, "K": 64, "V": 64},
        {**{name: "B T H K" for name in ("r", "log_w", "k", "a", "b")}, "v": "B T H V"},
        floor=(7, 22),
    ),
    GpuCase(  # few heads: in segments
        "wkv7",
        1,
        4096,
        {"H": 12, "K": 64, "V": 64},
        {**{name: "B T H K" for name in ("r", "log_w", "k", "a", "b")}, "v": "B T H V"},
        floor=(7, 22),
    ),
)
