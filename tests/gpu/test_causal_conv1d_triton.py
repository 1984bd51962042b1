"""causal_conv1d on a GPU, or in Triton's interpreter: sequences longer than a chunk, any window, low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.ops import causal_conv1d
from statewise.ops.causal_conv1d import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMES = [1, 64, 133, *([4097] if DEVICE == "cuda" else [])]  # a chunk has 64 tokens


def draw(B: int, T: int, C: int, W: int, rows: int | None = None) -> dict[str, Tensor]:
    shapes = {"x": (B, T, C), "weight": (C, W), "bias": (C,), "state": (rows or B, W - 1, C)}
    return {name: torch.randn(shape, dtype=torch.float64, device=DEVICE) for name, shape in shapes.items()}


def run(given: dict[str, Tensor], backend: str, **how: Any) -> dict[str, Tensor]:
    """Outputs and gradients by name, of a weighting drawn in float64 (rounded to the outputs' dtypes, then exact)."""
    live = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    y, end = causal_conv1d(**live, activation="silu", backend=backend, **how)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    pulls = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (y, end)]
    found = torch.autograd.grad([y, end], list(live.values()), pulls)
    return {"y": y.detach(), "end": end.detach(), **{f"d_{n}": d for n, d in zip(live, found, strict=True)}}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((got[name].double() - x).norm() / x.norm()) if x.numel() and x.any() else float(got[name].norm())
        for name, x in want.items()
    }


@pytest.mark.parametrize("T", TIMES)
@pytest.mark.parametrize("W", [1, 2, 4, 9])
def test_equation(T: int, W: int) -> None:
    given = draw(2, T, 37, W)
    assert max(errors(run(given, "triton"), run(given, "torch")).values()) <= 1e-12


@pytest.mark.parametrize("T", TIMES)
def test_half_precision(T: int) -> None:
    given = {name: x.bfloat16() if name == "x" else x.float() for name, x in draw(2, T, 37, 4).items()}
    got, want = run(given, "triton"), run({name: x.double() for name, x in given.items()}, "reference")
    assert got["y"].dtype == got["d_x"].dtype == torch.bfloat16
    for name, error in errors(got, want).items():
        assert error <= (0.005 if name.startswith("d_") else 0.003), (name, error)


@pytest.mark.parametrize("x", [torch.float32, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64])
def test_mixed_dtypes(x: torch.dtype, parameters: torch.dtype) -> None:
    given = {name: value.to(x if name == "x" else parameters) for name, value in draw(1, 9, 5, 4).items()}
    got, want = run(given, "triton"), run(given, "torch")
    assert [v.dtype for v in got.values()] == [v.dtype for v in want.values()]
    wide = {name: v.double() for name, v in want.items()}
    assert max(errors(got, wide).values()) <= (1e-3 if x == torch.float16 else 1e-6)


@pytest.mark.parametrize("sizes", [[0, 65, 1, 130, 0, 64], [70, 70]], ids=str)
def test_packed_beyond_a_chunk(sizes: list[int]) -> None:
    given = draw(1, sum(sizes), 5, 4, rows=len(sizes))
    bounds = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], device=DEVICE)
    got, want = (run(given, backend, cu_seqlens=bounds) for backend in ("triton", "torch"))
    assert max(errors(got, want).values()) <= 1e-12


def test_padded_beyond_a_chunk() -> None:
    given = draw(5, 130, 5, 4)
    lengths = torch.tensor([130, 64, 65, 2, 0], device=DEVICE)
    padding = torch.arange(130, device=DEVICE)[:, None] >= lengths[:, None, None]
    dirty = {**given, "x": torch.where(padding, torch.nan, given["x"])}
    got, want = run(dirty, "triton", lengths=lengths), run(given, "torch", lengths=lengths)
    assert max(errors(got, want).values()) <= 1e-12
    assert not got["y"][padding.expand(-1, -1, 5)].any()


def test_window_longer_than_a_chunk() -> None:
    given = draw(1, 70, 3, 67)
    assert max(errors(run(given, "triton"), run(given, "torch")).values()) <= 1e-12


def test_strides() -> None:
    given = draw(2, 20, 37, 4)
    turned = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in given.items()}
    assert not turned["x"].is_contiguous()
    for one, other in zip(run(given, "triton").values(), run(turned, "triton").values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(dtype: torch.dtype) -> None:
    """SiLU and its derivative far out on both sides: exact zeros and the identity, never NaN."""
    x = torch.tensor([0.0, 1e-30, -1e-30, 50, -50, 800, -800, 1e30, -1e30], dtype=dtype, device=DEVICE)[None, :, None]
    given = {"x": x, "weight": torch.ones(1, 1, dtype=dtype, device=DEVICE)}
    got, want = run(given, "triton"), run({name: v.double() for name, v in given.items()}, "torch")
    for name, value in got.items():
        assert bool(value.isfinite().all()), name
        torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-12)


def test_every_choice_and_every_run_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: x.float() for name, x in draw(1, 70, 150, 4).items()}
    first = run(given, "triton")
    choices = triton._CHOICES
    for index in range(3):
        monkeypatch.setattr(triton, "_CHOICES", {kernel: (some[index],) for kernel, some in choices.items()})
        for name, value in run(given, "triton").items():
            assert torch.equal(value, first[name]), (index, name)
