"""RWKV-4 against the published package and trainer, and its own promises that no other model makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import statewise
from statewise.models.rwkv4 import RWKV4, RWKV4Config
from statewise.state import ModelState, RWKV4LayerState
from statewise.training import language_model_loss

both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# What is stored is float32 of a float64 graph ("train") or float32 of a float32 run ("pip").
STORED = 5e-7


@pytest.fixture(name="golden")
def _golden(shared: Path) -> Path:
    return shared / "golden" / "rwkv"


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@both
def test_a_training_step_is_the_trainers(golden: Path, dtype: torch.dtype) -> None:
    model = statewise.load(golden / "v4_a.pth", dtype=dtype)
    want = load_file(golden / "v4_a.train.safetensors")
    logits, _ = model(want["idx"].long())
    assert float((logits - want["logits"]).abs().max()) <= 5e-5
    loss = language_model_loss(logits, want["targets"].long(), l2wrap=1e-4)
    assert abs(loss.item() - want["loss"].item()) <= 1e-6
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {f"grad.{name}" for name in gradients} == {name for name in want if name.startswith("grad.")}
    limit = 1e-4 if dtype == torch.float32 else STORED
    for name, gradient in gradients.items():
        assert gradient is not None
        assert relative(gradient, want[f"grad.{name}"]) <= limit, name
    if dtype == torch.float64:
        assert relative(logits.detach(), want["logits"]) <= STORED


def test_the_golden_gradients_see_l2wrap(golden: Path) -> None:
    model = statewise.load(golden / "v4_a.pth", dtype=torch.float64)
    want = load_file(golden / "v4_a.train.safetensors")
    logits, _ = model(want["idx"].long())
    language_model_loss(logits, want["targets"].long(), l2wrap=0.0).backward()
    worst = max(relative(p.grad, want[f"grad.{name}"]) for name, p in model.named_parameters() if p.grad is not None)
    assert worst > 4e-4, "without L2Wrap the gradients must differ, or the test above proves nothing"


def states_agree(state: ModelState, want: dict[str, Tensor], which: str) -> None:
    for index, layer in enumerate(state.layers):
        assert isinstance(layer, RWKV4LayerState)
        att, num, den, largest, ffn = (want[f"state_{which}.{index}.{slot}"] for slot in range(5))
        pairs = [
            (layer.att_shift[0], att),
            (layer.ffn_shift[0], ffn),
            (layer.wkv.num[0] / layer.wkv.den[0], num / den),
            (layer.wkv.den[0].log() + layer.wkv.max[0], den.log() + largest),
        ]
        for got, expected in pairs:
            assert float((got - expected).abs().max()) <= 1e-4


@both
def test_the_recurrent_packages_numbers(golden: Path, dtype: torch.dtype) -> None:
    model = statewise.load(golden / "v4_a.pth", dtype=dtype)
    want = load_file(golden / "v4_a.pip.safetensors")
    state: Any = None
    for which in ("prompt", "chunk2"):
        logits, state = model(want[which].long()[None], state)
        assert float((logits[0] - want[f"logits_{which}"]).abs().max()) <= 5e-5
        states_agree(state, want, which)
    for token, expected in zip(want["singles"].long(), want["logits_singles"], strict=True):
        logits, state = model.step(token[None], state)
        assert float((logits[0] - expected).abs().max()) <= 5e-5
    states_agree(state, want, "singles")


def test_a_state_from_the_package_continues_here(golden: Path) -> None:
    model = statewise.load(golden / "v4_a.pth")
    want = load_file(golden / "v4_a.pip.safetensors")
    theirs = [want[f"state_prompt.{layer}.{slot}"] for layer in range(3) for slot in range(5)]
    state = model.init_state(1).from_layout("rwkv-pip", theirs)
    logits, _ = model(want["chunk2"].long()[None], state)
    assert float((logits[0] - want["logits_chunk2"]).abs().max()) <= 5e-5


def test_official_initialisation() -> None:
    model = RWKV4(RWKV4Config(256, 3, 64))
    first, last = model.blocks[0], model.blocks[2]
    assert first.att.time_decay[0].item() == pytest.approx(-5)
    assert first.att.time_decay[-1].item() == pytest.approx(3)
    middle = -5 + 8 * (31 / 63) ** (0.7 + 1.3 * 1.0)
    assert last.att.time_decay[31].item() == pytest.approx(middle, rel=1e-5)
    zigzag = [math.log(0.3) + step for step in (0.0, 0.5, -0.5)]
    assert first.att.time_first[:3].tolist() == pytest.approx(zigzag)
    assert last.att.time_mix_v.flatten()[32].item() == pytest.approx(0.5 ** (1 / 3) + 0.3)
    for zero in ("att.key", "att.receptance", "att.output", "ffn.receptance", "ffn.value"):
        assert not model.get_parameter(f"blocks.1.{zero}.weight").any()
    value = first.att.value.weight
    assert torch.allclose(value @ value.T, torch.eye(64), atol=1e-5)
    key = first.ffn.key.weight  # 4C x C, gain 2
    assert torch.allclose(key.T @ key, 4 * torch.eye(64), atol=1e-4)
    assert model.head.weight.norm(dim=0).mean().item() == pytest.approx(0.5 * 2, rel=1e-4)


def test_a_single_layer_is_defined() -> None:
    model = RWKV4(RWKV4Config(32, 1, 16))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("field", ["vocab_size", "num_layers", "width", "ffn_width"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_sizes_are_checked(field: str, value: object) -> None:
    fields: dict[str, Any] = {"vocab_size": 8, "num_layers": 1, "width": 8, field: value}
    with pytest.raises(ValueError, match=field):
        RWKV4Config(**fields)


def test_no_decay_unless_asked_and_then_on_matrices() -> None:
    model = RWKV4(RWKV4Config(32, 2, 16))
    (group,) = model.parameter_groups(0.0)
    assert group["lr_scale"] == 1.0
    decayed = {name for group in model.parameter_groups(0.1) if group["weight_decay"] for name in group["names"]}
    assert decayed == {name for name, p in model.named_parameters() if name.endswith(".weight") and p.dim() == 2}


def test_the_average_is_float32_in_half_models() -> None:
    model = RWKV4(RWKV4Config(32, 2, 16)).to(torch.bfloat16)
    _, state = model(torch.randint(0, 32, (2, 9)))
    assert {leaf.dtype for leaf in torch.utils._pytree.tree_leaves(state)} == {torch.float32}
