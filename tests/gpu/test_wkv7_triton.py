"""wkv7 on a GPU, or in Triton's interpreter: keys that repeat, low precision, strong decays, ragged batches, and what
is too large.

Legend: B batch, T time, H heads, K key rows, V value columns.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from statewise.ops import gpu, wkv7

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Chunks are 32 tokens.
TIMES = [1, 33, *([1000, 4096] if DEVICE == "cuda" else [])]
NAMES = ("y", "end", "r", "log_w", "k", "v", "a", "b", "state")


def make(
    keys: str = "random",
    B: int = 1,
    T: int = 100,
    H: int = 2,
    K: int = 64,
    V: int = 64,
    dtype: torch.dtype = torch.float64,
    *,
    scale: float = 1.0,
    erased: float = 0.0,
) -> tuple[list[Tensor], Tensor]:
    """What RWKV-7 feeds the operator; a share ``erased`` of log_w is -inf, the rest is multiplied by ``scale``."""
    size = {"dtype": torch.float64}
    k = torch.randn(B, T, H, K, **size)
    if keys == "correlated":  # cosine 0.8
        k = 2.0 * torch.randn(B, 1, H, K, **size) + k
    if keys == "repeated":
        k = k[:, :1].expand_as(k)
    kappa = torch.nn.functional.normalize(k, dim=-1)
    log_w = -0.6065306597 * torch.sigmoid(2 * torch.randn(B, T, H, K, **size) - 1) * scale
    log_w = torch.where(torch.rand(B, T, H, K, **size) < erased, -torch.inf, log_w)
    rate = torch.sigmoid(torch.randn(B, T, H, K, **size))
    r, v = torch.randn(B, T, H, K, **size), torch.randn(B, T, H, V, **size)
    inputs = [r, log_w, k * (0.5 + 0.5 * rate), v, -kappa, kappa * rate]
    return [x.to(DEVICE, dtype) for x in inputs], 0.1 * torch.randn(B, H, K, V, **size).to(DEVICE)


def run(inputs: list[Tensor], state: Tensor, **options: object) -> dict[str, Tensor]:
    """y, the end state, and all gradients under fixed cotangents that bfloat16 holds."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (*inputs, state)]
    y, end = wkv7(*leaves, **options)  # type: ignore[arg-type]
    noise = torch.Generator().manual_seed(7)
    pulls = [torch.randn(x.shape, generator=noise).bfloat16().to(x) for x in (y, end)]
    found = [y.detach(), end.detach(), *torch.autograd.grad([y, end], leaves, pulls)]
    return dict(zip(NAMES, found, strict=True))


def ratio(got: Tensor, want: Tensor) -> float:
    """Root mean square error by root mean square."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300))


def against_truth(inputs: list[Tensor], state: Tensor, **options: object) -> dict[str, float]:
    got = run(inputs, state, backend="triton", **options)
    want = run([x.double() for x in inputs], state.double(), backend="reference", **options)
    assert all(torch.isfinite(x).all() for x in got.values())
    return {name: ratio(got[name], want[name]) for name in NAMES}


@pytest.mark.parametrize("keys", ["random", "correlated", "repeated"])
def test_bfloat16(keys: str) -> None:
    inputs, state = make(keys, dtype=torch.bfloat16)
    error = against_truth(inputs, state.float())
    assert error["y"] <= 0.003
    assert error["end"] <= 0.004  # read, move and what is added are bfloat16 from chunk to chunk
    for name in NAMES[2:]:
        assert error[name] <= 0.005, name


@pytest.mark.parametrize("keys", ["random", "repeated"])
def test_precise(keys: str) -> None:
    """The float32 states show what is inside; y and the other gradients are bfloat16, itself off by 0.0017."""
    inputs, state = make(keys, dtype=torch.bfloat16)
    with gpu.precise():
        error = against_truth(inputs, state.float())
    assert max(error["end"], error["state"]) <= 6e-4
    assert error["y"] <= 0.0019
    assert max(error.values()) <= 0.0023


def test_one_token_over_and_over() -> None:
    """All that is learnt is nearly taken away again, 96 times: the worst there is for products of a chunk."""
    inputs, state = make("repeated", T=96, H=1)
    inputs = [x[:, :1].expand_as(x).clone() for x in inputs]
    inputs[1].fill_(-0.011)
    inputs[5] = -0.95 * inputs[4]
    error = against_truth([x.float() for x in inputs], state.float())
    assert max(error.values()) <= 2e-5
    with gpu.precise():
        error = against_truth([x.bfloat16() for x in inputs], state.float())
    assert error["y"] <= 0.01


@pytest.mark.parametrize("time", TIMES)
def test_float32(time: int) -> None:
    inputs, state = make(T=time, K=16, V=16, dtype=torch.float32)
    assert max(against_truth(inputs, state.float()).values()) <= 1e-5


@pytest.mark.parametrize(("K", "V"), [(5, 20), (33, 3), (128, 128)])
def test_sizes(K: int, V: int) -> None:
    inputs, state = make(B=2, T=35, H=1 if K == 128 else 3, K=K, V=V)
    assert max(against_truth(inputs, state).values()) <= 1e-10


@pytest.mark.parametrize(("scale", "erased"), [(4.0, 0.0), (50.0, 0.0), (1e5, 0.0), (1.0, 0.1), (1.0, 1.0), (0.0, 0.0)])
def test_any_decay(scale: float, erased: float) -> None:
    inputs, state = make(T=34, H=1, K=6, V=5, scale=scale, erased=erased)
    got = run(inputs, state, backend="triton")
    want = run(inputs, state, backend="reference")
    for name in NAMES:
        assert (got[name] - want[name]).norm() <= 1e-10 * want[name].norm() + 1e-13, name
    single = run([x.float() for x in inputs], state.float(), backend="triton")
    for name in NAMES:
        assert (single[name].double() - want[name]).norm() <= 2e-5 * want[name].norm() + 1e-6, name


@pytest.mark.parametrize("how", ["lengths", "cu_seqlens"])
def test_ragged(how: str) -> None:
    inputs, state = make(B=3 if how == "lengths" else 1, T=40, H=2, K=6, V=5)
    state = state if how == "lengths" else state.expand(3, -1, -1, -1).clone()
    where = torch.tensor([0, 33, 40] if how == "lengths" else [0, 0, 7, 40], device=DEVICE)
    assert max(against_truth(inputs, state, **{how: where}).values()) <= 1e-10


SEGMENTS = {
    "dense": {},
    "lengths": {"lengths": [600, 0, 300]},
    "cu_seqlens": {"cu_seqlens": [0, 0, 7, 263, 600]},
}


@pytest.mark.parametrize("how", SEGMENTS)
def test_segments_are_the_whole(how: str) -> None:
    """Rows are cut into segments of at least 256 tokens where they and heads are few."""
    options = {name: torch.tensor(value, device=DEVICE) for name, value in SEGMENTS[how].items()}
    inputs, state = make(B=3 if how == "lengths" else 1, T=600, H=1, K=16, V=20)
    if how == "cu_seqlens":
        state = torch.randn(4, 1, 16, 20, dtype=torch.float64, device=DEVICE)
    assert max(against_truth(inputs, state, **options).values()) <= 1e-10


def test_what_is_too_long_to_stay_whole_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where there are programs enough without."""
    module = importlib.import_module("statewise.ops.wkv7.triton")
    monkeypatch.setattr(gpu, "WHOLE", 512)
    monkeypatch.setattr(module, "_PROGRAMS", 1)
    inputs, state = make(T=600, H=2, K=16, V=16)
    assert max(against_truth(inputs, state).values()) <= 1e-10


@pytest.mark.parametrize("keys", ["random", "repeated"])
def test_segments_lose_no_digits(keys: str) -> None:
    inputs, state = make(keys, T=600, H=2, K=64, V=64, dtype=torch.bfloat16)
    error = against_truth(inputs, state.float())
    assert error["y"] <= 0.003
    assert error["end"] <= 0.004
    for name in NAMES[2:]:
        assert error[name] <= 0.005, name
    single = against_truth([x.float() for x in inputs], state.float())
    assert max(single.values()) <= 1e-5


def test_strides_mean_nothing_and_runs_agree() -> None:
    inputs, state = make(T=40, K=16, V=16, dtype=torch.bfloat16)
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    runs = [run(x, state.float(), backend="triton") for x in (inputs, across, inputs)]
    for other in runs[1:]:
        for name in NAMES:
            assert torch.equal(runs[0][name], other[name]), name


def test_too_large_is_refused_by_name_and_served_otherwise() -> None:
    inputs, state = make(T=2, H=1, K=130, V=4)
    with pytest.raises(ValueError, match=r"wkv7: backend 'triton' serves K and V up to 128"):
        wkv7(*inputs, state, backend="triton")
    assert wkv7(*inputs, state)[0].shape == (1, 2, 1, 4)
