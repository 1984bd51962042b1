"""The check of the promise passes on models that keep it and fails, law by law, on models that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import statewise
from statewise.inference import stir, verify

Tiny = Callable[..., torch.nn.Module]

LAWS = {
    "split anywhere = whole",
    "token by token = whole",
    "padded = alone",
    "packed = separate",
    "rows of a batch = alone",
    "no state = fresh state",
    "inputs and state untouched",
    "state saved and loaded",
    "state rows chosen and stacked",
    "gradients through a split = whole",
    "fast kernels = reference",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rwkv4", "rwkv7", "mamba"])
def test_our_models_keep_the_promise(tiny: Tiny, name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    before = [parameter.clone() for parameter in model.parameters()]
    results = verify(model, length=40)
    assert {result.law for result in results} == LAWS
    assert [result for result in results if not result.ok] == []
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


class Broken(torch.nn.Module):
    """A sound model with one defect put in front of it."""

    def __init__(self, inner: torch.nn.Module, defect: Callable[..., Any]) -> None:
        super().__init__()
        self.inner = inner
        self.config = self.inner.config
        self.defect = defect

    def forward(self, tokens: torch.Tensor, state: Any = None, **ragged: torch.Tensor) -> Any:
        return self.defect(self.inner, "forward", tokens, state, ragged)

    def step(self, token: torch.Tensor, state: Any) -> Any:
        return self.defect(self.inner, "step", token, state, {})

    def init_state(self, batch_size: int) -> Any:
        return self.inner.init_state(batch_size)


def _run(inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]) -> Any:
    return inner.step(tokens, state) if form == "step" else inner(tokens, state, **ragged)


def _forgets(inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]) -> Any:
    return _run(inner, form, tokens, None if form == "forward" else state, ragged)


def _steps_apart(inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]) -> Any:
    logits, state = _run(inner, form, tokens, state, ragged)
    return (logits * (1 + 1e-7) if form == "step" else logits), state


def _reads_padding(inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]) -> Any:
    return _run(inner, form, tokens, state, {k: v for k, v in ragged.items() if k != "lengths"})


def _runs_packed_together(
    inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]
) -> Any:
    if "cu_seqlens" not in ragged:
        return _run(inner, form, tokens, state, ragged)
    logits, _ = inner(tokens, state.select([0]))
    return logits, state


def _mixes_rows(inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]) -> Any:
    logits, state = _run(inner, form, tokens, state, ragged)
    return logits + 1e-6 * logits.mean(0, keepdim=True) * (logits.shape[0] > 1), state


def _starts_elsewhere(inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]) -> Any:
    if state is None:
        state = inner.init_state(tokens.shape[0]).map(lambda leaf: leaf + 1e-3)
    return _run(inner, form, tokens, state, ragged)


def _mutates(inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]) -> Any:
    answer = _run(inner, form, tokens, state, ragged)
    if state is not None and form == "step":
        pytree.tree_leaves(state)[0].add_(1e-12)
    return answer


def _cuts_the_graph(inner: Any, form: str, tokens: torch.Tensor, state: Any, ragged: dict[str, torch.Tensor]) -> Any:
    logits, state = _run(inner, form, tokens, state, ragged)
    return logits, state.detach()


@pytest.mark.parametrize(
    ("defect", "law"),
    [
        (_forgets, "split anywhere = whole"),
        (_steps_apart, "token by token = whole"),
        (_reads_padding, "padded = alone"),
        (_runs_packed_together, "packed = separate"),
        (_mixes_rows, "rows of a batch = alone"),
        (_starts_elsewhere, "no state = fresh state"),
        (_mutates, "inputs and state untouched"),
        (_cuts_the_graph, "gradients through a split = whole"),
    ],
)
def test_each_defect_breaks_its_law(rwkv4: torch.nn.Module, defect: Callable[..., Any], law: str) -> None:
    assert all(result.ok for result in verify(Broken(rwkv4, _run), length=12))
    failed = {result.law for result in verify(Broken(rwkv4, defect), length=12) if not result.ok}
    assert law in failed


def test_nan_never_passes(tiny: Tiny) -> None:
    model = tiny("rwkv4")
    with torch.no_grad():
        next(iter(model.parameters()))[3] = float("nan")
    failed = {result.law for result in verify(model, length=90) if not result.ok}
    assert "token by token = whole" in failed


def test_stirring_lets_the_state_reach_the_logits() -> None:
    torch.manual_seed(0)
    fresh = statewise.create("rwkv4", vocab_size=257, num_layers=2, width=64).double()
    tokens = torch.tensor([[1, 2, 3]])
    _, state = fresh(torch.tensor([[9, 8, 7]]))
    assert torch.allclose(fresh(tokens)[0][:, -1], fresh(tokens, state)[0][:, -1], atol=1e-12)
    stir(fresh)
    _, state = fresh(torch.tensor([[9, 8, 7]]))
    assert not torch.allclose(fresh(tokens)[0][:, -1], fresh(tokens, state)[0][:, -1], atol=1e-3)


def test_sizes_too_small_to_cut_are_refused(rwkv4: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="length"):
        verify(rwkv4, length=3)
