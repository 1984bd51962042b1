"""Steps with drawn sizes, for the tests of one-token kernels and of pools.

Legend: B tokens, C channels, F mixtures, U = W-1, W window, H heads, K key rows, V value columns, N state size, P head
width, G groups, M channels or heads of a group, E = G·M channels, J = G·M heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from statewise import ops
from statewise.state import WKV4State

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class StepCase:
    """How to call a step.

    Attributes:
        id: name of the row.
        op: public name of the operator.
        shapes: argument → its shape by letter; those of tokens begin with B.
        state: shape of a row of the state.
        options: further keyword arguments.
    """

    id: str
    op: str
    shapes: Mapping[str, str]
    state: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def letters(self) -> list[str]:
        """Of the sizes that can be chosen."""
        every = {letter for shape in [*self.shapes.values(), self.state] for letter in shape.split()}
        if every & {"E", "J"}:
            every |= {"G", "M"}
        return sorted(every - {"B", "E", "J", "U"})

    def inputs(self, sizes: Mapping[str, int], dtype: torch.dtype, parameters: torch.dtype | None = None) -> Any:
        """All tensor arguments but the state; those without B of the dtype ``parameters``, if given."""
        size = _full(sizes)
        drawn = {}
        for name, shape in self.shapes.items():
            x = torch.randn([size[letter] for letter in shape.split()], dtype=torch.float64)
            if name == "log_w" or name == "A":
                x = -torch.exp(x)
            elif name == "dt" and not self.options.get("dt_softplus"):
                x = torch.exp(x - 2)
            wanted = dtype if parameters is None or shape.startswith("B ") else parameters
            drawn[name] = x.to(DEVICE, wanted)
        return drawn

    def pool(self, sizes: Mapping[str, int], rows: int, dtype: torch.dtype) -> Any:
        """A state in mid-flow, of so many rows."""
        size = _full(sizes)
        shape = [rows, *[size[letter] for letter in self.state.split()]]
        leaf = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
        if self.op in ("token_shift", "token_mix"):  # an input of the past, exact in every dtype of inputs
            leaf[0] = (leaf[0] * 32).round() / 32
        leaf = [x.to(DEVICE, dtype) for x in leaf]
        if self.op != "wkv4":
            return leaf[0]
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        return WKV4State(leaf[0], (0.1 + leaf[1].abs()).to(dtype), leaf[2].to(wide))

    def step(self, inputs: Mapping[str, Tensor], state: Any, **how: Any) -> tuple[Tensor, Any]:
        y, end = getattr(ops, f"{self.op}_step")(**inputs, state=state, **self.options, **how)
        return _one(y), end

    def step_(self, inputs: Mapping[str, Tensor], pool: Any, index: Tensor, **how: Any) -> Tensor:
        return _one(getattr(ops, f"{self.op}_step_")(**inputs, state=pool, index=index, **self.options, **how))


def _one(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    return y if isinstance(y, Tensor) else torch.stack(y, 1)


def _full(sizes: Mapping[str, int]) -> dict[str, int]:
    size = dict(sizes)
    if "W" in size:
        size["U"] = size["W"] - 1
    if "G" in size:
        size["E"] = size["J"] = size["G"] * size["M"]
    return size


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def map_leaves(function: Any, state: Any) -> Any:
    return function(state) if isinstance(state, Tensor) else WKV4State(*[function(leaf) for leaf in state])


_HEADS = {"r": "B H K", "log_w": "B H K", "k": "B H K", "v": "B H V"}
_SCAN = {"x": "B E", "dt": "B E", "A": "E N", "B": "B N", "C": "B N"}
_SSD = {"x": "B J P", "dt": "B J", "A": "J", "B": "B G N", "C": "B G N"}

STEPS = (
    StepCase("shift", "token_shift", {"x": "B C"}, "C"),
    StepCase("mix", "token_mix", {"x": "B C", "mix": "F C"}, "C"),
    StepCase("conv", "causal_conv1d", {"x": "B C", "weight": "C W", "bias": "C"}, "U C", {"activation": "silu"}),
    StepCase("conv-bare", "causal_conv1d", {"x": "B C", "weight": "C W"}, "U C"),
    StepCase("wkv4", "wkv4", {"k": "B C", "v": "B C", "log_w": "C", "u": "C"}, "C"),
    StepCase("wkv6", "wkv6", {**_HEADS, "u": "H K"}, "H K V"),
    StepCase("wkv6-constant", "wkv6", {**_HEADS, "log_w": "H K", "u": "H"}, "H K V"),
    StepCase("wkv6-heads", "wkv6", {**_HEADS, "log_w": "H", "u": "H K"}, "H K V"),
    StepCase("wkv7", "wkv7", {**_HEADS, "a": "B H K", "b": "B H K"}, "H K V"),
    StepCase("scan", "selective_scan", _SCAN, "E N"),
    StepCase(
        "scan-full",
        "selective_scan",
        {**_SCAN, "B": "B G N", "C": "B G N", "D": "E", "z": "B E", "dt_bias": "E"},
        "E N",
        {"dt_softplus": True},
    ),
    StepCase("ssd", "ssd", _SSD, "J P N"),
    StepCase(
        "ssd-full",
        "ssd",
        {**_SSD, "D": "J P", "z": "B J P", "dt_bias": "J"},
        "J P N",
        {"dt_softplus": True, "dt_limit": (0.05, 1.5)},
    ),
    StepCase("ssd-skip", "ssd", {**_SSD, "D": "J"}, "J P N", {"dt_limit": (0.05, float("inf"))}),
)

#: Beyond one tile of a program, and no power of two.
LARGE = {"C": 150, "F": 6, "W": 5, "H": 2, "K": 70, "V": 35, "G": 2, "M": 3, "N": 70, "P": 33}
