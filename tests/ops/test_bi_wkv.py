"""Bi-WKV: the equation against its direct evaluation, both forms against each other, and where exponents are at their
worst. It has no state, so the laws of causal operators do not fit; its own stand here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from statewise.ops import bi_wkv, bi_wkv_step, gpu
from statewise.testing.tolerances import FORMS, bound

# Triton's where its interpreter runs; on a GPU tests/gpu/test_bi_wkv_triton.py holds it.
INTERPRETED = () if gpu.serves(torch.device("cpu")) else ("triton",)
BACKENDS = ("reference", "torch", "native", *INTERPRETED)
NAMES = ("k", "v", "log_w", "u")
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def draw(rows: int, time: int, *, sign: float = -1.0, spread: float = 2.0, seed: int = 0) -> list[Tensor]:
    """k, v, log_w, u in float64; three channels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [spread * normal(rows, time, 3), normal(rows, time, 3), sign * normal(3).abs(), normal(3)]


def outcome(inputs: list[Tensor], **how: Any) -> tuple[Tensor, list[Tensor]]:
    """y, and the gradients of a random weighting of it."""
    live = [x.detach().clone().requires_grad_() for x in inputs]
    y = bi_wkv(*live, **how)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return y.detach(), list(torch.autograd.grad(y, live, weight.to(y.dtype)))


def hold(
    got: tuple[Tensor, list[Tensor]],
    want: tuple[Tensor, list[Tensor]],
    forward: float = FORMS.forward,
    gradient: float = FORMS.gradient,
) -> None:
    """Relative to the largest output and, since a gradient may cancel to nothing, to the largest of all gradients."""
    assert float((got[0].double() - want[0]).abs().max()) <= forward * float(want[0].abs().max())
    scale = max(float(g.abs().max()) for g in want[1])
    for name, one, other in zip(NAMES, got[1], want[1], strict=True):
        assert float((one.double() - other).abs().max()) <= gradient * scale, name


def golden_cases() -> list[str]:
    lengths = [1, 2, 3, 8, 31, 32, 33, 64, 196, 257, 1024]
    keys = ["k_masked_minus1e30", "k_minus300", "k_plus300", "k_std1000", "k_std30", "v_1e6"]
    decays = ["u80", "u_minus1e4", "w0_u0", "w20_unnormalised", "w2_unnormalised", "wneg2_unnormalised"]
    return [f"T{t}" for t in lengths] + keys + decays + ["spike_first", "spike_mid", "spike_last"]


def golden(shared: Path) -> dict[str, Tensor]:
    return load_file(shared / "golden" / "vision" / "biwkv_op.safetensors")


def test_every_golden_case_is_named(shared: Path) -> None:
    with safe_open(shared / "golden" / "vision" / "biwkv_op.safetensors", "pt") as file:
        assert {key.split("/")[0] for key in file.keys()} == set(golden_cases())  # noqa: SIM118 - no mapping


LONG = ("T196", "T257", "T1024")  # for the interpreter


@pytest.mark.parametrize(
    ("name", "backend"), [(n, b) for b in BACKENDS for n in golden_cases() if b != "triton" or n not in LONG]
)
def test_the_papers_numbers(shared: Path, name: str, backend: str) -> None:
    """``y`` and ``g*`` hold the equation; w there is -log_w."""
    case = {key.split("/")[1]: x for key, x in golden(shared).items() if key.startswith(f"{name}/")}
    for dtype in (torch.float64, torch.float32):
        live = {key: case[key].clone().to(dtype).requires_grad_() for key in ("k", "v", "w", "u")}
        y = bi_wkv(live["k"], live["v"], -live["w"], live["u"], backend=backend)
        gradients = torch.autograd.grad(y, list(live.values()), case["gy"].to(dtype))
        # In float32 the plain sum rounds exponents where they stand; its bound is that of any float32 operator.
        plain = bound("bi_wkv", dtype).forward
        limit = 1e-13 if dtype == torch.float64 else 2e-6 if backend == "torch" else plain
        spread = max(1.0, float(case["v"].std()))
        assert float((y.detach() - case["y"]).abs().max()) <= limit * spread
        for key, gradient in zip(live, gradients, strict=True):
            want = case[f"g{key}"]
            assert float((gradient - want).abs().max()) <= limit * max(1.0, float(want.abs().max())), key


@pytest.mark.parametrize("name", ["T2", "T3", "T8", "T31", "T32"])
@pytest.mark.parametrize(("kernel", "chunks", "limit"), [("cls", 32, 1e-5), ("seg", 16, 1e-6)])
def test_the_official_kernels_compute_another_sum(
    shared: Path, name: str, kernel: str, chunks: int, limit: float
) -> None:
    """With a token to each chunk their weight is e^{|t-i| log_w + k_i}, which here is a bonus less by log_w; the limit
    for the classification kernel is wider because it adds 1e-6 to denominators."""
    file = golden(shared)
    k, v, w, u = (file[f"{name}/{key}"].double() for key in ("k", "v", "w", "u"))
    theirs = file[f"{name}/kernel_{kernel}_y"].double()
    assert float((bi_wkv(k, v, -w, u) - theirs).abs().max()) > 1e-2
    off = float((bi_wkv(k, v, -w, u + w) - theirs).abs().max())
    assert off <= limit if k.shape[1] <= chunks else off > 1e-2


@both_backends
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_the_definition_as_a_sum(backend: str, sign: float) -> None:
    k, v, log_w, u = draw(2, 19, sign=sign)
    want = torch.empty_like(v)
    for t in range(19):
        weights = [
            torch.exp((abs(t - i) - 1) * log_w + k[:, i]) if i != t else torch.exp(u + k[:, t]) for i in range(19)
        ]
        want[:, t] = sum(w * v[:, i] for i, w in enumerate(weights)) / sum(weights)
    assert torch.allclose(bi_wkv(k, v, log_w, u, backend=backend), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 33, 70, 257, 1200])
@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("spread", [2.0, 1e3])
def test_parallel_is_reference(time: int, sign: float, spread: float) -> None:
    inputs = draw(2 if time < 1000 else 1, time, sign=sign, spread=spread)
    if spread == 1e3:
        inputs[0] = inputs[0].sign() * 1e3 + inputs[1]
    hold(outcome(inputs, backend="torch"), outcome(inputs, backend="reference"))


@settings(max_examples=30, deadline=None)
@given(
    time=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 3.0, 100.0, 1e4]),
    decay=st.sampled_from([-30.0, -1.0, -0.01, 0.0, 0.01, 1.0, 30.0]),
)
def test_parallel_is_reference_whatever_comes(time: int, seed: int, spread: float, decay: float) -> None:
    inputs = draw(2, time, sign=decay, spread=spread, seed=seed)
    hold(outcome(inputs, backend="torch"), outcome(inputs, backend="reference"))


@pytest.mark.parametrize("time", [1023, 1024, 1025, 2048, 2100])
@pytest.mark.parametrize("sign", [-0.02, -1.0, 0.5])
def test_the_kernel_at_the_edges_of_what_it_keeps(time: int, sign: float) -> None:
    """It scans the later chunks of 1024 tokens twice, the first once."""
    inputs = draw(1, time, sign=sign)
    hold(outcome(inputs, backend="native"), outcome(inputs, backend="torch"))
    lengths = torch.tensor([time - 3])
    hold(outcome(inputs, backend="native", lengths=lengths), outcome(inputs, backend="torch", lengths=lengths))


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [-torch.inf, -1e4, -20.0, 0.0, 1e-6, 20.0, 1e4])
def test_no_exponent_is_too_large(decay: float, dtype: torch.dtype, backend: str) -> None:
    k, v, _, u = (x.to(dtype) for x in draw(2, 50, spread=1e4))
    log_w = torch.full((3,), decay, dtype=dtype)
    y, gradients = outcome([k, v, log_w, u], backend=backend)
    for tensor in (y, *gradients):
        assert torch.isfinite(tensor).all()
    # An average lies within what it averages.
    assert (y.abs() <= v.abs().amax(1, keepdim=True) + 1e-6).all()


@both_backends
def test_a_decay_of_minus_infinity_sees_neighbours_only(backend: str) -> None:
    k, v = torch.zeros(1, 20, 1), torch.arange(20.0)[None, :, None] ** 2
    y = bi_wkv(k, v, torch.tensor([-torch.inf]), torch.tensor([-torch.inf]), backend=backend)
    n = torch.arange(20.0)
    want = ((n - 1) ** 2 + (n + 1) ** 2) / 2
    want[0], want[19] = 1.0, 18.0**2
    assert torch.allclose(y[0, :, 0], want)


@both_backends
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_time_has_no_direction(backend: str, sign: float) -> None:
    k, v, log_w, u = draw(2, 41, sign=sign)
    y = bi_wkv(k, v, log_w, u, backend=backend)
    flipped = bi_wkv(k.flip(1), v.flip(1), log_w, u, backend=backend)
    assert torch.allclose(flipped.flip(1), y, rtol=1e-11, atol=1e-13)


@both_backends
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("lengths", [[0, 1, 40], [17, 40, 16], [2, 15, 3], [0, 0, 0]], ids=str)
def test_padding_changes_nothing(backend: str, sign: float, lengths: list[int]) -> None:
    inputs = draw(3, 40, sign=sign, spread=5.0)
    weight = torch.randn(3, 40, 3, dtype=torch.float64)
    poisoned = [x.clone() for x in inputs]
    for row, length in enumerate(lengths):
        poisoned[0][row, length:] = torch.nan
        poisoned[1][row, length:] = torch.nan
    live = [x.requires_grad_() for x in poisoned]
    y = bi_wkv(*live, lengths=torch.tensor(lengths), backend=backend)
    k_grad, v_grad, *shared_grads = torch.autograd.grad(y, live, weight)
    want_shared = [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
    for row, length in enumerate(lengths):
        for padding in (y[row, length:], k_grad[row, length:], v_grad[row, length:]):
            assert torch.equal(padding, torch.zeros_like(padding))
        if length:
            alone = [x[row : row + 1, :length].clone().requires_grad_() for x in inputs[:2]]
            alone += [x.clone().requires_grad_() for x in inputs[2:]]
            y_alone = bi_wkv(*alone, backend=backend)
            grads = torch.autograd.grad(y_alone, alone, weight[row : row + 1, :length])
            for one, other in zip((y, k_grad, v_grad), (y_alone, *grads[:2]), strict=True):
                assert torch.allclose(one[row, :length], other[0], rtol=1e-10, atol=1e-12)
            want_shared = [total + part for total, part in zip(want_shared, grads[2:], strict=True)]
    for one, other in zip(shared_grads, want_shared, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-11)


@both_backends
def test_rows_are_independent(backend: str) -> None:
    k, v, log_w, u = draw(3, 40)
    y = bi_wkv(k, v, log_w, u, backend=backend)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(bi_wkv(k[order], v[order], log_w, u, backend=backend), y[order])
    k, v = k.clone(), v.clone()
    k[1], v[1] = torch.nan, torch.nan
    assert torch.equal(bi_wkv(k, v, log_w, u, backend=backend)[[0, 2]], y[[0, 2]])


@both_backends
@pytest.mark.parametrize("time", [32, 40])  # whole chunks are read in place
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_given_is_changed_and_every_run_is_the_same(backend: str, time: int, padded: bool) -> None:
    given = [x.requires_grad_() for x in draw(3, time)]
    lengths = torch.tensor([3, time, 0]) if padded else None
    before = [x.detach().clone() for x in given]
    runs = []
    for _ in range(2):
        y = bi_wkv(*given, lengths=lengths, backend=backend)
        runs.append((y.detach(), *torch.autograd.grad(y.square().sum(), given)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    for tensor in runs[0]:  # writing into what was returned must not reach what was given
        tensor.fill_(7.0)
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)


@both_backends
@pytest.mark.parametrize("sign", [-0.05, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_near_the_truth(dtype: torch.dtype, sign: float, backend: str) -> None:
    k, v, log_w, u = draw(2, 130, sign=sign)
    low = [k.to(dtype), v.to(dtype), log_w.float(), u.float()]  # parameters may stay float32 beside half activations
    got = outcome(low, backend=backend)
    assert got[0].dtype == dtype
    limits = bound("bi_wkv", dtype)
    truth = outcome([x.double() for x in low], backend="reference")
    # A weighting drawn for a bfloat16 y is itself rounded, so only float32 gradients are held to the truth's.
    hold(got, truth, limits.forward, torch.inf if dtype == torch.bfloat16 else limits.gradient)


def test_an_offset_of_all_keys_costs_no_digits() -> None:
    k, v, log_w, u = (x.float() for x in draw(2, 130))
    offset = 1024.0
    k = (k + offset) - offset  # what survives the offset
    near, far = outcome([k, v, log_w, u], backend="torch"), outcome([k + offset, v, log_w, u], backend="torch")
    assert torch.equal(near[0], far[0])
    for one, other in zip(near[1], far[1], strict=True):
        assert torch.equal(one, other)


def test_gradients_where_one_token_outweighs_the_rest() -> None:
    """They are some 1e-25 then, and the reference's are rounding: held against v_i - y_t = Σ_j p_tj (v_i - v_j)."""
    k, v, log_w, u = draw(1, 40, sign=-0.1, spread=0.1)
    k[0, 20] = 60.0
    live = [x.requires_grad_() for x in (k.clone(), v.clone(), log_w.clone(), u.clone())]
    weight = torch.randn(1, 40, 3, dtype=torch.float64)
    got = torch.autograd.grad(bi_wkv(*live, backend="torch"), live, weight)
    places = torch.arange(40)
    between = ((places[:, None] - places).abs() - 1)[..., None]  # (t, i, 1)
    p = torch.softmax(k[0] + torch.where(between < 0, u, between * log_w), 1)
    off = torch.einsum("tjc,ijc->tic", p, v[0][:, None] - v[0][None])
    exponents = p * off * weight[0][:, None]
    want = (
        exponents.sum(0),
        (between.clamp(min=0) * exponents).sum((0, 1)),
        exponents.diagonal().sum(1),
    )
    for name, one, other in zip(("k", "log_w", "u"), (got[0][0], got[2], got[3]), want, strict=True):
        assert float((one - other).abs().max()) <= 1e-6 * float(other.abs().max()), name


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in INTERPRETED])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("time", [5, 18])
def test_gradcheck(time: int, sign: float, backend: str) -> None:
    inputs = [x.requires_grad_() for x in draw(1, time, sign=sign, spread=1.0)]
    check = torch.autograd.gradcheck
    assert check(lambda *x: bi_wkv(*x, backend=backend), inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


class _Recorder(TorchDispatchMode):
    """Notes the arguments of every call to an operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "statewise":
            self.calls.append((function, tuple(x.detach().clone() for x in args)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("time", [16, 20])
def test_registered_operators_pass_opcheck(time: int) -> None:
    recorder = _Recorder()
    with recorder:
        bi_wkv(*[x.requires_grad_() for x in draw(2, time)], backend="torch").sum().backward()
    assert len(recorder.calls) == 2, "forward and backward are one operator each"
    for function, arguments in recorder.calls:
        backward = str(function).endswith("_backward.default")
        torch.library.opcheck(function, tuple(x if backward else x.requires_grad_() for x in arguments))


def test_forward_remembers_its_inputs_only() -> None:
    inputs = [x.requires_grad_() for x in draw(2, 300)]
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        bi_wkv(*inputs, backend="torch")
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs}


@pytest.mark.long
def test_compiles_whole() -> None:
    inputs = [x.float().requires_grad_() for x in draw(2, 40)]
    torch._dynamo.reset()
    compiled = torch.compile(bi_wkv, fullgraph=True)
    for lengths in (None, torch.tensor([40, 7])):
        want, got = (f(*inputs, lengths=lengths, backend="torch") for f in (bi_wkv, compiled))
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (got, want)]
        for one, other in zip(*grads, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@both_backends
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 5, 3), (2, 5, 0)], ids=str)
def test_empty(shape: tuple[int, int, int], backend: str) -> None:
    k, v = torch.zeros(shape, requires_grad=True), torch.zeros(shape, dtype=torch.bfloat16)
    rate = torch.zeros(shape[2], requires_grad=True)
    y = bi_wkv(k, v, rate, rate, lengths=torch.zeros(shape[0], dtype=torch.int64), backend=backend)
    assert y.shape == shape
    assert y.dtype == torch.bfloat16


def test_messages() -> None:
    k = torch.zeros(2, 3, 4)
    log_w = u = torch.zeros(4)
    with pytest.raises(ValueError, match="bi_wkv: state was given; accepted is None: it is not causal"):
        bi_wkv(k, k, log_w, u, state=torch.zeros(2, 4))  # type: ignore[arg-type]
    for state in (None, torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="bi_wkv_step: bi_wkv has no one-token form; it is not causal"):
            bi_wkv_step(k[:, 0], k[:, 0], log_w, u, state)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"bi_wkv: v has shape \(2, 3, 5\); accepted is \(B, T, C\) with B=2, T=3, C=4"
    ):
        bi_wkv(k, torch.zeros(2, 3, 5), log_w, u)
    with pytest.raises(ValueError, match=r"log_w has shape \(5,\)"):
        bi_wkv(k, k, torch.zeros(5), u)
    with pytest.raises(ValueError, match=r"k has dtype torch\.int64"):
        bi_wkv(k.long(), k, log_w, u)
    with pytest.raises(ValueError, match="must lie in 0"):
        bi_wkv(k, k, log_w, u, lengths=torch.tensor([4, 1]))
    nowhere = [x.to("meta") for x in (k, k, log_w, u)]
    for backend in ("native", "triton"):
        with pytest.raises(ValueError, match="cannot serve"):
            bi_wkv(*nowhere, backend=backend)
    with pytest.raises(ValueError, match="accepted are"):
        bi_wkv(k, k, log_w, u, backend="cuda")
    with pytest.raises(TypeError, match="cu_seqlens"):
        bi_wkv(k, k, log_w, u, cu_seqlens=torch.tensor([0, 3]))  # type: ignore[call-arg]


def test_steps_beyond_sixteen_bits() -> None:
    """The compiled form keeps steps in 16 bits up to 65,535 tokens, and in whole numbers of the sums' dtype beyond."""
    time = 66_000
    generator = torch.Generator().manual_seed(5)
    k, v = torch.randn(2, 1, time, 2, generator=generator, dtype=torch.float64)
    k[:, 0, 0] = k[:, -1, 1] = 12.0  # the largest term of all the others, as far away as can be
    log_w, u = torch.tensor([-1e-4, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    inputs = [k, v, log_w, u]
    hold(outcome(inputs, backend="native"), outcome(inputs, backend="torch"), 1e-11, 1e-11)


def test_y_changed_in_place_is_told() -> None:
    k, v = torch.randn(2, 1, 5, 3).requires_grad_()
    y = bi_wkv(k, v, torch.zeros(3), torch.zeros(3), backend="native")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()
