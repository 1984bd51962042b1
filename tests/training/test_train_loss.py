"""The loss against recorded gradients, against float64, and under everything that scales it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from statewise.training import language_model_loss
from statewise.training import loss as loss_module

GOLDENS = ["v4_a", "v52_a", "v6_a", "v7_a"]


def gradient(logits: Tensor, targets: Tensor, upstream: float = 1.0, **options: float) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    (language_model_loss(leaf, targets, **options) * upstream).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize(("l2wrap", "key"), [(0.0, "dlogits_plain"), (1e-4, "dlogits_l2wrap")])
def test_recorded_gradients(shared: Path, name: str, l2wrap: float, key: str) -> None:
    golden = load_file(shared / "golden" / "rwkv" / f"{name}.train.safetensors")
    logits, targets = golden["logits"].double(), golden["targets"].long()
    got = gradient(logits, targets, l2wrap=l2wrap)
    assert (got - golden[key].double()).norm() / golden[key].norm() < 5e-7
    assert abs(float(language_model_loss(logits, targets, l2wrap=l2wrap)) / float(golden["loss"]) - 1) < 5e-7


def test_recorded_gradients_tell_the_two_apart(shared: Path) -> None:
    golden = load_file(shared / "golden" / "rwkv" / "v4_a.train.safetensors")
    plain = gradient(golden["logits"].double(), golden["targets"].long())
    assert (plain - golden["dlogits_l2wrap"].double()).norm() / golden["dlogits_l2wrap"].norm() > 1e-5


def by_autograd(logits: Tensor, targets: Tensor, l2wrap: float, ignore_index: int) -> Tensor:
    """The same gradient from torch's own cross-entropy and a term whose derivative is the pull."""
    leaf = logits.detach().clone().requires_grad_()
    kept = targets != ignore_index
    loss = F.cross_entropy(leaf[kept], targets[kept])
    pull = l2wrap / 2 * (leaf[kept].max(dim=-1).values ** 2).sum() / kept.sum()
    return torch.autograd.grad(loss + pull, leaf)[0]


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 7),
    time=st.integers(1, 5),
    vocab=st.integers(2, 9),
    slice_size=st.sampled_from([1, 10, 1 << 22]),
    upstream=st.sampled_from([1.0, 0.25, 1024.0]),
    ignore_index=st.sampled_from([-100, 1]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_torch(
    rows: int, time: int, vocab: int, slice_size: int, upstream: float, ignore_index: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, time, vocab, dtype=torch.float64, generator=generator) * 5
    targets = torch.randint(vocab, (rows, time), generator=generator)
    targets[0, 0] = 0
    targets[-1, -1] = ignore_index if rows * time > 1 else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_SLICE", slice_size)
        got = gradient(logits, targets, upstream, l2wrap=0.3, ignore_index=ignore_index)
        value = language_model_loss(logits, targets, l2wrap=0.3, ignore_index=ignore_index)
    torch.testing.assert_close(got, upstream * by_autograd(logits, targets, 0.3, ignore_index), rtol=1e-10, atol=1e-13)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-14)


def test_accumulated_halves_are_the_whole() -> None:
    logits, targets = torch.randn(4, 6, 11, dtype=torch.float64), torch.randint(11, (4, 6))
    whole = gradient(logits, targets, l2wrap=0.1)
    halves = [gradient(logits[part], targets[part], 0.5, l2wrap=0.1) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-12, atol=1e-15)


def test_ignored_positions_may_hold_anything() -> None:
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[0, 1, -100], [2, -100, 3]])
    poisoned = logits.clone()
    poisoned[targets == -100] = float("nan")
    torch.testing.assert_close(gradient(poisoned, targets, l2wrap=0.1), gradient(logits, targets, l2wrap=0.1))
    assert gradient(poisoned, targets, l2wrap=0.1)[targets == -100].abs().max() == 0
    assert torch.equal(language_model_loss(poisoned, targets), language_model_loss(logits, targets))


def test_nothing_to_predict_is_nothing() -> None:
    logits, targets = torch.randn(1, 2, 5), torch.full((1, 2), -100)
    assert language_model_loss(logits, targets, l2wrap=0.1) == 0
    assert gradient(logits, targets, l2wrap=0.1).abs().max() == 0
    assert language_model_loss(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits, targets = (torch.randn(3, 50, 40) * 4).to(dtype), torch.randint(40, (3, 50))
    value = language_model_loss(logits, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), language_model_loss(logits.double(), targets), rtol=1e-6, atol=0)
    got, want = gradient(logits, targets, l2wrap=0.1), gradient(logits.double(), targets, l2wrap=0.1)
    assert got.dtype == dtype
    assert torch.equal(got, want.float().to(dtype)) or (got.double() - want).norm() / want.norm() < 4e-3


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    assert language_model_loss(logits, torch.tensor([1])) == 2e4
    assert torch.equal(gradient(logits, torch.tensor([1])), torch.tensor([[1.0, -1.0, 0.0]]))


def test_compiled_in_one_graph() -> None:
    compiled = torch.compile(language_model_loss, fullgraph=True)
    logits, targets = torch.randn(2, 8, 16, requires_grad=True), torch.randint(16, (2, 8))
    targets[0, 3] = -100
    value = compiled(logits, targets, l2wrap=0.1)
    (value * 2).backward()
    torch.testing.assert_close(value, language_model_loss(logits, targets, l2wrap=0.1))
    torch.testing.assert_close(logits.grad, gradient(logits, targets, 2.0, l2wrap=0.1))


@pytest.mark.parametrize(
    ("logits", "targets", "options", "says"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), {}, "targets hold 3; accepted are 0 to 2 and -100"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), {}, "targets hold -1"),
        (torch.zeros(2, 3), torch.tensor([0]), {}, r"targets have shape \(1,\)"),
        (torch.zeros(2, 3), torch.zeros(2), {}, "integers are accepted"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), {}, "need floats"),
        (torch.zeros(1, 3), torch.tensor([0]), {"l2wrap": -1.0}, "l2wrap is -1.0"),
    ],
)
def test_refusals(logits: Tensor, targets: Tensor, options: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        language_model_loss(logits, targets, **options)
