"""Adapters to published packages: our arguments in, our layout out."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import ops as benchmark
from statewise.testing import peers
from statewise.testing.peers import PEERS, find_peers, rwkv_lm_loop

# A script like RWKV-LM's demo: running it whole fails, as the real one would for want of its weights. The recurrence is
# the paper's, S <- S diag(w) + (S a) b^T + v k^T on S[V, K], y = S r, with w = exp(-exp(raw)).
SCRIPT = """
raise SystemExit("the script must not be run")

if True:
    def RWKV7_OP(r, w, k, v, a, b):
        return "the one for GPUs"
else:
    def RWKV7_OP(r, w, k, v, a, b):
        r, w, k, v, a, b = (x.unflatten(-1, (-1, HEAD_SIZE)) for x in (r, w, k, v, a, b))
        S = torch.zeros(*r[:, 0].shape, HEAD_SIZE, dtype=DTYPE)
        ys = []
        for t in range(r.shape[1]):
            fed = torch.einsum("bhvk,bhk->bhv", S, a[:, t])
            S = S * torch.exp(-torch.exp(w[:, t]))[..., None, :]
            S = S + fed[..., None] * b[:, t, :, None] + v[:, t, ..., None] * k[:, t, :, None]
            ys.append(torch.einsum("bhvk,bhk->bhv", S, r[:, t]))
        return torch.stack(ys, 1).flatten(2)
"""


def small(op: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs at sizes that a test can afford."""
    inputs = {key: x.detach().to(dtype) for key, x in benchmark.draw(op, 32).items()}
    if op == "wkv4":
        small = {key: x[:2, :, :5] if x.dim() == 3 else x[:5] for key, x in inputs.items()}
    elif op == "ssd":
        small = {"x": inputs["x"][:, :, :6], "dt": inputs["dt"][..., :6], "A": inputs["A"][:6]}
        small |= {"B": inputs["B"], "C": inputs["C"]}
    elif op == "wkv6":
        small = {key: x[..., :3, :] for key, x in inputs.items()}
    elif op == "wkv7":
        small = {key: x[:, :, :3] for key, x in inputs.items()}
    else:
        small = {"x": inputs["x"][..., :6], "dt": inputs["dt"][..., :6], "A": inputs["A"][:6]}
        small |= {"B": inputs["B"], "C": inputs["C"]}
    return {key: x.clone().requires_grad_() for key, x in small.items()}


def close(run: peers.Run, op: str, tolerance: float, dtype: torch.dtype = torch.float64) -> None:
    inputs = small(op, dtype)
    expected = benchmark.ours(op, "reference")(inputs)
    found = run(inputs)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(expected)
    leaves = list(inputs.values())
    theirs = torch.autograd.grad(found, leaves, cotangent)
    for mine, other in zip(torch.autograd.grad(expected, leaves, cotangent), theirs, strict=True):
        torch.testing.assert_close(other, mine, rtol=tolerance, atol=tolerance * float(mine.abs().max()))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in PEERS for name in PEERS[op]])
def test_an_installed_peer_agrees(op: str, name: str) -> None:
    found, absent = find_peers(op)
    if name in absent:
        pytest.skip(absent[name])
    run = next(peer.run for peer in found if peer.name == name)
    close(run, op, 1e-4, torch.float32)  # some take no other


def test_an_absent_peer_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = (
        "transformers.models.rwkv.modeling_rwkv",
        "transformers.models.mamba2",
        "mambapy.mamba",
        "fla.ops.generalized_delta_rule.dplr",
        "fla.ops.rwkv6.recurrent_naive",
    )
    for module in theirs:
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises, installed or not
    for op, names in PEERS.items():
        found, absent = find_peers(op)
        assert found == []
        assert set(absent) == set(names)
        assert all("Error: " in reason for reason in absent.values())


def test_an_operator_without_peers_has_none() -> None:
    assert find_peers("token_shift") == ([], {})


def test_transformers_is_given_its_own_kind_of_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of their signature, whose decay is the stored parameter."""

    def theirs(time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        inputs = {"k": key, "v": value, "log_w": -torch.exp(time_decay), "u": time_first}
        return benchmark.ours("wkv4", "reference")(inputs), None

    install(monkeypatch, "transformers.models.rwkv.modeling_rwkv", rwkv_linear_attention_cpu=theirs)
    close(found("wkv4", "transformers", monkeypatch), "wkv4", 1e-12)


@pytest.mark.parametrize("name", ["dplr_recurrence", "dplr_chunkwise"])
def test_fla_is_given_heads_first_and_an_unscaled_query(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*arguments: Tensor) -> tuple[Tensor, None]:
        q, k, v, a, b, log_w = (x.transpose(1, 2) for x in arguments)
        inputs = {"r": q / q.shape[-1] ** 0.5, "log_w": log_w, "k": k, "v": v, "a": a, "b": b}
        return benchmark.ours("wkv7", "reference")(inputs).transpose(1, 2), None

    naive = types.SimpleNamespace(**{name: theirs})
    install(monkeypatch, "fla.ops.generalized_delta_rule.dplr", naive=naive)
    close(found("wkv7", f"fla-{name.removeprefix('dplr_')}", monkeypatch), "wkv7", 1e-12)


def test_the_loop_of_rwkv_lm_is_taken_out_of_its_script(tmp_path: Path) -> None:
    file = tmp_path / "RWKV-v7" / "rwkv_v7_demo.py"
    file.parent.mkdir()
    file.write_text(SCRIPT)
    for path in (tmp_path, file):
        peer = rwkv_lm_loop(path)
        assert peer.version.startswith("sha256 ")
        close(peer.run, "wkv7", 1e-10)


@pytest.mark.parametrize("source", [None, "def RWKV7_OP(r):\n    return r\n", "def RWKV7_OP(:"])
def test_a_script_without_the_loop_is_refused(source: str | None, tmp_path: Path) -> None:
    file = tmp_path / "rwkv_v7_demo.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(ValueError, match="rwkv_v7_demo"):
        rwkv_lm_loop(file)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """Let ``name`` be importable, with these contents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        if depth == len(parts):
            vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def found(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> peers.Run:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.0")
    peers_here = {peer.name: peer.run for peer in find_peers(op)[0]}
    return peers_here[name]
