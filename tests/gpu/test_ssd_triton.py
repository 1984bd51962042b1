"""ssd's GPU kernels: on a GPU, or in Triton's interpreter with sizes to match.

Legend (B and C are the paper's matrices, so sizes are spelled out): H heads, P width of a head, N state size, G groups.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise import ops
from statewise.ops import gpu, ssd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not ops.backends()["ssd"]["triton"].serves, reason="triton does not run here")

#: (batch, T, H, P, G, N)
Sizes = tuple[int, int, int, int, int, int]
SHAPES: list[Sizes] = [
    (3, 1, 8, 16, 1, 24),
    (2, 70, 4, 16, 2, 24),
    (1, 150, 2, 40, 1, 130),
    *([(2, 1000, 8, 64, 2, 128), (1, 4096, 24, 64, 1, 128), (3, 333, 6, 100, 3, 256)] if DEVICE == "cuda" else []),
]
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")


def draw(sizes: Sizes, dtype: torch.dtype, kind: str = "random") -> dict[str, Tensor]:
    """What a layer would give, B and C random, alike from token to token, or one token's for all."""
    batch, T, H, P, G, N = sizes
    B, C = (torch.randn(batch, T, G, N) for _ in range(2))
    if kind == "correlated":
        B, C = (0.45 * value + 0.9 * torch.randn(batch, 1, G, N) for value in (B, C))
    if kind == "repeated":
        B, C = (value[:, :1].expand(-1, T, -1, -1) for value in (B, C))
    low = {"x": torch.randn(batch, T, H, P), "B": B, "C": C, "z": torch.randn(batch, T, H, P)}
    wide = {
        "dt": torch.randn(batch, T, H) - 2,
        "A": -torch.exp(torch.randn(H)),
        "D": torch.randn(H, P),
        "dt_bias": torch.randn(H),
        "state": torch.randn(batch, H, P, N),
    }
    kept = torch.float32 if dtype != torch.float64 else dtype
    made = {name: value.to(dtype) for name, value in low.items()} | {n: value.to(kept) for n, value in wide.items()}
    return {name: made[name].to(DEVICE) for name in NAMES}


def pulls(y: Tensor, end: Tensor) -> list[Tensor]:
    noise = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=noise).bfloat16().to(DEVICE, out.dtype) for out in (y, end)]


def run(inputs: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """y, the last state and all gradients, under cotangents that are the same for every dtype of y."""
    live = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y, end = ssd(**live, dt_softplus=True, backend=backend, **options)
    found = torch.autograd.grad([y, end], list(live.values()), pulls(y, end))
    return {"y": y.detach(), "end": end.detach()} | {
        f"gradient of {name}": value for name, value in zip(live, found, strict=True)
    }


def ratios(inputs: dict[str, Tensor], **options: Any) -> dict[str, float]:
    """Root mean square of errors over that of the truth: the reference in float64 on the same rounded inputs."""
    got = run(inputs, "triton", **options)
    truth = run({name: value.double() for name, value in inputs.items()}, "reference", **options)
    assert all(torch.isfinite(value).all() for value in got.values())
    return {
        name: float((got[name].double() - want).norm() / want.norm().clamp(min=1e-30)) for name, want in truth.items()
    }


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("kind", ["random", "repeated"])
@pytest.mark.parametrize("T", [70, 300], ids=["whole", "segments"])
def test_bfloat16_gradient_of_A(T: int, kind: str, heads: int) -> None:
    """A number a head, of which all tokens' parts may nearly cancel while rounding errors do not."""
    ratio = ratios(draw((1, T, heads, 16, 1, 24), torch.bfloat16, kind))["gradient of A"]
    assert ratio <= 0.001, f"{ratio:.1e}"


@pytest.mark.parametrize("sizes", SHAPES[:5], ids=str)
@pytest.mark.parametrize("kind", ["random", "correlated", "repeated"])
def test_bfloat16_is_near_the_truth(sizes: Sizes, kind: str) -> None:
    for name, ratio in ratios(draw(sizes, torch.bfloat16, kind)).items():
        assert ratio <= (0.005 if "gradient" in name else 0.003), f"{name}: {ratio:.1e}"


@pytest.mark.parametrize("power", [-60, 60])
def test_the_size_of_a_state_does_not_matter(power: int) -> None:
    """Backward stores states in float16, each with a power of two of its own."""
    inputs = draw((1, 70, 2, 16, 1, 24), torch.bfloat16)
    got = run(inputs, "triton")
    scaled = inputs | {name: inputs[name] * 2.0**power for name in ("x", "state")}
    large = run(scaled, "triton")
    for name, value in got.items():
        times = 0 if name in ("gradient of x", "gradient of state") else power
        assert torch.equal(large[name], value * 2.0**times), name


def test_precise_is_nearer() -> None:
    inputs = draw(SHAPES[1], torch.bfloat16)
    with gpu.precise():
        found = ratios(inputs)
    for name in ("end", "gradient of dt", "gradient of A", "gradient of D", "gradient of state"):  # float32 themselves
        assert found[name] <= 6e-4, f"{name}: {found[name]:.1e}"


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_wide_is_the_truth(sizes: Sizes, dtype: torch.dtype, bound: float) -> None:
    for name, ratio in ratios(draw(sizes, dtype)).items():
        assert ratio <= bound, f"{name}: {ratio:.1e}"


@pytest.mark.parametrize("largest", [0.0, 1e-6, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_steps_stay_finite_and_right(largest: float, dtype: torch.dtype) -> None:
    inputs = draw((1, 70, 2, 5, 1, 3), dtype)
    inputs["dt"] = largest * torch.rand_like(inputs["dt"])
    inputs["x"] = (inputs["x"] / max(1.0, largest)).to(dtype)
    inputs["dt_bias"].fill_(-30.0 if largest < 1 else 0.0)
    # softplus turns what is near zero into ln 2: kept near zero by the bias
    for name, ratio in ratios(inputs).items():
        if name not in ("gradient of dt", "gradient of A", "gradient of dt_bias", "gradient of x"):
            assert ratio <= (0.005 if dtype == torch.bfloat16 else 2e-5), f"{name}: {ratio:.1e}"


def test_segments_are_the_whole() -> None:
    """Long rows are cut where heads are few; ragged rows, too."""
    inputs = draw((1, 200, 1, 16, 1, 16), torch.float64)
    bounds = torch.tensor([0, 3, 3, 150, 200], device=DEVICE)
    inputs["state"] = torch.randn(4, 1, 16, 16, dtype=torch.float64, device=DEVICE)
    for name, ratio in ratios(inputs, cu_seqlens=bounds).items():
        assert ratio <= 1e-12, f"{name}: {ratio:.1e}"


def test_what_is_too_long_to_stay_whole_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where there are programs enough without."""
    module = importlib.import_module("statewise.ops.ssd.triton")
    monkeypatch.setattr(gpu, "WHOLE", 256)
    monkeypatch.setattr(module, "_PROGRAMS", 1)
    for name, ratio in ratios(draw((1, 300, 2, 16, 1, 16), torch.float64)).items():
        assert ratio <= 1e-12, f"{name}: {ratio:.1e}"


def test_memory_order_of_inputs_does_not_matter() -> None:
    inputs = draw((2, 40, 3, 5, 1, 4), torch.float32)
    # not dt, which torch works on first, in another order
    strided = {name: value.mT.contiguous().mT if value.dim() > 3 else value for name, value in inputs.items()}
    assert not strided["x"].is_contiguous()
    same(run(inputs, "triton"), run(strided, "triton"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("sizes", SHAPES[1:2] + SHAPES[3:], ids=str)
def test_every_run_is_the_same(sizes: Sizes) -> None:
    inputs = draw(sizes, torch.bfloat16)
    same(run(inputs, "triton"), run(inputs, "triton"))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")], ids=str)
def test_dtypes_may_be_mixed(dtypes: Sequence[str]) -> None:
    inputs = draw((1, 20, 2, 5, 1, 3), torch.float32)
    for name, dtype in zip(("x", "z", "B", "C"), [*dtypes, *dtypes], strict=True):
        inputs[name] = inputs[name].to(getattr(torch, dtype))
    got = run(inputs, "triton")
    assert all(got[f"gradient of {name}"].dtype == value.dtype for name, value in inputs.items())
    for name, ratio in ratios(inputs).items():
        assert ratio <= (0.005 if "gradient" in name else 0.003), f"{name}: {ratio:.1e}"


def test_too_many_states_are_refused_by_name_only() -> None:
    inputs = {name: value for name, value in draw((1, 2, 1, 2, 1, 257), torch.float32).items() if name != "state"}
    with pytest.raises(ValueError, match="N up to 256; B has N = 257"):
        ssd(**inputs, backend="triton")
    y, _ = ssd(**inputs)
    assert torch.equal(y, ssd(**inputs, backend="torch" if DEVICE == "cuda" else None)[0])
