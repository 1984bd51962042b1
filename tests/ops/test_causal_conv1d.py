"""causal_conv1d: the published package's numbers, its other cache layouts, and windows longer than the row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.causal_conv1d import causal_conv1d, causal_conv1d_step

INTERPRETED = () if gpu.serves(torch.device("cpu")) else ("triton",)
backends = pytest.mark.parametrize("backend", ["reference", "torch", "native", *INTERPRETED])


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden/mamba/ops"


CASES = {
    "w4_init_b_silu": "silu",
    "w4_zero_b_silu": "silu",
    "w3_init_nob_noact": None,
    "w2_zero_nob_silu": "silu",
    "shorter_than_window": "silu",
}


@backends
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_published_numbers(golden: Path, case: str, backend: str, dtype: torch.dtype, bound: float) -> None:
    file = load_file(golden / f"conv1d_{case}.safetensors")
    leaves = {
        name: file[f"in.{name}"].to(dtype, copy=True).requires_grad_()
        for name in ("x", "weight", "bias", "initial_states")
        if f"in.{name}" in file
    }
    state = leaves["initial_states"].transpose(1, 2) if "initial_states" in leaves else None
    y, end = causal_conv1d(
        leaves["x"].transpose(1, 2),
        leaves["weight"],
        leaves.get("bias"),
        activation=CASES[case],
        state=state,
        backend=backend,
    )
    assert relative(y.transpose(1, 2), file["f64.out"]) <= bound
    assert relative(end.transpose(1, 2), file["f64.final_states"]) <= bound
    gradients = torch.autograd.grad(y, list(leaves.values()), file["cot.out"].to(dtype).transpose(1, 2))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert relative(gradient, file[f"f64.grad.{name}"]) <= bound, name


@backends
def test_packed_windows(golden: Path, backend: str) -> None:
    file = load_file(golden / "conv1d_varlen_states.safetensors")
    x = file["in.x"][None]
    _, end = causal_conv1d(x, torch.zeros(8, 5), cu_seqlens=file["in.cu_seqlens"], backend=backend)
    assert torch.equal(end.transpose(1, 2).double(), file["f64.states"])


def test_steps_from_a_circular_cache(golden: Path) -> None:
    """A circular cache holds the next write's place; turned to oldest-first, its last W-1 columns are the state."""
    file = load_file(golden / "conv1d_update_circular.safetensors")
    weight, bias = file["in.weight"].double(), file["in.bias"].double()
    size = file["in.conv_state"].shape[2]
    order = (file["in.cache_seqlens"][:, None] + torch.arange(size)) % size  # oldest first
    cache = file["in.conv_state"].double().gather(2, order.long()[:, None].expand(-1, 8, -1))
    state = cache[:, :, size - 3 :].transpose(1, 2)
    for x, want in zip(file["in.x_steps"].double(), file["f64.out_steps"], strict=True):
        y, state = causal_conv1d_step(x, weight, bias, activation="silu", state=state)
        assert relative(y, want) <= 1e-10


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 9),
    C=st.integers(1, 4),
    W=st.integers(1, 6),
    bias=st.booleans(),
    activation=st.sampled_from([None, "silu", "swish"]),
    data=st.data(),
)
def test_padded_rows_in_both_forms(
    B: int, T: int, C: int, W: int, bias: bool, activation: str | None, data: st.DataObject
) -> None:
    """Every row, however short beside the window, is what steps make of it."""
    lengths = torch.tensor([data.draw(st.integers(0, T)) for _ in range(B)])
    x, weight = torch.randn(B, T, C).double(), torch.randn(C, W).double()
    offset, state = torch.randn(C).double() if bias else None, torch.randn(B, W - 1, C).double()
    dirty = torch.where((torch.arange(T) < lengths[:, None])[..., None], x, torch.nan)
    for backend in ("reference", "torch"):
        y, end = causal_conv1d(
            dirty, weight, offset, activation=activation, state=state, lengths=lengths, backend=backend
        )
        for row, length in enumerate(lengths.tolist()):
            now, want = state[row : row + 1], []
            for t in range(length):
                out, now = causal_conv1d_step(x[row : row + 1, t], weight, offset, activation=activation, state=now)
                want.append(out[0])
            torch.testing.assert_close(end[row], now[0], rtol=1e-12, atol=1e-12)
            assert not y[row, length:].any()
            if want:
                torch.testing.assert_close(y[row, :length], torch.stack(want), rtol=1e-12, atol=1e-12)


@backends
def test_the_new_window_is_nobody_elses(backend: str) -> None:
    x, weight, state = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(2, 3, 3)
    _, end = causal_conv1d(x, weight, state=state, backend=backend)
    _, after = causal_conv1d_step(x[:, 0], weight, state=state)
    storages = {t.untyped_storage().data_ptr() for t in (x, weight, state)}
    assert end.untyped_storage().data_ptr() not in storages
    assert after.untyped_storage().data_ptr() not in storages
    assert end.untyped_storage().nbytes() == end.numel() * end.element_size()


def test_half_inputs_sum_in_float32() -> None:
    x, weight, bias = torch.randn(2, 9, 4).bfloat16(), torch.randn(4, 4), torch.randn(4)
    y, end = causal_conv1d(x, weight, bias, activation="silu")
    wide, _ = causal_conv1d(x.float(), weight, bias, activation="silu")
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, r"x has shape \(2, 5\); accepted is \(B, T, C\)"),
        ({"weight": torch.zeros(4, 3)}, r"weight has shape \(4, 3\).*C=3"),
        ({"weight": torch.zeros(3, 0)}, "W is at least 1"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"activation": "relu"}, "'relu'; accepted are None, 'silu', 'swish'"),
        ({"state": torch.zeros(2, 4, 3)}, r"state has shape \(2, 4, 3\); accepted is \(2, 3, 3\)"),
        ({"backend": "cuda"}, "accepted are None"),
        ({"backend": "native", "weight": torch.zeros(3, 9)}, "'native' serves W up to 8; weight has W = 9"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(3, 4), **change}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments)  # type: ignore[arg-type]
