"""WKV-6: the published kernels' numbers, equal forms, and decays no kernel was made for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from statewise.ops.wkv6 import wkv6, wkv6_step

NAMES = ("r", "log_w", "k", "v", "u")
KINDS = ("token", "rows", "heads")  # what log_w has one of its own for


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def make(
    kind: str = "token",
    B: int = 2,
    T: int = 37,
    H: int = 2,
    K: int = 8,
    V: int = 5,
    *,
    scale: float = 0.6,
    erased: float = 0.0,
) -> tuple[list[Tensor], Tensor]:
    """Float64 r, log_w, k, v, u with log_w in [-scale, 0], a share ``erased`` of it -inf; and a state."""
    r, k = torch.randn(2, B, T, H, K, dtype=torch.float64)
    shape = {"token": (B, T, H, K), "rows": (H, K), "heads": (H,)}[kind]
    log_w = torch.where(torch.rand(shape) < erased, -torch.inf, -scale * torch.rand(shape, dtype=torch.float64))
    v = torch.randn(B, T, H, V, dtype=torch.float64)
    u = torch.randn((H,) if kind == "heads" else (H, K), dtype=torch.float64)
    return [r, log_w, k, v, u], torch.randn(B, H, K, V, dtype=torch.float64)


def cut(inputs: list[Tensor], *index: slice | int) -> list[Tensor]:
    """The inputs with ``index`` into (B, T); what is constant in time stays."""
    return [x[index] if x.dim() == 4 else x for x in inputs]


def run(inputs: list[Tensor], state: Tensor, **options: object) -> list[Tensor]:
    """y, the end state, and the gradients of all inputs and the state under fixed random cotangents."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    y, end = wkv6(*leaves, **options)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=noise, dtype=torch.float64).to(y)
    dend = torch.randn(end.shape, generator=noise, dtype=torch.float64).to(end)
    return [y.detach(), end.detach(), *torch.autograd.grad([y, end], leaves, [dy, dend])]


@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
@pytest.mark.parametrize("name", ["op_wkv5", "op_wkv6"])
@pytest.mark.parametrize("suffix", ["", "_s"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 5e-7), (torch.float32, 2e-5)])
def test_published_kernels(
    shared: Path, backend: str, name: str, suffix: str, dtype: torch.dtype, bound: float
) -> None:
    golden = load_file(shared / f"golden/rwkv/{name}.ops.safetensors")
    leaves = {n: golden[n].to(dtype, copy=True).requires_grad_() for n in ("r", "w", "k", "v", "u")}
    r, w, k, v = (x.unflatten(2, (2, 16)) if x.dim() == 3 else x for x in list(leaves.values())[:4])
    state = None
    if suffix:
        leaves["s0"] = golden["s0"].to(dtype, copy=True).requires_grad_()
        state = leaves["s0"].transpose(2, 3)
    y, end = wkv6(r, -torch.exp(w), k, v, leaves["u"], state, backend=backend)
    loss = (y.flatten(2) * golden["dy"].to(dtype)).sum()
    if suffix:
        loss = loss + (end * golden["dsT"].to(dtype).transpose(2, 3)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert relative(y.flatten(2), golden[f"y{suffix}"]) <= bound
    assert relative(end.transpose(2, 3), golden[f"sT{suffix}"]) <= bound
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert relative(gradient, golden[f"g_{leaf}{suffix}"]) <= bound, leaf


@pytest.mark.parametrize("fast_form", ["torch", "native"])
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    T=st.sampled_from([1, 2, 3, 5, 31, 63, 64, 65, 100, 255, 256, 257, 330]),
    B=st.integers(1, 3),
    H=st.integers(1, 2),
    K=st.integers(1, 9),
    V=st.integers(1, 9),
    scale=st.sampled_from([0.0, 0.6, 2.5, 20.0, 1e4]),
    erased=st.sampled_from([0.0, 0.2, 1.0]),
    padded=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_fast_forms_equal_reference(
    fast_form: str,
    kind: str,
    T: int,
    B: int,
    H: int,
    K: int,
    V: int,
    scale: float,
    erased: float,
    padded: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs, state = make(kind, B, T, H, K, V, scale=scale, erased=erased)
    lengths = torch.randint(T + 1, (B,)) if padded else None
    fast, slow = (run(inputs, state, lengths=lengths, backend=backend) for backend in (fast_form, "reference"))
    for one, other in zip(fast, slow, strict=True):
        assert torch.isfinite(one).all()
        assert (one - other).norm() <= 1e-10 * other.norm() + 1e-13


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("kind", ["token", "rows"])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.6, 3.0, 50.0, 1e4])
def test_float32_keeps_its_digits(backend: str, kind: str, scale: float) -> None:
    inputs, state = make(kind, 1, 200, 2, 16, 16, scale=scale)
    single, begin = [x.float() for x in inputs], state.float()
    # The truth starts from the very numbers float32 was given.
    truth = run([x.double() for x in single], begin.double(), backend="reference")
    for got, want in zip(run(single, begin, backend=backend), truth, strict=True):
        # What is below float32's range (a gradient of 1e-212) is rightly zero.
        assert (got.double() - want).norm() <= 2e-5 * want.norm() + torch.finfo(torch.float32).tiny


def test_a_sum_by_hand() -> None:
    """Three tokens, one row: the first is read by the second in full, by the third after one decay."""
    r = k = torch.ones(1, 3, 1, 1)
    v = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1)
    log_w = torch.log(torch.tensor([0.1, 0.5, 0.25])).view(1, 3, 1, 1)
    for backend in ("reference", "torch", "native", "triton"):
        y, end = wkv6(r, log_w, k, v, torch.tensor([2.0]), backend=backend)
        torch.testing.assert_close(y.flatten(), torch.tensor([2.0, 1.0 + 20.0, 0.5 + 10.0 + 200.0]))
        torch.testing.assert_close(end.flatten(), torch.tensor([0.25 * (0.5 + 10.0) + 100.0]))


@pytest.mark.parametrize("kind", ["rows", "heads"])
@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_a_constant_decay_is_one_repeated(kind: str, backend: str) -> None:
    inputs, state = make(kind, T=150)
    r, log_w, k, v, u = inputs
    spread = (log_w[:, None] if kind == "heads" else log_w).expand(r.shape)
    bonus = (u[:, None] if kind == "heads" else u).expand(2, 8)
    one = run(inputs, state, backend=backend)
    other = run([r, spread, k, v, bonus], state, backend=backend)
    over = (0, 1, 3) if kind == "heads" else (0, 1)
    other[3] = other[3].sum(over)
    other[6] = other[6].sum(1) if kind == "heads" else other[6]
    for a, b in zip(one, other, strict=True):
        assert relative(a, b) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_erased_is_gone(backend: str, kind: str, dtype: torch.dtype) -> None:
    """However large it was, and from gradients too: no least number in place of a decay of zero."""
    inputs, state = make(kind, T=20, erased=1.0)
    inputs, state = [x.to(dtype) for x in inputs], state.to(dtype) * torch.finfo(dtype).max ** 0.9
    y, end, *gradients = run(inputs, state, backend=backend)
    assert torch.equal(end, inputs[2][:, -1, :, :, None] * inputs[3][:, -1, :, None, :])
    assert y[:, 2:].abs().max() < 1e3
    assert not gradients[1].any()


def test_autocast_does_not_reach_inside() -> None:
    inputs, state = ([x.float() for x in make()[0]], make()[1].float())
    plain = run(inputs, state)
    with torch.autocast("cpu", torch.bfloat16):
        under = run(inputs, state)
    for a, b in zip(plain, under, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_as_if_alone(kind: str, backend: str) -> None:
    inputs, state = make(kind, 4, 70, scale=3.0)
    lengths = torch.tensor([0, 1, 66, 70])
    valid = torch.arange(70) < lengths[:, None]
    poisoned = [torch.where(valid[..., None, None], x, torch.nan) if x.dim() == 4 else x for x in inputs]
    got = run(poisoned, state, lengths=lengths, backend=backend)
    for row, n in enumerate(lengths.tolist()):
        y, end = wkv6(*cut(inputs, slice(row, row + 1), slice(n)), state[row : row + 1], backend=backend)
        torch.testing.assert_close(got[0][row, :n], y[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(got[1][row], end[0], rtol=1e-11, atol=1e-12)
    for gradient in got:
        assert torch.isfinite(gradient).all()
        if gradient.shape[:2] == (4, 70):
            assert torch.equal(gradient[~valid], torch.zeros_like(gradient[~valid]))


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_is_as_if_separate(kind: str, backend: str) -> None:
    inputs, _ = make(kind, 1, 75)
    state = torch.randn(5, 2, 8, 5, dtype=torch.float64)
    bounds = [0, 7, 7, 8, 73, 75]
    got = run(inputs, state, cu_seqlens=torch.tensor(bounds), backend=backend)
    for i, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        y, end = wkv6(*cut(inputs, slice(None), slice(lo, hi)), state[i : i + 1], backend=backend)
        torch.testing.assert_close(got[0][:, lo:hi], y, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(got[1][i], end[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 99, 100])
def test_cut_anywhere_and_step(kind: str, at: int) -> None:
    inputs, state = make(kind, T=100)
    rows = slice(None)
    whole, end = wkv6(*inputs, state)
    first, middle = wkv6(*cut(inputs, rows, slice(at)), state)
    second, last = wkv6(*cut(inputs, rows, slice(at, None)), middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-11, atol=1e-12)
    if at < 100:
        y, after = wkv6_step(*cut(inputs, rows, at), middle)
        torch.testing.assert_close(y, whole[:, at], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(after, wkv6(*cut(inputs, rows, slice(at + 1)), state)[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.6, 30.0])
def test_gradcheck(backend: str, kind: str, scale: float) -> None:
    inputs, state = make(kind, 1, 6, 1, 3, 2, scale=scale)
    leaves = [x.requires_grad_() for x in (*inputs, state)]
    assert torch.autograd.gradcheck(lambda *x: wkv6(*x, backend=backend), leaves)


def test_dtypes_and_inputs_untouched() -> None:
    inputs, state = make()
    half = [x.bfloat16() for x in inputs]
    half[1], half[4] = inputs[1].float(), inputs[4].float()
    kept = [x.clone() for x in (*half, state)]
    y, end = wkv6(*half, state.float())
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    y, end = wkv6_step(*cut(half, slice(None), 0))
    assert (y.dtype, end.dtype) == (torch.bfloat16, torch.float32)
    for before, after in zip(kept, (*half, state), strict=True):
        assert torch.equal(before, after)
    assert wkv6(*inputs)[1].dtype == torch.float64
    y, end = wkv6(*cut(inputs, slice(None), slice(0)), state)
    assert y.shape == (2, 0, 2, 5)
    assert torch.equal(end, state)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(backend: str, kind: str) -> None:
    inputs, state = make(kind, 0)
    y, end, *gradients = run(inputs, state, backend=backend)
    assert (y.shape, end.shape) == ((0, 37, 2, 5), (0, 2, 8, 5))
    assert all(float(gradient.abs().sum()) == 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 37, 2, 7)}, "wkv6: k has shape"),
        ({"v": torch.zeros(2, 37, 5)}, "wkv6: v has shape"),
        ({"log_w": torch.zeros(37, 2, 8)}, r"wkv6: log_w has shape .* accepted is \(B, T, H, K\)"),
        ({"log_w": torch.zeros(8, 2)}, r"wkv6: log_w has shape .* accepted is \(H, K\) with H=2, K=8"),
        ({"log_w": None}, "wkv6: log_w must be a tensor"),
        ({"u": torch.zeros(8)}, r"wkv6: u has shape .* accepted is \(H\) with H=2"),
        ({"state": torch.zeros(2, 2, 5, 8)}, r"wkv6: state has shape .* accepted is \(2, 2, 8, 5\)"),
        ({"r": torch.zeros(2, 37, 2, 8, dtype=torch.int64)}, "wkv6: r has dtype"),
        ({"lengths": torch.tensor([1, 38])}, "lengths"),
        ({"lengths": torch.tensor([1, 2]), "cu_seqlens": torch.tensor([0, 37])}, "both"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    inputs, state = make()
    arguments = dict(zip(NAMES, inputs, strict=True)) | {"state": state} | change
    with pytest.raises(ValueError, match=message):
        wkv6(**arguments)  # type: ignore[arg-type]
