"""ssd: the published package's numbers, equal forms in every size, options in every form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from statewise import ops
from statewise.ops import gpu, ssd, ssd_step

# Triton's where its interpreter runs; on a GPU tests/gpu/test_ssd_triton.py holds it.
INTERPRETED = () if gpu.serves(torch.device("cpu")) else ("triton",)
BACKENDS = [n for n, s in ops.backends()["ssd"].items() if s.serves and (n != "triton" or INTERPRETED)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)

CASES = (
    "usual",
    "ragged_init",
    "groups_max_z",
    "D_hdim",
    "noD",
    "dt_limit",
    "len1",
    "longmem",
    "strong_decay",
    "packed",
)
#: Steps and decays of many magnitudes: float32 gradients are held to 1e-4.
STRESS = ("longmem", "strong_decay")


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    assert torch.isfinite(x).all()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


@every_backend
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_published_numbers(shared: Path, case: str, backend: str, dtype: torch.dtype) -> None:
    path = shared / f"golden/mamba/ops/m2_ssd_{case}.safetensors"
    file, told = load_file(path), json.loads(path.with_suffix(".json").read_text())
    leaves = {
        name[3:]: value.to(dtype, copy=True).requires_grad_()
        for name, value in file.items()
        if name.startswith("in.") and value.dtype.is_floating_point
    }
    low, high = told.get("dt_limit", [0.0, None])
    start = "initial_states" if case == "packed" else "initial_state"
    start = next((name for name in (start, "initial_states") if name in leaves), start)
    y, end = ssd(
        *[leaves[name] for name in ("x", "dt", "A", "B", "C")],
        leaves.get("D"),
        leaves.get("z"),
        dt_bias=leaves.get("dt_bias"),
        dt_softplus=True,
        dt_limit=(low, float("inf") if high is None else high),
        state=leaves.get(start),
        cu_seqlens=file.get("in.cu_seqlens"),
        backend=backend,
    )
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    last = next(name for name in ("final_states", "final_state") if f"f64.{name}" in file)
    assert relative(y, file["f64.out"]) <= bound
    assert relative(end, file[f"f64.{last}"]) <= bound
    chosen, cotangents = [y], [file["cot.out"].to(dtype)]
    if f"cot.{last}" in file:
        chosen.append(end)
        cotangents.append(file[f"cot.{last}"].to(dtype))
    found = torch.autograd.grad(chosen, list(leaves.values()), cotangents)
    if dtype == torch.float32:
        bound = 1e-4 if case in STRESS else 2e-5
    checked = 0
    for name, gradient in zip(leaves, found, strict=True):
        assert relative(gradient, file[f"f64.grad.{name}"]) <= bound, name
        checked += 1
    assert checked == len(leaves) >= 5


def make(batch: int, T: int, heads: int, G: int, P: int, N: int, *, largest: float) -> list[Tensor]:
    """Float64 x, dt in [0, largest], A, B, C, D, z and a state."""
    x, z = torch.randn(2, batch, T, heads, P).double()
    dt = largest * torch.rand(batch, T, heads).double()
    A = -torch.exp(torch.randn(heads).double())
    B, C = torch.randn(2, batch, T, G, N).double()
    return [x, dt, A, B, C, torch.randn(heads, P).double(), z, torch.randn(batch, heads, P, N).double()]


def run(inputs: list[Tensor], backend: str, **options: object) -> list[Tensor]:
    """y, the end state, and the gradients of everything under fixed random cotangents."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y, end = ssd(*leaves[:-1], state=leaves[-1], backend=backend, **options)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(out.shape, generator=noise, dtype=torch.float64).to(out) for out in (y, end)]
    return [y.detach(), end.detach(), *torch.autograd.grad([y, end], leaves, cotangents)]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in ("reference", *INTERPRETED)])
@settings(max_examples=40, deadline=None)
@given(
    T=st.sampled_from([1, 2, 7, 8, 9, 31, 63, 64, 65, 130]),
    batch=st.integers(1, 3),
    G=st.integers(1, 3),
    per_group=st.integers(1, 3),
    P=st.integers(1, 5),
    N=st.integers(1, 20),
    largest=st.sampled_from([0.0, 0.1, 2.0, 50.0, 1e4]),
    seed=st.integers(0, 1 << 30),
)
def test_every_form_is_the_reference(
    backend: str, T: int, batch: int, G: int, per_group: int, P: int, N: int, largest: float, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = make(batch, T, G * per_group, G, P, N, largest=largest)
    for fast, slow in zip(run(inputs, backend), run(inputs, "reference"), strict=True):
        assert torch.isfinite(fast).all()
        assert (fast - slow).norm() <= 1e-10 * slow.norm() + 1e-13


@every_backend
def test_a_huge_step_forgets_exactly(backend: str) -> None:
    torch.manual_seed(0)
    *inputs, state = make(1, 20, 2, 1, 3, 4, largest=1.0)
    inputs[1][:, 9] = 1e6
    live, state = [x.requires_grad_() for x in inputs], state.requires_grad_()
    y, end = ssd(*live, state=state, backend=backend)
    late, late_end = ssd(*[x[:, 9:] if x.dim() > 2 else x for x in live], backend=backend)
    assert relative(y[:, 9:], late) <= 1e-14
    assert relative(end, late_end) <= 1e-14
    to_state, *others = torch.autograd.grad([y[:, 9:].sum(), end.sum()], [state, *live])
    assert not to_state.any()
    assert all(torch.isfinite(gradient).all() for gradient in others)


@every_backend
def test_small_decays_keep_their_digits_behind_large_ones(backend: str) -> None:
    """Sums from the start of a chunk reach -1e5 here, where neighbours in float32 lie 0.008 apart."""
    torch.manual_seed(0)
    inputs = make(2, 150, 4, 2, 3, 5, largest=0.02)
    inputs[1][:, :10] = 1e4
    inputs[1][:, 90:93] = 1e4
    single = [x.float() for x in inputs]
    truth = run([x.double() for x in single], "reference")
    for got, want in zip(run(single, backend), truth, strict=True):
        # what is forgotten has exactly no gradient
        assert relative(got, want) <= 5e-6 if want.any() else not got.any()


@every_backend
def test_the_clamp_holds_in_every_form_and_stops_gradients(backend: str) -> None:
    torch.manual_seed(0)
    x, dt, A, B, C, D, z, state = make(1, 6, 2, 1, 3, 4, largest=1.0)
    limit = (0.3, 0.6)
    dt = dt.requires_grad_()
    y, end = ssd(x, dt, A, B, C, D, z, state=state, dt_limit=limit, backend=backend)
    want, want_end = ssd(x, dt.clamp(*limit), A, B, C, D, z, state=state, backend="reference")
    assert relative(y, want) <= 1e-13
    assert relative(end, want_end) <= 1e-13
    (found,) = torch.autograd.grad(y.sum(), dt)
    outside = (dt < 0.3) | (dt > 0.6)
    assert not found[outside].any()
    assert found[~outside].all()
    stepped = []
    for t in range(6):
        y_t, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], state=state, dt_limit=limit)
        stepped.append(y_t)
    assert relative(torch.stack(stepped, 1), want) <= 1e-13


def test_arguments_are_named_when_they_do_not_fit() -> None:
    x, dt, A, B, C, D, z, state = make(2, 5, 4, 2, 3, 4, largest=1.0)
    with pytest.raises(ValueError, match="3 groups"):
        ssd(x, dt, A, B[:, :, :1].expand(-1, -1, 3, -1), C[:, :, :1].expand(-1, -1, 3, -1))
    for bad in ((0.5, 0.1), (-1.0, 1.0), (0.0, float("nan")), (0.0, None), (0.0, 1.0, 2.0), 1.0):
        with pytest.raises(ValueError, match="dt_limit"):
            ssd(x, dt, A, B, C, dt_limit=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="D has shape"):
        ssd(x, dt, A, B, C, D[:, :2])
    with pytest.raises(ValueError, match="z has shape"):
        ssd(x, dt, A, B, C, D, z[:, :3])
    with pytest.raises(ValueError, match="state"):
        ssd(x, dt, A, B, C, state=state.transpose(2, 3))
