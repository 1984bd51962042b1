"""WKV-7: the published kernels' numbers, equal forms, and decays no kernel was made for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from statewise.ops import backends, gpu
from statewise.ops.wkv7 import wkv7, wkv7_step

# The published numbers lie on the CPU, where Triton's kernels are interpreted.
INTERPRETED = pytest.mark.skipif(
    not (gpu.interpreting() and backends()["wkv7"]["triton"].serves), reason="not on a CPU"
)
NAMES = ("r", "log_w", "k", "v", "a", "b")


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def make(
    B: int = 2, T: int = 37, H: int = 2, K: int = 8, V: int = 5, *, scale: float = 0.6, erased: float = 0.0
) -> tuple[list[Tensor], Tensor]:
    """Float64 inputs with log_w in [-scale, 0], a share ``erased`` of it -inf; and a state."""
    kappa = torch.nn.functional.normalize(torch.randn(B, T, H, K, dtype=torch.float64), dim=-1)
    log_w = -scale * torch.rand_like(kappa)
    log_w = torch.where(torch.rand_like(kappa) < erased, -torch.inf, log_w)
    r, k = torch.randn_like(kappa), torch.randn_like(kappa)
    v = torch.randn(B, T, H, V, dtype=torch.float64)
    return [r, log_w, k, v, -kappa, kappa * torch.rand_like(kappa)], torch.randn(B, H, K, V, dtype=torch.float64)


def run(inputs: list[Tensor], state: Tensor, **options: object) -> list[Tensor]:
    """y, the end state, and the gradients of all inputs and the state under fixed random cotangents."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    y, end = wkv7(*leaves, **options)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=noise, dtype=torch.float64).to(y)
    dend = torch.randn(end.shape, generator=noise, dtype=torch.float64).to(end)
    return [y.detach(), end.detach(), *torch.autograd.grad([y, end], leaves, [dy, dend])]


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden/rwkv/op_wkv7.ops.safetensors")


@pytest.mark.parametrize("backend", ["reference", "torch", "native", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("decay", ["w", "x"])
@pytest.mark.parametrize("suffix", ["", "_s"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 5e-7), (torch.float32, 2e-5)])
def test_published_kernels(
    golden: dict[str, Tensor], backend: str, decay: str, suffix: str, dtype: torch.dtype, bound: float
) -> None:
    leaves = {n: golden[n].to(dtype, copy=True).requires_grad_() for n in ("r", decay, "k", "v", "a", "b")}
    raw = leaves[decay]
    log_w = -torch.exp(raw) if decay == "w" else -(torch.exp(torch.tensor(-0.5, dtype=dtype)) * torch.sigmoid(raw))
    heads = [x.unflatten(2, (2, 16)) for x in (leaves["r"], log_w, leaves["k"], leaves["v"], leaves["a"], leaves["b"])]
    state = None
    if suffix:
        leaves["s0"] = golden["s0"].to(dtype, copy=True).requires_grad_()
        state = leaves["s0"].transpose(2, 3)
    y, end = wkv7(*heads, state, backend=backend)
    loss = (y.flatten(2) * golden["dy"].to(dtype)).sum()
    if suffix:
        loss = loss + (end * golden["dsT"].to(dtype).transpose(2, 3)).sum()
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    assert relative(y.flatten(2), golden[f"y{suffix}"]) <= bound
    assert relative(end.transpose(2, 3), golden[f"sT{suffix}"]) <= bound
    if decay == "x":  # stored for w only: w = -softplus(-x) - 1/2
        found["w"] = found.pop("x") / torch.sigmoid(-golden["x"].to(dtype))
    for name, gradient in found.items():
        assert relative(gradient, golden[f"g_{name}{suffix}"]) <= bound, name


@settings(max_examples=25, deadline=None)
@given(
    T=st.sampled_from([1, 2, 3, 15, 16, 17, 33, 127, 128, 129, 150]),
    B=st.integers(1, 3),
    H=st.integers(1, 2),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    scale=st.sampled_from([0.0, 0.6, 2.5, 20.0, 1e4]),
    erased=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 1 << 30),
)
def test_parallel_equals_reference(
    T: int, B: int, H: int, K: int, V: int, scale: float, erased: float, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs, state = make(B, T, H, K, V, scale=scale, erased=erased)
    for fast, slow in zip(run(inputs, state, backend="torch"), run(inputs, state, backend="reference"), strict=True):
        assert torch.isfinite(fast).all()
        assert (fast - slow).norm() <= 1e-10 * slow.norm() + 1e-13


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.9, 2.1, 50.0, 1e4])
def test_float32_keeps_its_digits(scale: float) -> None:
    """On both sides of the switch between the two ways to form decays, and when one key repeats without decay."""
    inputs, state = make(1, 64, 2, 16, 16, scale=scale)
    if scale == 0.0:
        for index, sign in ((4, 1.0), (5, -1.0)):
            inputs[index] = sign * inputs[4][:, :1].expand_as(inputs[4])
    single = run([x.float() for x in inputs], state.float(), backend="torch")
    for got, want in zip(single, run(inputs, state, backend="reference"), strict=True):
        assert relative(got, want) <= 2e-5


def test_autocast_does_not_reach_inside() -> None:
    inputs, state = ([x.float() for x in make()[0]], make()[1].float())
    plain = run(inputs, state)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(inputs, state)
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_padding_is_as_if_alone(backend: str) -> None:
    inputs, state = make(4, 40)
    lengths = torch.tensor([0, 1, 23, 40])
    valid = torch.arange(40) < lengths[:, None]
    poisoned = [torch.where(valid[..., None, None], x, torch.nan) for x in inputs]
    got = run(poisoned, state, lengths=lengths, backend=backend)
    for row, n in enumerate(lengths.tolist()):
        leaves = [x[row : row + 1, :n].clone().requires_grad_() for x in inputs]
        begin = state[row : row + 1].clone().requires_grad_()
        y, end = wkv7(*leaves, begin, backend=backend)
        torch.testing.assert_close(got[0][row, :n], y[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(got[1][row], end[0], rtol=1e-11, atol=1e-12)
    for gradient in (got[0], *got[2:8]):
        assert torch.equal(gradient[~valid], torch.zeros_like(gradient[~valid]))
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_packing_is_as_if_separate(backend: str) -> None:
    inputs, _ = make(1, 45)
    state = torch.randn(5, 2, 8, 5, dtype=torch.float64)
    bounds = [0, 7, 7, 8, 40, 45]
    got = run(inputs, state, cu_seqlens=torch.tensor(bounds), backend=backend)
    for i, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        y, end = wkv7(*[x[:, lo:hi] for x in inputs], state[i : i + 1], backend=backend)
        torch.testing.assert_close(got[0][:, lo:hi], y, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(got[1][i], end[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, 36, 37])
def test_cut_anywhere_and_step(cut: int) -> None:
    inputs, state = make()
    whole, end = wkv7(*inputs, state)
    first, middle = wkv7(*[x[:, :cut] for x in inputs], state)
    second, last = wkv7(*[x[:, cut:] for x in inputs], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-11, atol=1e-12)
    if cut < 37:
        y, after = wkv7_step(*[x[:, cut] for x in inputs], middle)
        torch.testing.assert_close(y, whole[:, cut], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(after, wkv7(*[x[:, : cut + 1] for x in inputs], state)[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scale", [0.6, 30.0])
def test_gradcheck_and_opcheck(scale: float) -> None:
    inputs, state = make(1, 5, 1, 3, 2, scale=scale)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    assert torch.autograd.gradcheck(lambda *x: wkv7(*x, backend="torch"), leaves)
    torch.library.opcheck(torch.ops.statewise.wkv7, tuple(leaves))


def test_dtypes_and_inputs_untouched() -> None:
    inputs, state = make()
    half = [x.bfloat16() for x in inputs]
    half[1] = inputs[1].float()
    kept = [x.clone() for x in (*half, state)]
    y, end = wkv7(*half, state.float())
    assert y.dtype == torch.bfloat16
    assert end.dtype == torch.float32
    y, end = wkv7_step(*[x[:, 0] for x in half])
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    for before, after in zip(kept, (*half, state), strict=True):
        assert torch.equal(before, after)
    assert wkv7(*inputs)[1].dtype == torch.float64
    y, end = wkv7(*[x[:, :0] for x in inputs], state)
    assert y.shape == (2, 0, 2, 5)
    assert torch.equal(end, state)


def test_compiles_as_one_graph() -> None:
    inputs, state = make()
    lengths = torch.tensor([5, 37])
    compiled = torch.compile(wkv7, fullgraph=True, backend="aot_eager")
    for options in ({}, {"lengths": lengths}):
        for got, want in zip(compiled(*inputs, state, **options), wkv7(*inputs, state, **options), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 37, 2, 7)}, "wkv7: k has shape"),
        ({"v": torch.zeros(2, 37, 5)}, "wkv7: v has shape"),
        ({"state": torch.zeros(2, 2, 5, 8)}, r"wkv7: state has shape .* accepted is \(2, 2, 8, 5\)"),
        ({"r": torch.zeros(2, 37, 2, 8, dtype=torch.int64)}, "wkv7: r has dtype"),
        ({"backend": "cuda"}, "accepted are"),
        ({"lengths": torch.tensor([1, 38])}, "lengths"),
        ({"lengths": torch.tensor([1, 2]), "cu_seqlens": torch.tensor([0, 37])}, "both"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    inputs, state = make()
    arguments = dict(zip(NAMES, inputs, strict=True)) | {"state": state} | change
    with pytest.raises(ValueError, match=message):
        wkv7(**arguments)  # type: ignore[arg-type]
