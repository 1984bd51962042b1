"""wkv6's GPU kernels: on a GPU, or in Triton's interpreter with sizes to match.

Legend: B batch, T time, H heads, K key rows, V value columns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statewise import ops
from statewise.ops import gpu, wkv6

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(not ops.backends()["wkv6"]["triton"].serves, reason="triton does not run here")

#: (B, T, H, K, V)
Sizes = tuple[int, int, int, int, int]
SHAPES: list[Sizes] = [
    (1, 1, 3, 5, 3),
    (2, 70, 2, 24, 40),
    (1, 50, 2, 70, 66),  # several tiles of both
    *([(2, 1000, 4, 64, 64), (1, 4096, 32, 64, 64), (3, 333, 3, 128, 100)] if DEVICE == "cuda" else []),
]
NAMES = ("r", "log_w", "k", "v", "u", "state")


def draw(sizes: Sizes, dtype: torch.dtype, keys: str = "random", decay: str = "token") -> dict[str, Tensor]:
    """What a layer would give, keys random, alike from token to token, or one token's for all; log_w of many sizes, one
    of a token's or (``constant``, ``wide``) float32."""
    B, T, H, K, V = sizes
    r, k = torch.randn(2, B, T, H, K)
    if keys == "correlated":
        k = 0.45 * k + 0.9 * torch.randn(B, 1, H, K)
    if keys == "repeated":
        k = k[:, :1].expand(-1, T, -1, -1)
    log_w = -torch.exp(2 * torch.randn((H, K) if decay == "constant" else (B, T, H, K)) - 2)
    low = {"r": r, "k": k, "v": torch.randn(B, T, H, V)}
    wide = {"u": torch.randn(H, K), "state": torch.randn(B, H, K, V)}
    (low if decay == "token" else wide)["log_w"] = log_w
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    made = {name: x.to(dtype) for name, x in low.items()} | {name: x.to(kept) for name, x in wide.items()}
    return {name: made[name].to(DEVICE) for name in NAMES}


def run(inputs: dict[str, Tensor], backend: str, **options: Any) -> dict[str, Tensor]:
    """y, the last state and all gradients, under cotangents that are the same for every dtype of y."""
    live = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, end = wkv6(**live, backend=backend, **options)
    noise = torch.Generator().manual_seed(7)
    pulls = [torch.randn(out.shape, generator=noise).bfloat16().to(DEVICE, out.dtype) for out in (y, end)]
    found = torch.autograd.grad([y, end], list(live.values()), pulls)
    return {"y": y.detach(), "end": end.detach()} | {
        f"gradient of {name}": x for name, x in zip(live, found, strict=True)
    }


def ratios(inputs: dict[str, Tensor], **options: Any) -> dict[str, float]:
    """Root mean square of errors over that of the truth: the reference in float64 on the same rounded inputs."""
    got = run(inputs, "triton", **options)
    truth = run({name: x.double() for name, x in inputs.items()}, "reference", **options)
    assert all(torch.isfinite(x).all() for x in got.values())
    return {
        name: float((got[name].double() - want).norm() / want.norm().clamp(min=1e-30)) for name, want in truth.items()
    }


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("keys", ["random", "correlated", "repeated"])
def test_bfloat16_is_near_the_truth(sizes: Sizes, keys: str) -> None:
    for name, ratio in ratios(draw(sizes, torch.bfloat16, keys)).items():
        assert ratio <= (0.005 if "gradient" in name else 0.003), f"{name}: {ratio:.1e}"


@pytest.mark.parametrize("decay", ["wide", "constant"])
def test_bfloat16_beside_float32_decays(decay: str) -> None:
    for name, ratio in ratios(draw(SHAPES[1], torch.bfloat16, decay=decay)).items():
        assert ratio <= (0.005 if "gradient" in name else 0.003), f"{name}: {ratio:.1e}"


@pytest.mark.parametrize("decay", ["wide", "constant"])
def test_precise_is_nearer(decay: str) -> None:
    inputs = draw(SHAPES[1], torch.bfloat16, decay=decay)
    with gpu.precise():
        found = ratios(inputs)
    for name in ("end", "gradient of log_w", "gradient of u", "gradient of state"):  # float32 themselves
        assert found[name] <= 6e-4, f"{name}: {found[name]:.1e}"


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("decay", ["token", "constant"])
def test_wide_is_the_truth(sizes: Sizes, dtype: torch.dtype, bound: float, decay: str) -> None:
    for name, ratio in ratios(draw(sizes, dtype, decay=decay)).items():
        assert ratio <= bound, f"{name}: {ratio:.1e}"


@pytest.mark.parametrize("decay", ["token", "constant"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 3.0, 50.0, 1e4])
def test_any_decay_keeps_float32s_digits(decay: str, scale: float) -> None:
    inputs = draw((1, 90, 1, 16, 16), torch.float32, decay=decay)
    inputs["log_w"] = -scale * torch.rand_like(inputs["log_w"])
    got = run(inputs, "triton")
    truth = run({name: x.double() for name, x in inputs.items()}, "reference")
    for name, want in truth.items():
        # What is below float32's range is rightly zero.
        gap = float((got[name].double() - want).norm())
        assert gap <= 2e-5 * float(want.norm()) + torch.finfo(torch.float32).tiny, name


@pytest.mark.parametrize("decay", ["token", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_erased_is_gone(decay: str, dtype: torch.dtype) -> None:
    """However large it was, and from gradients too."""
    inputs = draw((1, 70, 2, 8, 5), dtype, decay=decay)
    inputs["log_w"] = torch.full_like(inputs["log_w"], -torch.inf)
    inputs["state"] *= 1e30
    found = run(inputs, "triton")
    last = inputs["k"][:, -1, :, :, None].float() * inputs["v"][:, -1, :, None, :].float()
    torch.testing.assert_close(found["end"], last, rtol=0.01, atol=1e-6)
    assert found["y"][:, 1:].abs().max() < 1e3
    assert not found["gradient of log_w"].any()


def test_some_rows_erased_some_kept() -> None:
    inputs = draw((1, 70, 2, 8, 5), torch.float32)
    erased = torch.rand(inputs["log_w"].shape, device=DEVICE) < 0.2
    inputs["log_w"] = torch.where(erased, -torch.inf, 0.01 * inputs["log_w"])
    for name, ratio in ratios(inputs).items():
        assert ratio <= 1e-5, f"{name}: {ratio:.1e}"


def test_memory_order_of_inputs_does_not_matter() -> None:
    inputs = draw((2, 20, 3, 8, 5), torch.float32)
    turned = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items()}
    assert not turned["r"].is_contiguous()
    for one, other in zip(run(inputs, "triton").values(), run(turned, "triton").values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_the_same_bits(dtype: torch.dtype) -> None:
    inputs = draw(SHAPES[1], dtype, decay="constant")
    for one, other in zip(run(inputs, "triton").values(), run(inputs, "triton").values(), strict=True):
        assert torch.equal(one, other)


def test_no_rows() -> None:
    inputs = draw((1, 20, 2, 8, 5), torch.float32)
    none = {name: x if name == "u" else x[:0] for name, x in inputs.items()}
    found = run(none, "triton")
    assert (found["y"].shape, found["end"].shape) == ((0, 20, 2, 5), (0, 2, 8, 5))
    assert not found["gradient of u"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_dtypes_come_back_as_they_went(dtype: torch.dtype) -> None:
    inputs = draw((1, 20, 2, 8, 5), dtype, decay="wide")
    inputs["k"] = inputs["k"].float()
    found = run(inputs, "triton")
    assert found["y"].dtype == dtype
    assert found["end"].dtype == torch.float32
    for name, x in inputs.items():
        assert found[f"gradient of {name}"].dtype == x.dtype, name
