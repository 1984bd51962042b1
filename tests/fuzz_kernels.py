"""Random small cases of every compiled kernel, held against the reference.

    python -m tests.fuzz_kernels --cases 10000 --seed 0 [--libraries DIRECTORY]

Sizes, options, raggedness, states, dtypes, strides, and now and then extreme values are drawn from one seed; a case
that differs is told with its seed, which repeats it alone (``--cases 1 --seed N``). ``--libraries`` takes the kernels
from another build, such as one with sanitizers (``make sanitize``).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statewise import ops
from statewise.ops import kernels
from statewise.state import WKV4State
from statewise.testing.tolerances import bound

Draw = Callable[..., Tensor]


class Case:
    """One drawn call: inputs (activations by name, parameters by name), a state or none, options."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        rng = self.rng
        served = [op for op, row in ops.backends().items() if row["native"].serves]
        self.op = rng.choice(served)
        self.batch, self.time = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 65])
        self.extreme = rng.random() < 0.15
        self.dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
        self.ragged: dict[str, Tensor] = {}
        self.rows = self.batch
        kind = rng.choice(["dense", "lengths", "packed"])
        if kind == "lengths":
            self.ragged["lengths"] = torch.tensor([rng.randint(0, self.time) for _ in range(self.batch)])
        elif kind == "packed" and self.op != "bi_wkv":
            self.batch, self.rows = 1, rng.randint(1, 4)
            edges = sorted(rng.randint(0, self.time) for _ in range(self.rows - 1))
            self.ragged["cu_seqlens"] = torch.tensor([0, *edges, self.time])
        self.options: dict[str, Any] = {}
        self.activations: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.state: Any = None
        getattr(self, f"draw_{self.op}")()
        if rng.random() < 0.3:
            self.state = None
        if "lengths" in self.ragged:  # what lies past a row's end may be anything
            past = torch.arange(self.time) >= self.ragged["lengths"][:, None]
            for x in self.activations.values():
                x[past] = torch.nan

    def size(self, most: int) -> int:
        return self.rng.choice([1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 64, 65][: 5 + most])

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=self.noise, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.noise, dtype=torch.float64)

    def log_decay(self, *shape: int) -> Tensor:
        x = -torch.exp(self.normal(*shape, scale=2.0))
        if self.extreme:
            x = torch.where(self.uniform(*shape) < 0.2, x * 1e4, x)
            x = torch.where(self.uniform(*shape) < 0.2, 0.0, x)
        return x

    def keys(self, *shape: int) -> Tensor:
        return self.normal(*shape, scale=30.0 if self.extreme else 2.0)

    def draw_wkv4(self) -> None:
        C, lead = self.size(8), (self.batch, self.time)
        self.activations = {"k": self.keys(*lead, C), "v": self.normal(*lead, C)}
        self.parameters = {"log_w": self.log_decay(C), "u": self.keys(C)}
        den = 0.1 + self.uniform(self.rows, C)
        self.state = WKV4State(self.normal(self.rows, C) * den, den, self.keys(self.rows, C))

    def draw_bi_wkv(self) -> None:
        C, lead = self.size(8), (self.batch, self.time)
        sign = 1.0 if self.rng.random() < 0.7 else -1.0
        self.activations = {"k": self.keys(*lead, C), "v": self.normal(*lead, C)}
        self.parameters = {"log_w": sign * -torch.exp(self.normal(C)), "u": self.keys(C)}

    def draw_wkv6(self) -> None:
        H, K, V, lead = self.rng.randint(1, 3), self.size(8), self.size(8), (self.batch, self.time)
        self.activations = {"r": self.normal(*lead, H, K), "k": self.normal(*lead, H, K), "v": self.normal(*lead, H, V)}
        if self.rng.random() < 0.5:
            self.parameters["log_w"] = self.log_decay(H, K) if self.rng.random() < 0.7 else self.log_decay(H)
        else:
            self.activations["log_w"] = self.log_decay(*lead, H, K)
        self.parameters["u"] = self.normal(H, K) if self.rng.random() < 0.7 else self.normal(H)
        self.state = self.normal(self.rows, H, K, V)

    def draw_wkv7(self) -> None:
        H, K, V, lead = self.rng.randint(1, 3), self.size(8), self.size(8), (self.batch, self.time)
        direction = torch.nn.functional.normalize(self.normal(*lead, H, K), dim=-1)
        self.activations = {
            "r": self.normal(*lead, H, K),
            "log_w": self.log_decay(*lead, H, K),
            "k": self.normal(*lead, H, K),
            "v": self.normal(*lead, H, V),
            "a": -direction,
            "b": direction * self.uniform(*lead, H, K),
        }
        self.state = self.normal(self.rows, H, K, V)

    def _steps(self, *shape: int) -> Tensor:
        x = torch.exp(self.normal(*shape) - 2)
        return torch.where(self.uniform(*shape) < 0.2, x * 1e4, x) if self.extreme else x

    def _scan_options(self, channels: tuple[int, ...], heads: tuple[int, ...], lead: tuple[int, ...]) -> None:
        if self.rng.random() < 0.5:
            self.options["dt_softplus"] = True
            self.activations["dt"] = self.normal(*lead, *heads, scale=10.0 if self.extreme else 1.0)
        if self.rng.random() < 0.5:
            self.parameters["dt_bias"] = self.normal(*heads)
            if not self.options:
                self.parameters["dt_bias"] = self.parameters["dt_bias"].abs()
        if self.rng.random() < 0.5:
            self.parameters["D"] = self.normal(*(channels if self.rng.random() < 0.5 else heads))
        if self.rng.random() < 0.5:
            self.activations["z"] = self.keys(*lead, *channels)

    def draw_selective_scan(self) -> None:
        G, lead = self.rng.randint(1, 3), (self.batch, self.time)
        channels, N = G * self.size(8), self.size(3)
        self.activations = {"x": self.normal(*lead, channels), "dt": self._steps(*lead, channels)}
        grouped = (G,) if G > 1 or self.rng.random() < 0.5 else ()
        self.activations |= {name: self.normal(*lead, *grouped, N) for name in ("B", "C")}
        self.parameters = {"A": -torch.exp(self.normal(channels, N))}
        self._scan_options((channels,), (channels,), lead)
        self.state = self.normal(self.rows, channels, N)

    def draw_ssd(self) -> None:
        G, lead = self.rng.randint(1, 3), (self.batch, self.time)
        H, P, N = G * self.rng.randint(1, 3), self.size(8), self.size(8)
        self.activations = {"x": self.normal(*lead, H, P), "dt": self._steps(*lead, H)}
        self.activations |= {name: self.normal(*lead, G, N) for name in ("B", "C")}
        self.parameters = {"A": -torch.exp(self.normal(H))}
        self._scan_options((H, P), (H,), lead)
        if self.rng.random() < 0.3:
            self.options["dt_limit"] = (0.05, 1.5)
        self.state = self.normal(self.rows, H, P, N)

    def draw_causal_conv1d(self) -> None:
        C, W = self.size(8), self.rng.randint(1, 6)
        self.activations = {"x": self.keys(self.batch, self.time, C)}
        self.parameters = {"weight": self.normal(C, W)}
        if self.rng.random() < 0.5:
            self.parameters["bias"] = self.normal(C)
        self.options = {"activation": self.rng.choice([None, "silu"])}
        self.state = self.keys(self.rows, W - 1, C)

    def draw_token_mix(self) -> None:
        C, M = self.size(8), self.rng.randint(1, 9)
        self.activations = {"x": self.normal(self.batch, self.time, C)}
        self.parameters = {"mix": self.uniform(M, C)}
        self.state = self.normal(self.rows, C)

    def strided(self, x: Tensor) -> Tensor:
        """The same numbers at an odd address or with odd strides."""
        how = self.rng.choice(["plain", "offset", "transposed", "sparse"])
        if how == "offset":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if how == "transposed" and x.dim() >= 2:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        if how == "sparse":
            return torch.stack([x, x], -1)[..., 0]
        return x

    def run(self, backend: str, dtype: torch.dtype, state: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
        live = {name: self.strided(x.to(dtype)).detach().requires_grad_() for name, x in inputs.items()}
        leaves = [] if state is None else list(state) if isinstance(state, tuple) else [state]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [self.strided(leaf.to(wide)).detach().requires_grad_() for leaf in leaves]
        begin: Any = None if not leaves else WKV4State(*leaves) if len(leaves) == 3 else leaves[0]
        arguments = {**live, **self.options, **self.ragged, "backend": backend}
        if self.op != "bi_wkv":
            arguments["state"] = begin
        result = getattr(ops, self.op)(**arguments)
        y, end = (result, ()) if isinstance(result, Tensor) else result
        ys = list(y) if isinstance(y, tuple) else [y]
        ends = list(end) if isinstance(end, tuple) else [end]
        self.ys = len(ys)
        outputs = [*ys, *ends]
        noise = torch.Generator().manual_seed(5)
        chosen, pulls = [], []
        for out in outputs:
            pull = torch.randn(out.shape, generator=noise, dtype=torch.float64).to(self.dtype).to(out.dtype)
            if out.requires_grad and not bool(torch.isinf(out).any()):
                chosen.append(out)
                pulls.append(pull)
        sources = [*live.values(), *leaves]
        gradients = torch.autograd.grad(chosen, sources, pulls, materialize_grads=True, allow_unused=True)
        return [*[out.detach() for out in outputs], *gradients]

    def differs(self) -> str | None:
        """What is wrong, in a line."""
        inputs = {**self.activations, **self.parameters}
        # What is compared is the kernel, not what rounding its inputs does.
        rounded = {name: x.to(self.dtype).double() for name, x in inputs.items()}
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        state = self.state
        if state is not None:
            leaves = list(state) if isinstance(state, tuple) else [state]
            leaves = [leaf.to(wide).double() for leaf in leaves]
            state = WKV4State(*leaves) if len(leaves) == 3 else leaves[0]
        got = self.run("native", self.dtype, state, rounded)
        want = self.run("reference", torch.float64, state, rounded)
        limits = bound(self.op, self.dtype)
        # Extreme values amplify float32's rounding of differences; a wrong kernel is wrong in float64 too.
        slack = 1.0 if self.dtype == torch.float64 or not self.extreme else 50.0
        count = len(got) - len(inputs) - (0 if state is None else len(state) if isinstance(state, tuple) else 1)
        together = max((_largest(x) for x in want[count:]), default=0.0)
        seen = max(_largest(x) for x in want[: self.ys])  # one of several mixtures may all but cancel
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            limit = limits.forward if index < count else limits.gradient
            scale = seen if index < self.ys else _largest(other) if index < count else together
            one = one.double()
            gap = torch.where(one == other, 0.0, (one - other).abs())
            worst = float(gap.max()) if gap.numel() else 0.0
            if not worst <= slack * limit * max(scale, 1e-30):  # so written, NaN differs too
                return f"tensor {index} of {len(got)} ({count} outputs) off by {worst:.1e}, scale {scale:.1e}"
        return None

    def __str__(self) -> str:
        shapes = {name: tuple(x.shape) for name, x in {**self.activations, **self.parameters}.items()}
        ragged = {name: x.tolist() for name, x in self.ragged.items()}
        begin = "no state" if self.state is None else "a state"
        kind = "extreme" if self.extreme else "usual"
        return f"{self.op} {self.dtype} {shapes} {self.options} {ragged} from {begin}, {kind}"


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)].abs()
    return float(finite.max()) if finite.numel() else 0.0


def fuzz(cases: int, seed: int) -> list[str]:
    """A line for every case that differs."""
    found = []
    for number in range(seed, seed + cases):
        case = Case(number)
        if (wrong := case.differs()) is not None:
            found.append(f"seed {number}: {case}: {wrong}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.fuzz_kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--libraries", type=Path)
    options = parser.parse_args()
    if options.libraries is not None:
        other = kernels.load(options.libraries)
        if other.functions is None:
            sys.exit(f"tests.fuzz_kernels: {options.libraries}: {other.reason}")
        kernels.library = lambda: other  # type: ignore[assignment]
    print(f"{options.cases} cases with the {kernels.library().level} kernels")
    found = fuzz(options.cases, options.seed)
    print("\n".join(found[:50]))
    print(f"{len(found)} of {options.cases} differ")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
