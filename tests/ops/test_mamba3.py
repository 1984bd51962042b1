"""mamba3: the published package's numbers, equal forms in every size, options in every form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from statewise import ops
from statewise.ops import mamba3, mamba3_step
from statewise.state import Mamba3State

BACKENDS = [name for name, status in ops.backends()["mamba3"].items() if status.serves]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
precise = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

#: Our name → theirs. The last three of time have (batch, H, T) there.
NAMES = {
    "C": "Q",
    "B": "K",
    "x": "V",
    "log_decay": "ADT",
    "dt": "DT",
    "trap": "Trap",
    "angles": "Angles",
    "C_bias": "Q_bias",
    "B_bias": "K_bias",
    "D": "D",
    "z": "Z",
    "mimo_x": "MIMO_V",
    "mimo_z": "MIMO_Z",
    "mimo_o": "MIMO_O",
}
HEADS_FIRST = ("log_decay", "dt", "trap")


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    assert x.shape == y.shape
    assert torch.isfinite(x).all()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def open_case(path: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The file, our arguments made of leaves that gradients are asked of, and what is told beside it."""
    file = load_file(path)
    leaves = {
        name[3:]: value.to(dtype, copy=True).requires_grad_()
        for name, value in file.items()
        if name.startswith("in.") and value.dtype.is_floating_point
    }
    return file, leaves, json.loads(path.with_suffix(".json").read_text())


def ours(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: leaves[theirs] for name, theirs in NAMES.items() if theirs in leaves}
    return {name: x.transpose(1, 2) if name in HEADS_FIRST else x for name, x in found.items()}


def hold_gradients(y: Tensor, file: dict[str, Tensor], leaves: dict[str, Tensor], bound: float) -> None:
    found = torch.autograd.grad(y, list(leaves.values()), file["cot.out"].to(y.dtype))
    for name, gradient in zip(leaves, found, strict=True):
        assert relative(gradient, file[f"f64.grad.{name}"]) <= bound, name


@every_backend
@precise
@pytest.mark.parametrize("case", ["usual", "init", "len1_init", "noZ_noD", "packed"])
def test_published_numbers(shared: Path, case: str, backend: str, dtype: torch.dtype) -> None:
    file, leaves, _ = open_case(shared / f"golden/mamba/ops/m3_siso_{case}.safetensors", dtype)
    state = None
    if "initial_k" in leaves:
        angle, ssm, k, v = (leaves[f"initial_{name}"] for name in Mamba3State._fields)
        state = Mamba3State(angle, ssm, k[:, None], v)
    y, end = mamba3(**ours(leaves), state=state, cu_seqlens=file.get("in.cu_seqlens"), backend=backend)
    bound = 1e-12 if dtype == torch.float64 else 5e-6
    assert relative(y, file["f64.out"]) <= bound
    for name, leaf in zip(end._fields, end, strict=True):
        assert relative(leaf.squeeze(1) if name == "k" else leaf, file[f"f64.final_{name}"]) <= bound, name
    hold_gradients(y, file, leaves, 1e-12 if dtype == torch.float64 else 5e-5)


@every_backend
@precise
@pytest.mark.parametrize("case", ["fullrope", "halfrope", "step_pairwise", "step_pairwise_init"])
def test_published_ranks(shared: Path, case: str, backend: str, dtype: torch.dtype) -> None:
    file, leaves, _ = open_case(shared / f"golden/mamba/ops/m3_mimo_{case}.safetensors", dtype)
    arguments, state = ours(leaves), None
    if "initial_k" in leaves:
        # Their v is spread over the ranks already and ours is not, so what waits in k and v is put into ssm beforehand.
        angle, ssm, k, v = (leaves[f"initial_{name}"] for name in Mamba3State._fields)
        late = ((1 - torch.sigmoid(arguments["trap"])) * arguments["dt"])[:, 0, :, None, None]
        waiting = late * torch.einsum("bhrp,bhrn->bhpn", v, k)
        state = Mamba3State(angle, ssm + waiting, torch.zeros_like(k).transpose(1, 2), torch.zeros_like(v[:, :, 0]))
    rotary = "pairwise" if "pairwise" in case else None
    y, end = mamba3(**arguments, rotary=rotary, state=state, backend=backend)
    bound = 1e-12 if dtype == torch.float64 else 5e-6
    assert relative(y, file["f64.out"]) <= bound
    if rotary is None:
        assert relative(end.ssm, file["f64.final_ssm_NP"].transpose(-1, -2)) <= bound
        assert relative(end.k, file["f64.final_k_LRHN"]) <= bound
    else:
        assert relative(end.ssm, file["f64.final_ssm"]) <= bound
        assert relative(end.k, file["f64.final_k"].transpose(1, 2)) <= bound
        spread = torch.einsum("bhp,hrp->bhrp", end.v, arguments["mimo_x"])
        assert relative(spread, file["f64.final_v"]) <= bound
        off = end.angle - file["f64.final_angle"]
        assert float((off - 2 * math.pi * torch.round(off / (2 * math.pi))).detach().abs().max()) <= 10 * bound
    hold_gradients(y, file, leaves, 1e-12 if dtype == torch.float64 else 5e-5)


def make(batch: int, T: int, H: int, G: int, P: int, N: int, S: int, R: int, *, largest: float) -> dict[str, Tensor]:
    """Float64 arguments, dt in [0, largest]; R = 0 means SISO."""
    ranks = (R,) if R else ()
    draw = {
        "C": torch.randn(batch, T, *ranks, G, N),
        "B": torch.randn(batch, T, *ranks, G, N),
        "x": torch.randn(batch, T, H, P),
        "log_decay": -largest * torch.rand(batch, T, H),
        "dt": largest * torch.rand(batch, T, H),
        "trap": 3 * torch.randn(batch, T, H),
        "angles": torch.randn(batch, T, H, S),
        "C_bias": torch.randn(H, *ranks, N),
        "B_bias": torch.randn(H, *ranks, N),
        "D": torch.randn(H),
        "z": torch.randn(batch, T, H, P),
    }
    if R:
        draw |= {name: torch.randn(H, R, P) for name in ("mimo_x", "mimo_z", "mimo_o")}
    draw |= {
        "state.angle": torch.randn(batch, H, S),
        "state.ssm": torch.randn(batch, H, P, N),
        "state.k": torch.randn(batch, R or 1, H, N),
        "state.v": torch.randn(batch, H, P),
    }
    return {name: value.double() for name, value in draw.items()}


def call(inputs: dict[str, Tensor], **how: Any) -> tuple[Tensor, Mamba3State]:
    state = Mamba3State(*[inputs[f"state.{name}"] for name in Mamba3State._fields])
    return mamba3(**{name: x for name, x in inputs.items() if "." not in name}, state=state, **how)


def run(inputs: dict[str, Tensor], backend: str, **how: Any) -> dict[str, Tensor]:
    """y, the end state, and the gradients of everything under fixed random cotangents."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, end = call(leaves, backend=backend, **how)
    noise = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(out.shape, generator=noise, dtype=torch.float64).to(out) for out in (y, *end)]
    gradients = torch.autograd.grad([y, *end], list(leaves.values()), cotangents)
    return {"y": y.detach(), **{f"end.{name}": leaf.detach() for name, leaf in end._asdict().items()}} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


@settings(max_examples=40, deadline=None)
@given(
    T=st.sampled_from([1, 2, 7, 31, 32, 33, 63, 64, 65, 130]),
    batch=st.integers(0, 3),
    G=st.integers(1, 2),
    per_group=st.integers(1, 3),
    P=st.integers(1, 4),
    half=st.integers(1, 5),
    S=st.integers(1, 5),
    R=st.integers(0, 3),
    rotary=st.sampled_from([None, "pairwise", "halved"]),
    largest=st.sampled_from([0.0, 0.1, 2.0, 50.0]),
    seed=st.integers(0, 1 << 30),
)
def test_the_parallel_form_is_the_reference(
    T: int,
    batch: int,
    G: int,
    per_group: int,
    P: int,
    half: int,
    S: int,
    R: int,
    rotary: str | None,
    largest: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    inputs = make(batch, T, G * per_group, G, P, 2 * half, min(S, half), R, largest=largest)
    fast, slow = (run(inputs, backend, rotary=rotary) for backend in ("torch", "reference"))
    for name, want in slow.items():
        assert torch.isfinite(fast[name]).all(), name
        assert (fast[name] - want).norm() <= 1e-10 * want.norm() + 1e-11, name


@every_backend
@pytest.mark.parametrize("ranks", [0, 2])
def test_what_is_forgotten_has_no_gradient(backend: str, ranks: int) -> None:
    """A decay of -inf at token 9: nothing before it, nor the half step that waits, is left, and nothing is NaN."""
    torch.manual_seed(0)
    inputs = make(1, 20, 2, 1, 3, 4, 2, ranks, largest=1.0)
    inputs["log_decay"][:, 9] = -torch.inf
    live = {name: x.requires_grad_() for name, x in inputs.items()}
    y, end = call(live, backend=backend)
    found = torch.autograd.grad([y[:, 9:].sum(), end.ssm.sum(), end.k.sum()], list(live.values()))
    gradients = dict(zip(live, found, strict=True))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    for name in ("B", "x", "trap"):
        assert not gradients[name][:, :9].any(), name
        assert gradients[name][:, 9:].any(), name
    for name in ("ssm", "k", "v"):
        assert not gradients[f"state.{name}"].any(), name
    assert gradients["state.angle"].any()


@every_backend
def test_enormous_steps_stay_finite(backend: str) -> None:
    torch.manual_seed(0)
    inputs = make(2, 70, 2, 1, 3, 4, 2, 0, largest=1e4)
    for name, value in run(inputs, backend).items():
        assert torch.isfinite(value).all(), name


@every_backend
def test_small_decays_keep_their_digits_behind_large_ones(backend: str) -> None:
    """Sums from the start of a chunk reach -1e5 here, where neighbours in float32 lie 0.008 apart."""
    torch.manual_seed(0)
    inputs = {name: x.float() for name, x in make(2, 150, 4, 2, 3, 6, 2, 0, largest=0.02).items()}
    inputs["log_decay"][:, :10] = -1e4
    inputs["log_decay"][:, 90:93] = -1e4
    truth = run({name: x.double() for name, x in inputs.items()}, "reference")
    for name, got in run(inputs, backend).items():
        want = truth[name]
        assert relative(got, want) <= 2e-5 if want.any() else not got.any(), name


@every_backend
def test_angles_count_turns_for_long(backend: str) -> None:
    """Ten thousand tokens of half a turn and a bit each: float32 sums of that would be off by 0.02."""
    T = 10_000
    inputs = make(1, T, 1, 1, 1, 2, 1, 0, largest=0.0)
    inputs = {name: x.float() for name, x in inputs.items()}
    inputs["dt"], inputs["angles"] = torch.ones(1, T, 1), torch.full((1, T, 1, 1), 0.6)
    inputs["state.angle"] = torch.zeros(1, 1, 1)
    _, end = call(inputs, backend=backend)
    exact = float(torch.tanh(torch.tensor(0.6).double())) * math.pi * T % (2 * math.pi)
    assert abs(float(end.angle) - exact) <= 5e-3
    assert 0 <= float(end.angle) <= 2 * math.pi


@every_backend
def test_ranks_can_be_left_apart(backend: str) -> None:
    torch.manual_seed(0)
    inputs = make(2, 9, 4, 2, 3, 6, 2, 3, largest=1.0)
    joined, end = call(inputs, backend=backend)
    weights = inputs.pop("mimo_o")
    apart, same = call(inputs, backend=backend)
    assert apart.shape == (2, 9, 3, 4, 3)
    assert relative(torch.einsum("btrhp,hrp->bthp", apart, weights), joined) <= 1e-13
    assert all(torch.equal(a, b) for a, b in zip(end, same, strict=True))
    shared = {name: x for name, x in inputs.items() if "." not in name}
    now = {name: x[:, 0] if x.dim() > 3 or name in HEADS_FIRST else x for name, x in shared.items()}
    now |= {name: inputs[name] for name in ("C_bias", "B_bias", "mimo_x", "mimo_z")}
    start = Mamba3State(*[inputs[f"state.{name}"] for name in Mamba3State._fields])
    assert relative(mamba3_step(**now, state=start, backend=backend)[0], apart[:, 0]) <= 1e-13


def test_one_rank_of_ones_is_siso() -> None:
    torch.manual_seed(0)
    inputs = make(2, 9, 4, 2, 3, 6, 3, 0, largest=1.0)
    want, end = call(inputs)
    ranked = {name: inputs[name].unsqueeze(2 if name in "CB" else 1) for name in ("C", "B", "C_bias", "B_bias")}
    ones = {name: torch.ones(4, 1, 3).double() for name in ("mimo_x", "mimo_z", "mimo_o")}
    got, same = call({**inputs, **ranked, **ones}, rotary="pairwise")
    assert relative(got, want) <= 1e-13
    assert all(relative(a, b) <= 1e-13 for a, b in zip(same, end, strict=True))
    other, _ = call({**inputs, **ranked, **ones})
    assert relative(other, want) > 0.1  # which entries are paired is no detail


def test_the_state_is_a_copy() -> None:
    inputs = {name: x.float() for name, x in make(1, 3, 2, 1, 2, 4, 1, 0, largest=1.0).items()}
    _, end = call(inputs)
    before = end.v.clone()
    inputs["x"].zero_()
    assert torch.equal(end.v, before)


def test_arguments_are_named_when_they_do_not_fit() -> None:
    inputs = make(2, 5, 4, 2, 3, 6, 2, 2, largest=1.0)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("C has shape", {"C": inputs["C"][:, :, 0]}),
        ("B_bias has shape", {"B_bias": inputs["B_bias"][:, :1]}),
        ("3 groups", {name: inputs[name][:, :, :, :1].expand(-1, -1, -1, 3, -1) for name in ("C", "B")}),
        (
            "4 angles",
            {"angles": inputs["angles"].repeat(1, 1, 1, 2), "state.angle": inputs["state.angle"].repeat(1, 1, 2)},
        ),
        ("mimo_z goes with", {"mimo_z": None}),
        ("mimo_z goes with", {"z": None}),
        ("mimo_z goes with", {"mimo_x": None}),
        ("state.k has shape", {"state.k": inputs["state.k"].transpose(1, 2)}),
        ("rotary is 'neox'", {"rotary": "neox"}),
    ]
    for message, change in wrong:
        with pytest.raises(ValueError, match=message):
            call({**inputs, **change})
    with pytest.raises(ValueError, match="mimo_o with mimo_x"):
        call(make(2, 5, 4, 2, 3, 6, 2, 0, largest=1.0) | {"mimo_o": inputs["mimo_o"]})
    shared = {name: x for name, x in inputs.items() if "." not in name}
    with pytest.raises(ValueError, match="Mamba3State"):
        mamba3(**shared, state=(inputs["state.ssm"],))  # type: ignore[arg-type]
