"""Steps replayed from a graph.

Without a GPU a capture is rehearsed: replaying runs the work again, into the same memory, so that everything but the
recording itself is what a CUDA graph would do.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import statewise
from statewise import generate
from statewise.inference import stir
from statewise.inference.step_graph import StepGraph, capture_on_device
from statewise.models.mamba3 import Mamba3
from statewise.ops import gpu
from statewise.ops.checks import trusting_values
from statewise.ops.dispatch import prefer

PROMPT = [5, 200, 31, 7, 90]
FAMILIES: dict[str, dict[str, Any]] = {
    "rwkv4": {},
    "rwkv5": {"head_size": 16},
    "rwkv6": {"head_size": 16},
    "rwkv7": {"head_size": 16},
    "mamba": {},
    "mamba2": {"head_size": 16, "state_size": 8},
    "mamba3": {"head_size": 16, "state_size": 8},
}
generate_module = sys.modules["statewise.inference.generate"]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


def rehearse(work: Callable[[], Sequence[Tensor]], carried: Sequence[Tensor]) -> tuple[Tensor, Callable[[], None]]:
    first, *_ = work()

    def replay() -> None:
        new, *rest = work()
        first.copy_(new)
        for old, leaf in zip(carried, rest, strict=True):
            old.copy_(leaf)

    return first, replay


def equal(one: Any, other: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(1)
    model = statewise.create(request.param, vocab_size=257, num_layers=2, width=32, **FAMILIES[request.param])
    stir(model, scale=0.3)
    return model


class _NothingReadBack(TorchFunctionMode):
    """Refuses what a capture refuses: values that come back to the host, shapes that depend on values."""

    _READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "equal")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self._READS:
            raise RuntimeError(f"{func.__name__}: a value is read back")
        return func(*args, **(kwargs or {}))


def test_steps_are_the_models_own(family: torch.nn.Module) -> None:
    model: Any = family
    with torch.no_grad():
        _, state = model(torch.randint(257, (3, 5)))
        kept = state.clone()
        graph = StepGraph(model, state, capture=rehearse)
        for _ in range(4):
            token = torch.randint(257, (3,))
            logits, state = model.step(token, state)
            assert torch.equal(graph.step(token), logits)
            assert equal(graph.state, state)
        graph.load(kept)
        again, _ = model.step(token, kept)
        assert torch.equal(graph.step(token), again)


def test_a_step_reads_no_value_back(family: torch.nn.Module) -> None:
    def watched(work: Callable[[], Sequence[Tensor]], carried: Sequence[Tensor]) -> tuple[Tensor, Callable[[], None]]:
        with _NothingReadBack():
            work()
        return rehearse(work, carried)

    model: Any = family
    StepGraph(model, model.init_state(2), capture=watched)
    with pytest.raises(RuntimeError, match="read back"), _NothingReadBack(), torch.no_grad():
        model.step(torch.tensor([1, 2]), model.init_state(2))  # outside, values are looked at


def test_a_step_by_gpu_kernels_reads_no_value_back(family: torch.nn.Module) -> None:
    pytest.importorskip("triton")
    model: Any = family
    with gpu.capture() as launched, prefer("triton"), _NothingReadBack(), trusting_values(), torch.no_grad():
        model.step(torch.tensor([1, 2]), model.init_state(2))
    if not isinstance(model, Mamba3):  # its step is plain torch
        assert launched


def test_states_given_and_taken_are_copies(rwkv4: Any) -> None:
    state = rwkv4.init_state(1)
    before = state.clone()
    graph = StepGraph(rwkv4, state, capture=rehearse)
    graph.step(torch.tensor([3]))
    taken = graph.state
    kept = taken.clone()
    graph.step(torch.tensor([4]))
    assert equal(state, before)
    assert equal(taken, kept)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(taken))


def test_what_does_not_fit_is_refused(rwkv4: Any, tiny: Any) -> None:
    graph = StepGraph(rwkv4, rwkv4.init_state(2), capture=rehearse)
    for token in (torch.tensor([257, 0]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="outside the vocabulary of 257"):
            graph.step(token)
    for token in (torch.tensor([1]), torch.zeros(2)):
        with pytest.raises(ValueError, match="integers of shape"):
            graph.step(token)
    for state in (rwkv4.init_state(3), tiny("mamba").init_state(2)):
        with pytest.raises(ValueError, match="family and sizes"):
            graph.load(state)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU; counts what is captured."""
    made: list[int] = []

    def capture(work: Any, carried: Any) -> Any:
        made.append(len(carried))
        return rehearse(work, carried)

    monkeypatch.setattr(generate_module, "_has_graphs", lambda device: True)
    monkeypatch.setattr(generate_module, "capture_on_device", capture)
    return made


def test_generation_is_the_same_with_a_graph(model: torch.nn.Module, graphs: list[int]) -> None:
    without = generate(model, PROMPT, max_tokens=40, seed=3, presence_penalty=0.2, cuda_graph=False)
    expected = list(without)
    assert not graphs
    run = generate(model, PROMPT, max_tokens=40, seed=3, presence_penalty=0.2)
    assert [next(run) for _ in range(20)] == expected[:20]
    half = run.state
    kept = half.clone()
    assert list(run) == expected[20:]
    assert len(graphs) == 1
    assert equal(run.state, without.state)
    assert run.pending == without.pending
    assert equal(half, kept)


def test_short_runs_capture_nothing_unless_told(rwkv4: torch.nn.Module, graphs: list[int]) -> None:
    expected = list(generate(rwkv4, PROMPT, max_tokens=6, temperature=0))
    assert not graphs
    assert list(generate(rwkv4, PROMPT, max_tokens=6, temperature=0, cuda_graph=True)) == expected
    assert len(graphs) == 1


def test_what_cannot_be_captured_is_told(rwkv4: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(work: Any, carried: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(generate_module, "_has_graphs", lambda device: True)
    monkeypatch.setattr(generate_module, "capture_on_device", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = list(generate(rwkv4, PROMPT, max_tokens=40, temperature=0, cuda_graph=False))
    with pytest.warns(UserWarning, match=r"kernel by kernel.*\(operation not permitted when stream is capturing\)"):
        assert list(generate(rwkv4, PROMPT, max_tokens=40, temperature=0)) == expected
    with pytest.raises(RuntimeError, match="not permitted"):
        list(generate(rwkv4, PROMPT, max_tokens=40, temperature=0, cuda_graph=True))


def test_a_cpu_has_no_graphs(rwkv4: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="the model lies on cpu"):
        generate(rwkv4, PROMPT, max_tokens=40, cuda_graph=True)


@on_gpu
def test_a_real_graph(family: torch.nn.Module) -> None:
    model: Any = family.cuda()
    with torch.no_grad():
        _, state = model(torch.randint(257, (3, 5), device="cuda"))
        graph = StepGraph(model, state, capture=capture_on_device)
        assert equal(graph.state, state)
        for _ in range(4):
            token = torch.randint(257, (3,), device="cuda")
            logits, state = model.step(token, state)
            torch.testing.assert_close(graph.step(token), logits, rtol=1e-5, atol=1e-5)
            assert all(
                torch.allclose(a, b, rtol=1e-5, atol=1e-5)
                for a, b in zip(pytree.tree_leaves(graph.state), pytree.tree_leaves(state), strict=True)
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = list(generate(model, PROMPT, max_tokens=40, temperature=0))
    assert ids == list(generate(model, PROMPT, max_tokens=40, temperature=0, cuda_graph=False))
