"""selective_scan on a GPU, or in Triton's interpreter: whole and in segments, any size, low precision, extremes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.ops import selective_scan
from statewise.ops.selective_scan import triton

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TIMES = [1, 66, 133, *([4097] if GPU else [])]  # a chunk has 64 tokens, a segment 128

whole_and_split = pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])


@pytest.fixture(autouse=True)
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few channels are cut into segments once T is longer than one; here also into short ones, or not at all."""
    split = request.node.callspec.params.get("split") if hasattr(request.node, "callspec") else None
    if split is not None:
        monkeypatch.setattr(triton, "_FEW", 1 << 14 if split else 0)
        monkeypatch.setattr(triton, "_KEEP", 16)
        monkeypatch.setattr(triton, "_SEGMENT", 32)


def draw(B: int, T: int, C: int, N: int, G: int = 1, rows: int | None = None) -> dict[str, Tensor]:
    """Every argument in float64; after softplus, steps are of published sizes, 0.001 to 0.1 and above."""
    shapes = {"x": (B, T, C), "dt": (B, T, C), "B": (B, T, G, N), "C": (B, T, G, N), "z": (B, T, C), "D": (C,)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    given["A"] = -torch.arange(1, N + 1).expand(C, N) * torch.exp(0.3 * torch.randn(C, N, dtype=torch.float64))
    given["dt_bias"] = torch.randn(C, dtype=torch.float64) - 3
    given["state"] = torch.randn(rows or B, C, N, dtype=torch.float64)
    return {name: x.to(DEVICE) for name, x in given.items()}


def run(given: dict[str, Tensor], backend: str, **how: Any) -> dict[str, Tensor]:
    """Outputs and gradients by name, of a weighting drawn in bfloat16: exact in every dtype of y."""
    live = {name: x.detach().requires_grad_() for name, x in given.items()}
    y, end = selective_scan(**live, dt_softplus=True, backend=backend, **how)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    pulls = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in (y, end)]
    found = torch.autograd.grad([y, end], list(live.values()), pulls)
    return {"y": y.detach(), "end": end.detach(), **{f"d_{n}": d for n, d in zip(live, found, strict=True)}}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in root mean square."""
    return {
        name: float((got[name].double() - x).norm() / x.norm()) if x.any() else float(got[name].double().norm())
        for name, x in want.items()
    }


def low(given: dict[str, Tensor], half: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """As models have it: activations in half precision, parameters and state in float32."""
    return {name: x.to(half if name in ("x", "dt", "B", "C", "z") else torch.float32) for name, x in given.items()}


@whole_and_split
@pytest.mark.parametrize("T", TIMES)
def test_equation(T: int, split: bool) -> None:
    given = draw(1, T, 5, 3)
    assert max(errors(run(given, "triton"), run(given, "torch")).values()) <= 1e-10


@pytest.mark.parametrize(
    ("C", "N", "G"), [(33, 16, 1), (6, 5, 3), (70, 1, 2), (3, 37, 3), (2, 128, 1), *([(200, 256, 2)] if GPU else [])]
)
def test_any_size(C: int, N: int, G: int) -> None:
    given = draw(2, 7, C, N, G)
    assert max(errors(run(given, "triton"), run(given, "torch")).values()) <= 1e-10


@whole_and_split
def test_bfloat16(split: bool) -> None:
    given = low(draw(1, 4096 if GPU else 100, 37, 16))
    got, want = run(given, "triton"), run({name: x.double() for name, x in given.items()}, "torch")
    assert got["y"].dtype == got["d_x"].dtype == got["d_B"].dtype == torch.bfloat16
    assert got["d_A"].dtype == got["end"].dtype == torch.float32
    for name, error in errors(got, want).items():
        assert error <= (0.005 if name.startswith("d_") else 0.003), (name, error)


def test_alike_tokens_in_bfloat16() -> None:
    """One token again and again: what is rounded alike adds up."""
    given = draw(1, 1, 9, 16)
    given = {name: x.expand(-1, 80, *x.shape[2:]).contiguous() if x.dim() > 2 and name != "state" else x
             for name, x in given.items()}  # fmt: skip
    given = low(given)
    got, want = run(given, "triton"), run({name: x.double() for name, x in given.items()}, "torch")
    for name, error in errors(got, want).items():
        assert error <= (0.005 if name.startswith("d_") else 0.003), (name, error)


def test_float32_and_float16() -> None:
    given = draw(1, 70, 5, 16)
    for half, bound in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        rounded = low(given, half)
        got, want = run(rounded, "triton"), run({name: x.double() for name, x in rounded.items()}, "torch")
        assert max(errors(got, want).values()) <= bound


def test_a_step_size_of_its_own_dtype() -> None:
    given = low(draw(1, 9, 5, 4)) | {"dt": draw(1, 9, 5, 4)["dt"].float()}
    got, want = run(given, "triton"), run({name: x.double() for name, x in given.items()}, "torch")
    assert got["d_dt"].dtype == torch.float32
    assert errors(got, want)["d_dt"] <= 1e-5


@whole_and_split
@pytest.mark.parametrize("sizes", [[0, 33, 1, 70, 0], [32, 32]], ids=str)
def test_packed(sizes: list[int], split: bool) -> None:
    given = draw(1, sum(sizes), 3, 3, rows=len(sizes))
    bounds = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], device=DEVICE)
    got, want = (run(given, backend, cu_seqlens=bounds) for backend in ("triton", "torch"))
    assert max(errors(got, want).values()) <= 1e-10


@whole_and_split
def test_padded(split: bool) -> None:
    given = draw(4, 70, 3, 3)
    lengths = torch.tensor([70, 32, 0, 17], device=DEVICE)
    padding = torch.arange(70, device=DEVICE)[:, None] >= lengths[:, None, None]
    dirty = dict(given)
    for name in ("x", "dt", "z", "B", "C"):
        hole = padding[..., None] if given[name].dim() == 4 else padding
        dirty[name] = torch.where(hole, torch.nan, given[name])
    got, want = run(dirty, "triton", lengths=lengths), run(given, "torch", lengths=lengths)
    assert max(errors(got, want).values()) <= 1e-10


@whole_and_split
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_steps(dtype: torch.dtype, split: bool) -> None:
    """A step that forgets everything, one that changes nothing, and decays next to none."""
    given = draw(1, 40, 3, 4)
    given["dt"][:, 9] = 1e6
    given["dt"][:, 10:20] = -800.0
    given["A"][0] = -1e-8
    given["A"][1] = -1e4
    given = {name: x.to(dtype) for name, x in given.items()}
    got, want = run(given, "triton"), run({name: x.double() for name, x in given.items()}, "reference")
    assert all(torch.isfinite(x).all() for x in got.values())
    assert max(errors(got, want).values()) <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_strides_do_not_matter() -> None:
    given = draw(2, 9, 5, 4)
    spread = {name: torch.stack([x, x], -1)[..., 0] for name, x in given.items()}
    spread["x"] = given["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(x.is_contiguous() for x in spread.values())
    got, want = run(spread, "triton"), run(given, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)


@whole_and_split
def test_the_same_bits_again(split: bool) -> None:
    given = low(draw(1, 1000 if GPU else 40, 300 if GPU else 40, 16))
    one, other = run(given, "triton"), run(given, "triton")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_too_many_numbers_are_refused() -> None:
    given = draw(1, 2, 2, 300)
    with pytest.raises(ValueError, match="N from 1 to 256"):
        selective_scan(**given, backend="triton")
