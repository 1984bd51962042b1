"""wkv4 on a GPU, or in Triton's interpreter: both ways to go through a sequence, low precision, extreme keys."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.ops import wkv4
from statewise.state import WKV4State
from statewise.testing.tolerances import bound

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"
TIMES = [1, 33, 133, *([1000, 4097] if LARGE else [])]
LAUNCHES = importlib.import_module("statewise.ops.wkv4.triton")  # the package's own name is the operator's

every_way = pytest.mark.parametrize("serial", [True, False], ids=["serial", "in-blocks"])


def go(monkeypatch: pytest.MonkeyPatch, serial: bool) -> None:
    monkeypatch.setattr(LAUNCHES, "_SERIAL", 0 if serial else 1 << 30)


def draw(B: int, T: int, C: int, spread: float = 2.0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    start = {"num": normal(B, C), "den": 0.1 + normal(B, C).abs(), "max": spread * normal(B, C)}
    return {"k": spread * normal(B, T, C), "v": normal(B, T, C), "log_w": -normal(C).exp(), "u": normal(C), **start}


def run(given: dict[str, Tensor], backend: str, **how: Any) -> dict[str, Tensor]:
    """Outputs and gradients by name, of a weighting that bfloat16 holds exactly."""
    live = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    state = WKV4State(live["num"], live["den"], live["max"])
    y, end = wkv4(live["k"], live["v"], live["log_w"], live["u"], state, backend=backend, **how)
    generator = torch.Generator().manual_seed(3)
    outputs = (y, *end)
    pulls = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in outputs]
    found = torch.autograd.grad(outputs, list(live.values()), pulls)
    named = dict(zip(("y", "num'", "den'", "max'"), (x.detach() for x in outputs), strict=True))
    return named | {f"d_{name}": d for name, d in zip(live, found, strict=True)}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((got[name].double() - x).norm() / x.norm()) for name, x in want.items()}


@every_way
@pytest.mark.parametrize("T", TIMES)
def test_equation(monkeypatch: pytest.MonkeyPatch, T: int, serial: bool) -> None:
    go(monkeypatch, serial)
    given = draw(2, T, 37 if LARGE else 9)
    assert max(errors(run(given, "triton"), run(given, "reference")).values()) <= 1e-10


@every_way
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_half_precision(monkeypatch: pytest.MonkeyPatch, spread: float, serial: bool) -> None:
    go(monkeypatch, serial)
    low = {n: x.bfloat16() if n in ("k", "v") else x.float() for n, x in draw(2, TIMES[-1], 8, spread).items()}
    got, want = run(low, "triton"), run({name: x.double() for name, x in low.items()}, "reference")
    assert got["y"].dtype == got["d_k"].dtype == torch.bfloat16
    assert got["num'"].dtype == torch.float32
    for name, error in errors(got, want).items():
        assert error <= (0.005 if name.startswith("d_") else 0.003), (name, error)


@every_way
def test_single_precision_from_either_end_of_the_keys(monkeypatch: pytest.MonkeyPatch, serial: bool) -> None:
    """An offset of all keys, or repeated ones, cost outputs no digits."""
    go(monkeypatch, serial)
    limits = bound("wkv4", torch.float32)
    for offset, repeat in ((0.0, False), (256.0, False), (-256.0, True)):
        low = {name: x.float() for name, x in draw(2, 70, 8).items()}
        low["k"] = low["k"].bfloat16().float() + offset
        low["max"] = low["max"].bfloat16().float() + offset
        if repeat:
            low["k"][:, 1:] = low["k"][:, :1]
        got, want = run(low, "triton"), run({name: x.double() for name, x in low.items()}, "reference")
        assert errors(got, want)["y"] <= 1e-6
        for name, error in errors(got, want).items():
            assert error <= (limits.gradient if name.startswith("d_") else limits.forward), (name, offset, error)


@every_way
def test_the_gradient_of_the_start_survives_large_keys(monkeypatch: pytest.MonkeyPatch, serial: bool) -> None:
    """Where one exponent outweighs the rest, its gradient is small and must not drown in rounding."""
    go(monkeypatch, serial)
    for seed in range(4):
        given = draw(1, 40, 8, 30.0, seed)
        found = []
        for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
            x = {name: value.to(torch.float32).to(dtype) for name, value in given.items()}
            largest = x["max"].requires_grad_()
            state = WKV4State(x["num"], x["den"], largest)
            y, _ = wkv4(x["k"], x["v"], x["log_w"], x["u"], state, backend=backend)
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            found.append(torch.autograd.grad((y * weight).sum(), largest)[0].double())
        assert float((found[0] - found[1]).norm() / found[1].norm()) <= 1e-4


@every_way
@pytest.mark.parametrize("u", [80.0, -1e4, -torch.inf])
@pytest.mark.parametrize("log_w", [0.0, -1e4, -torch.inf])
def test_extremes(monkeypatch: pytest.MonkeyPatch, u: float, log_w: float, serial: bool) -> None:
    go(monkeypatch, serial)
    low = {name: x.float() for name, x in draw(1, 40, 4, 300.0).items()}
    low["k"][:, ::7] = -1e30
    low["u"].fill_(u)
    low["log_w"].fill_(log_w)
    live = {name: low[name].requires_grad_() for name in ("k", "v", "num", "den")}
    state = WKV4State(low["num"], low["den"], low["max"])
    y, end = wkv4(low["k"], low["v"], low["log_w"], low["u"], state, backend="triton")
    want, want_end = wkv4(
        low["k"].double(),
        low["v"].double(),
        low["log_w"].double(),
        low["u"].double(),
        WKV4State(*[leaf.double() for leaf in state]),
        backend="reference",
    )
    assert float((y - want).detach().norm() / want.norm()) <= 2e-5
    for leaf, other in zip(end, want_end, strict=True):
        assert float((leaf - other).detach().norm() / other.norm()) <= 2e-5
    grads = torch.autograd.grad(y.sum() + end.num.sum() + end.den.sum(), list(live.values()))
    assert all(bool(torch.isfinite(d).all()) for d in grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strided_and_mixed_inputs(dtype: torch.dtype) -> None:
    given = {name: x.float() for name, x in draw(2, 40, 6).items()}
    given["k"] = given["k"].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    given["v"] = torch.cat([given["v"], given["v"]], 2)[:, :, ::2]
    wide = {name: x.double() for name, x in given.items()}
    found = errors(run(given, "triton"), run(wide, "reference"))
    limit = 2e-5 if dtype == torch.float32 else 1e-3
    assert max(error for name, error in found.items() if name == "d_k") <= limit
    assert max(error for name, error in found.items() if name != "d_k") <= 2e-5


@every_way
def test_every_run_is_the_same(monkeypatch: pytest.MonkeyPatch, serial: bool) -> None:
    go(monkeypatch, serial)
    given = {name: x.float() for name, x in draw(2, 100, 37 if LARGE else 9).items()}
    one, two = run(given, "triton"), run(given, "triton")
    assert all(torch.equal(one[name], two[name]) for name in one)


@every_way
@pytest.mark.parametrize("sizes", [[40, 0, 1, 33], [64]], ids=str)
def test_packed(monkeypatch: pytest.MonkeyPatch, sizes: list[int], serial: bool) -> None:
    go(monkeypatch, serial)
    given = draw(len(sizes), sum(sizes), 5)
    given["k"], given["v"] = given["k"][:1], given["v"][:1]
    bounds = torch.tensor([0, *sizes], device=DEVICE).cumsum(0)
    got, want = (run(given, backend, cu_seqlens=bounds) for backend in ("triton", "reference"))
    assert max(errors(got, want).values()) <= 1e-10
