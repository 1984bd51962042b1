"""Parameter groups, schedules, and the optimiser's memory through a file."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from statewise.models import create
from statewise.training import TrainConfig
from statewise.training.optimizer import (
    build_optimizer,
    learning_rate_at,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)


class TwoGroups(nn.Module):
    """A stand-in whose groups the test chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Parameter(torch.ones(3))
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.chosen: list[list[nn.Parameter]] = [[self.fast], [self.weight]]

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [
            {"params": params, "names": [], "lr_scale": float(2 - i), "weight_decay": weight_decay * i}
            for i, params in enumerate(self.chosen)
        ]


CONFIG = TrainConfig(model="mamba", steps=100, learning_rate=1e-2, final_learning_rate=1e-3).resolved()


def test_each_group_has_its_own_rate_and_decay() -> None:
    model = TwoGroups()
    optimizer = build_optimizer(model, dataclasses.replace(CONFIG, weight_decay=0.5))
    set_learning_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # The first step of Adam is the learning rate itself; decay comes first, as a factor.
    torch.testing.assert_close(model.fast, torch.full((3,), 1 - 0.02))
    torch.testing.assert_close(model.weight, torch.full((2, 2), 1 - 0.01 * 0.5 - 0.01))


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (lambda m: [[m.fast]], "parameter weight is in no group"),
        (lambda m: [[m.fast, m.weight], [m.fast]], "parameter fast is in two groups"),
        (lambda m: [[m.fast, m.weight, nn.Parameter(torch.ones(7))]], r"shape \(7,\) that is no parameter"),
    ],
)
def test_every_parameter_is_in_one_group(chosen: Any, says: str) -> None:
    model = TwoGroups()
    model.chosen = chosen(model)
    with pytest.raises(ValueError, match=says):
        build_optimizer(model, CONFIG)


@pytest.mark.parametrize("name", ["rwkv4", "rwkv7", "mamba"])
def test_groups_of_our_models_are_complete(name: str) -> None:
    model = create(name, vocab_size=11, num_layers=2, width=64)
    optimizer = build_optimizer(model, TrainConfig(model=name).resolved())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_an_open_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config\.resolved"):
        build_optimizer(TwoGroups(), TrainConfig(model="mamba"))
    with pytest.raises(ValueError, match=r"config\.resolved"):
        learning_rate_at(0, TrainConfig(model="mamba"))


@pytest.mark.parametrize(
    ("schedule", "middle"), [("cosine", 5.5e-3), ("exponential", math.sqrt(1e-5)), ("constant", 1e-2)]
)
def test_schedules(schedule: Any, middle: float) -> None:
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=10, steps=101 + 10)
    rates = [learning_rate_at(step, config) for step in range(config.steps)]
    assert rates[0] == pytest.approx(0.01 * 1e-2)
    assert rates[5] == pytest.approx((0.01 + 0.99 * 0.5) * 1e-2)
    assert rates[10] == pytest.approx(1e-2)
    assert rates[60] == pytest.approx(middle)
    assert rates[-1] == pytest.approx(1e-2 if schedule == "constant" else 1e-3)
    assert all(earlier >= later for earlier, later in itertools.pairwise(rates[10:]))
    assert learning_rate_at(10**6, config) == pytest.approx(rates[-1])


def test_a_run_may_be_all_warm_up_or_one_step() -> None:
    assert learning_rate_at(3, dataclasses.replace(CONFIG, steps=4, warmup_steps=8)) < 1e-2
    assert learning_rate_at(0, dataclasses.replace(CONFIG, steps=1, warmup_steps=0)) == pytest.approx(1e-2)


def test_memory_through_names() -> None:
    """Restored under a fresh model of the same weights, the next step is the same; no gradient, no memory."""
    model, twin = TwoGroups(), TwoGroups()
    first, second = build_optimizer(model, CONFIG), build_optimizer(twin, CONFIG)
    model.weight.grad = torch.randn(2, 2)
    first.step()
    tensors = optimizer_tensors(first, model)
    assert sorted(tensors) == ["exp_avg/weight", "exp_avg_sq/weight", "step/weight"]
    twin.load_state_dict(model.state_dict())
    restore_optimizer(second, twin, tensors)
    for owner, optimizer in ((model, first), (twin, second)):
        for parameter in owner.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
    assert torch.equal(model.fast, twin.fast)
    assert torch.equal(model.weight, twin.weight)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"exp_avg/gone": torch.zeros(3)}, "exp_avg/gone belongs to no parameter"),
        ({"junk/fast": torch.zeros(3)}, "junk/fast belongs to no parameter"),
        ({"exp_avg/fast": torch.zeros(4)}, r"exp_avg/fast has shape \(4,\), expected \(3,\)"),
        ({"exp_avg/fast": torch.zeros(3)}, "parameter fast has"),
    ],
)
def test_memory_of_something_else_is_refused(tensors: dict[str, torch.Tensor], says: str) -> None:
    model = TwoGroups()
    with pytest.raises(ValueError, match=says):
        restore_optimizer(build_optimizer(model, CONFIG), model, tensors)
