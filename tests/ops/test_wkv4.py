"""WKV-4 against the official kernels' numbers, and where exponents are at their worst."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from statewise.ops import gpu, wkv4, wkv4_step
from statewise.state import WKV4State

# Triton's where its interpreter runs; on a GPU tests/gpu/test_wkv4_triton.py holds it.
INTERPRETED = () if gpu.serves(torch.device("cpu")) else ("triton",)
BACKENDS = ("reference", "torch", "native", *INTERPRETED)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", ["fresh", "given"])
@pytest.mark.parametrize("name", ["op_wkv4", "op_wkv4_stress"])
def test_official_numbers(shared: Path, name: str, start: str, dtype: torch.dtype, backend: str) -> None:
    golden = load_file(shared / "golden" / "rwkv" / f"{name}.ops.safetensors")
    end = "_s" if start == "given" else ""
    if f"y{end}" not in golden:
        pytest.skip(f"{name} has no run from a given state")
    live = {key: golden[key].to(dtype).requires_grad_() for key in ("time_decay", "time_first", "k", "v")}
    state = None
    if start == "given":
        state = WKV4State(*[golden[key].to(dtype).requires_grad_() for key in ("aa0", "bb0", "pp0")])
    y, after = wkv4(live["k"], live["v"], -live["time_decay"].exp(), live["time_first"], state, backend=backend)
    forward = 5e-7 if dtype == torch.float64 else 2e-5
    backward = 5e-7 if dtype == torch.float64 else (1e-4 if name.endswith("stress") else 2e-5)
    assert relative(y.detach(), golden[f"y{end}"]) <= forward
    if f"aa_T{end}" in golden:
        num, den, largest = (golden[f"{slot}_T{end}"].double() for slot in ("aa", "bb", "pp"))
        assert relative((after.num / after.den).detach(), num / den) <= forward
        assert relative((after.den.log() + after.max).detach(), den.log() + largest) <= forward
    (y * golden["dy"]).sum().backward()
    names = {"time_decay": "time_decay", "time_first": "time_first", "k": "k", "v": "v"}
    for key, label in names.items():
        assert relative(live[key].grad, golden[f"g_{label}{end}"]) <= backward, key  # type: ignore[arg-type]
    if state is not None:
        for leaf, label in zip(state, ("aa0", "bb0", "pp0"), strict=True):
            assert relative(leaf.grad, golden[f"g_{label}"]) <= backward, label  # type: ignore[arg-type]


def test_the_definition_as_a_sum() -> None:
    """The equation of the docstring, term by term, with no recurrence anywhere."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(2, 9, 3, dtype=torch.float64)
    log_w, u = -torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    want = torch.empty_like(v)
    for t in range(9):
        weights = [torch.exp((t - 1 - i) * log_w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])]
        want[:, t] = sum(w * v[:, i] for i, w in enumerate(weights)) / sum(weights)
    for backend in BACKENDS:
        assert torch.allclose(wkv4(k, v, log_w, u, backend=backend)[0], want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [0.0, -1e-6, -20.0, -1e4, -torch.inf])
def test_no_key_is_too_large(decay: float, dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    k = (1e4 * torch.randn(2, 50, 4)).to(dtype).requires_grad_()
    v = torch.randn(2, 50, 4).to(dtype).requires_grad_()
    u = torch.randn(4).to(dtype)
    log_w = torch.full((4,), decay, dtype=dtype)
    y, state = wkv4(k, v, log_w, u, backend=backend)
    (y.sum() + state.num.sum() + state.den.sum()).backward()
    for tensor in (y, *state, k.grad, v.grad):
        assert torch.isfinite(tensor).all()  # type: ignore[arg-type]
    # An average lies within what it averages.
    assert (y.abs() <= v.abs().amax(1, keepdim=True) + 1e-6).all()


def test_a_decay_of_minus_infinity_remembers_one_token() -> None:
    k, v = torch.zeros(1, 20, 1), torch.arange(20.0)[None, :, None]
    for backend in BACKENDS:
        y, _ = wkv4(k, v, torch.tensor([-torch.inf]), torch.tensor([-torch.inf]), backend=backend)
        # Only the token before; (q·v)/q may miss v by an ulp.
        torch.testing.assert_close(y[0, 1:, 0], torch.arange(19.0), rtol=2e-7, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    time=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 3.0, 100.0, 1e4]),
    decay=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
)
def test_chunks_are_the_loop(time: int, seed: int, spread: float, decay: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = (spread * draw(2, time, 3), draw(2, time, 3), -decay * draw(3).abs(), draw(3))
    state = WKV4State(draw(2, 3), draw(2, 3).abs(), spread * draw(2, 3))
    (y, end), (want, want_end) = (wkv4(*inputs, state, backend=backend) for backend in ("torch", "reference"))
    assert torch.allclose(y, want, rtol=1e-9, atol=1e-9)
    for a, b in zip(end, want_end, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_messages() -> None:
    k = torch.zeros(2, 3, 4)
    log_w = u = torch.zeros(4)
    with pytest.raises(ValueError, match=r"wkv4: v has shape \(2, 3, 5\); accepted is \(B, T, C\) with B=2, T=3, C=4"):
        wkv4(k, torch.zeros(2, 3, 5), log_w, u)
    with pytest.raises(ValueError, match=r"log_w has shape \(5,\)"):
        wkv4(k, k, torch.zeros(5), u)
    with pytest.raises(ValueError, match=r"k has dtype torch\.int64"):
        wkv4(k.long(), k, log_w, u)
    with pytest.raises(ValueError, match="must be a WKV4State"):
        wkv4(k, k, log_w, u, torch.zeros(2, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"state\.den has shape \(3, 4\); accepted is \(2, 4\)"):
        wkv4(k, k, log_w, u, WKV4State(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=r"wkv4_step: k has shape \(2, 3, 4\)"):
        wkv4_step(k, k, log_w, u)


def test_the_gradient_of_the_start_survives_large_keys() -> None:
    """Where one exponent outweighs the rest, its gradient is small and must not drown in rounding."""
    errors = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator)

        inputs = [30 * draw(1, 40, 8), draw(1, 40, 8), -draw(8).exp(), draw(8), draw(1, 8), draw(1, 8).abs() + 0.1]
        start, weight = 30 * draw(1, 8), draw(1, 40, 8)

        def gradient(dtype: torch.dtype, backend: str, inputs: list[Tensor] = inputs) -> Tensor:
            k, v, log_w, u, num, den = (x.to(dtype) for x in inputs)
            largest = start.to(dtype).requires_grad_()  # noqa: B023 - called before the loop goes on
            y, _ = wkv4(k, v, log_w, u, WKV4State(num, den, largest), backend=backend)
            return torch.autograd.grad((y * weight.to(dtype)).sum(), largest)[0]  # noqa: B023

        errors.append(relative(gradient(torch.float32, "torch"), gradient(torch.float64, "reference")))
    assert max(errors) <= 1e-4
