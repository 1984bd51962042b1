"""token_mix on a GPU, or in Triton's interpreter: sequences longer than a chunk, many mixtures, low precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.ops import token_mix
from statewise.ops.token_mix import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMES = [1, 64, 133, *([4097] if DEVICE == "cuda" else [])]  # a chunk has 64 tokens


def draw(B: int, T: int, C: int, M: int, rows: int | None = None) -> dict[str, Tensor]:
    shapes = {"x": (B, T, C), "mix": (M, C), "state": (rows or B, C)}
    return {name: torch.randn(shape, dtype=torch.float64, device=DEVICE) for name, shape in shapes.items()}


def run(given: dict[str, Tensor], backend: str, **how: Any) -> dict[str, Tensor]:
    """Outputs, and gradients of a weighting that bfloat16 can hold, by name."""
    live = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    ys, end = token_mix(**live, backend=backend, **how)
    generator = torch.Generator().manual_seed(3)
    pulls = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (*ys, end)]
    found = torch.autograd.grad([*ys, end], list(live.values()), pulls)
    outputs = {"y": torch.stack(ys).detach(), "end": end.detach()}
    return {**outputs, **{f"d_{name}": d for name, d in zip(live, found, strict=True)}}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name].double() - x).norm() / x.norm()) for name, x in want.items()}


@pytest.mark.parametrize("T", TIMES)
@pytest.mark.parametrize("M", [1, 6])
def test_equation(T: int, M: int) -> None:
    given = draw(2, T, 37, M)
    assert max(errors(run(given, "triton"), run(given, "torch")).values()) <= 1e-12


def test_more_mixtures_than_a_launch_has() -> None:
    given = draw(1, 5, 3, 19)
    assert max(errors(run(given, "triton"), run(given, "torch")).values()) <= 1e-12


@pytest.mark.parametrize("T", TIMES)
def test_half_precision(T: int) -> None:
    given = {name: x.bfloat16() if name == "x" else x.float() for name, x in draw(2, T, 37, 6).items()}
    got, want = run(given, "triton"), run({name: x.double() for name, x in given.items()}, "reference")
    assert got["y"].dtype == got["d_x"].dtype == torch.bfloat16
    for name, error in errors(got, want).items():
        assert error <= (0.005 if name.startswith("d_") else 0.003), (name, error)


@pytest.mark.parametrize("x", [torch.float32, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.float64])
def test_mixed_dtypes(x: torch.dtype, parameters: torch.dtype) -> None:
    given = {name: value.to(x if name == "x" else parameters) for name, value in draw(1, 9, 5, 2).items()}
    got, want = run(given, "triton"), run(given, "native" if DEVICE == "cpu" else "torch")
    assert [v.dtype for v in got.values()] == [v.dtype for v in want.values()]
    wide = {name: v.double() for name, v in want.items()}
    assert max(errors(got, wide).values()) <= (2e-3 if x == torch.float16 else 1e-6)


@pytest.mark.parametrize("sizes", [[0, 65, 1, 130, 0, 64], [70, 70]], ids=str)
def test_packed_beyond_a_chunk(sizes: list[int]) -> None:
    given = draw(1, sum(sizes), 5, 3, rows=len(sizes))
    bounds = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], device=DEVICE)
    got, want = (run(given, backend, cu_seqlens=bounds) for backend in ("triton", "torch"))
    assert max(errors(got, want).values()) <= 1e-12


def test_padded_beyond_a_chunk() -> None:
    given = draw(5, 130, 5, 3)
    lengths = torch.tensor([130, 64, 65, 1, 0], device=DEVICE)
    padding = torch.arange(130, device=DEVICE)[:, None] >= lengths[:, None, None]
    dirty = {**given, "x": torch.where(padding, torch.nan, given["x"])}
    got, want = run(dirty, "triton", lengths=lengths), run(given, "torch", lengths=lengths)
    assert max(errors(got, want).values()) <= 1e-12
    assert not got["y"][padding.expand(3, -1, -1, 5)].any()


def test_strides() -> None:
    given = draw(2, 20, 37, 3)
    turned = {name: x.mT.contiguous().mT for name, x in given.items()}
    assert not turned["x"].is_contiguous()
    for one, other in zip(run(given, "triton").values(), run(turned, "triton").values(), strict=True):
        assert torch.equal(one, other)


def test_one_output_differentiated_alone() -> None:
    """Mixtures that nothing depends on have no cotangent at all."""
    given = draw(1, 7, 3, 4)
    gradients = []
    for backend in ("triton", "torch"):
        live = {name: x.clone().requires_grad_() for name, x in given.items()}
        ys, _ = token_mix(**live, backend=backend)
        gradients.append(torch.autograd.grad(ys[2].square().sum(), list(live.values())))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_every_choice_and_every_run_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: x.float() for name, x in draw(1, 70, 150, 3).items()}
    first = run(given, "triton")
    choices = triton._CHOICES
    for index in range(3):
        monkeypatch.setattr(triton, "_CHOICES", {kernel: (some[index],) for kernel, some in choices.items()})
        for name, value in run(given, "triton").items():
            assert torch.equal(value, first[name]), (index, name)
