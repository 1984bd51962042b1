"""bi_wkv on a GPU, or in Triton's interpreter: whole and in blocks, low precision, extreme keys and decays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.ops import bi_wkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"
# One block; whole forwards and in blocks backwards; in blocks: where these lie differs with the device.
TIMES = [1, 30, 50, 100, *([196, 256, 1000, 4097] if LARGE else [])]


def draw(B: int, T: int, C: int, sign: float = -1.0, spread: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    return {"k": spread * normal(B, T, C), "v": normal(B, T, C), "log_w": sign * normal(C).abs(), "u": normal(C)}


def run(given: dict[str, Tensor], backend: str, **how: Any) -> dict[str, Tensor]:
    """The output and gradients by name, of a weighting that bfloat16 holds exactly."""
    live = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    y = bi_wkv(**live, backend=backend, **how)  # type: ignore[arg-type]
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16().to(y)
    found = torch.autograd.grad(y, list(live.values()), pull)
    return {"y": y.detach(), **{f"d_{name}": d for name, d in zip(live, found, strict=True)}}


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative, but to nothing where nothing is due: a row of one token has no gradients but v's."""
    return {name: float((got[name].double() - x).norm()) / max(float(x.norm()), 1e-6) for name, x in want.items()}


@pytest.mark.parametrize("T", TIMES)
@pytest.mark.parametrize("sign", [-1.0, 0.05])
def test_equation(T: int, sign: float) -> None:
    given = draw(2, T, 37 if LARGE else 9, sign)
    assert max(errors(run(given, "triton"), run(given, "torch")).values()) <= 1e-9


@pytest.mark.parametrize("T", TIMES[1:])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_half_precision(T: int, spread: float) -> None:
    given = draw(2, T, 8, -0.1, spread)
    low = {name: x.bfloat16() if name in ("k", "v") else x.float() for name, x in given.items()}
    got, want = run(low, "triton"), run({name: x.double() for name, x in low.items()}, "reference")
    assert got["y"].dtype == got["d_k"].dtype == torch.bfloat16
    for name, error in errors(got, want).items():
        assert error <= (0.005 if name.startswith("d_") else 0.003), (name, error)


@pytest.mark.parametrize("T", TIMES[1:])
def test_an_offset_and_repeated_keys_in_single_precision(T: int) -> None:
    for offset, repeat in ((0.0, False), (256.0, False), (-256.0, True)):
        low = {name: x.float() for name, x in draw(2, T, 8, -0.05).items()}
        low["k"] = low["k"].bfloat16().float() + offset
        if repeat:
            low["k"][:, 1:] = low["k"][:, :1]
        got, want = run(low, "triton"), run({name: x.double() for name, x in low.items()}, "reference")
        for name, error in errors(got, want).items():
            assert error <= 2e-5, (name, offset, error)


@pytest.mark.parametrize("log_w", [-torch.inf, -1e4, 0.0, 20.0, 1e4])
@pytest.mark.parametrize("u", [80.0, -1e4])
def test_extremes(log_w: float, u: float) -> None:
    low = {name: x.float() for name, x in draw(1, 50, 4, spread=300.0).items()}
    low["k"][:, ::7] = -1e30
    low["log_w"].fill_(log_w)
    low["u"].fill_(u)
    got, want = run(low, "triton"), run({name: x.double() for name, x in low.items()}, "reference")
    assert float((got["y"] - want["y"]).norm() / want["y"].norm()) <= 2e-4  # exponents near 1e6 have few digits left
    assert all(bool(torch.isfinite(x).all()) for x in got.values())


def test_lengths() -> None:
    given = draw(4, 100, 5)
    lengths = torch.tensor([0, 1, 33, 100], device=DEVICE)
    got, want = (run(given, backend, lengths=lengths) for backend in ("triton", "reference"))
    assert max(errors(got, want).values()) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_strided_and_mixed_inputs(dtype: torch.dtype) -> None:
    given = {name: x.float() for name, x in draw(2, 50, 6).items()}
    given["k"] = given["k"].to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    given["v"] = torch.cat([given["v"], given["v"]], 2)[:, :, ::2]
    found = errors(run(given, "triton"), run({name: x.double() for name, x in given.items()}, "reference"))
    assert found.pop("d_k") <= (2e-5 if dtype == torch.float32 else 1e-3)
    assert max(found.values()) <= 2e-5


@pytest.mark.parametrize("T", TIMES[1:])
def test_every_run_is_the_same(T: int) -> None:
    given = {name: x.float() for name, x in draw(2, T, 37 if LARGE else 9).items()}
    one, two = run(given, "triton"), run(given, "triton")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gradients_where_one_token_outweighs_the_rest() -> None:
    """Single precision keeps them: they are what the others' leave, not a difference of large terms."""
    given = draw(1, 50, 3, -0.1, 0.1)
    given["k"][0, 20] = 12.0
    low = {name: x.float() for name, x in given.items()}
    got, want = run(low, "triton"), run({name: x.double() for name, x in low.items()}, "reference")
    for name in ("d_k", "d_log_w", "d_u"):
        assert errors(got, want)[name] <= 1e-3, (name, errors(got, want))
