"""State tuning: only the beginning is learnt, it is saved alone, and it goes back onto the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import statewise
from statewise import WeightsError
from statewise.training import language_model_loss
from statewise.training.state_tuning import learn_initial_state, load_initial_state, save_initial_state

SIZES: dict[str, Any] = {"vocab_size": 31, "num_layers": 2, "width": 32, "head_size": 16}
every_model = pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "rwkv7"])


@pytest.fixture(name="model")
def _model(name: str) -> Any:
    model = statewise.create(name, **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def copies(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def tune(model: Any, tokens: Tensor, targets: Tensor, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = language_model_loss(model(tokens)[0], targets)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@every_model
def test_fifty_steps_lower_the_loss_and_touch_nothing_else(model: Any) -> None:
    before = copies(model)
    tuned = learn_initial_state(model)
    ids = torch.randint(0, 31, (2, 12))
    assert torch.equal(tuned(ids)[0], model(ids)[0])  # zeros begin as nothing does
    losses = tune(tuned, ids, ids.roll(-1, 1), 50, 0.1)
    assert losses[-1] < 0.8 * losses[0]
    for key, tensor in tuned.state_dict().items():
        assert tensor.any() if key.endswith("time_state") else torch.equal(tensor, before[key])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_trained_text_model_takes_up_a_style(shared: Path) -> None:
    """The byte model of rwkv.cpp (each byte is followed by a zero), tuned on one sentence, predicts another like it."""
    model = statewise.load(shared / "weights/rwkv_cpp_tiny/tiny-rwkv-6v0-3m-from-Q5_1.safetensors")

    def read(text: str) -> tuple[Tensor, Tensor]:
        ids = torch.tensor([[part for byte in text.encode() for part in (byte, 0)]])
        return ids[:, :-1], ids[:, 1:]

    before = copies(model)
    tuned = learn_initial_state(model)
    losses = tune(tuned, *read("TOM SAT ON THE MAT. TOM SAW A CAT. THE CAT SAW TOM."), 50, 1.0)
    assert losses[-1] < 0.6 * losses[0]
    unseen = read("THE CAT SAT ON TOM.")
    with torch.no_grad():
        plain, learnt = (float(language_model_loss(m(unseen[0])[0], unseen[1])) for m in (model, tuned))
    assert learnt < 0.7 * plain
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@every_model
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_saved_alone_and_put_back(model: Any, tmp_path: Path, ending: str) -> None:
    tuned = learn_initial_state(model)
    with torch.no_grad():
        for block in tuned.blocks:
            block.att.time_state.normal_()
    path = tmp_path / f"state{ending}"
    save_initial_state(tuned, path)
    held = load_file(path) if ending == ".safetensors" else torch.load(path, weights_only=True)
    assert set(held) == {"blocks.0.att.time_state", "blocks.1.att.time_state"}
    before = copies(model)
    again = load_initial_state(model, path)
    assert all(torch.equal(tensor, tuned.state_dict()[key]) for key, tensor in again.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert not model.config.learned_state
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    ids = torch.randint(0, 31, (2, 5))
    assert torch.equal(again(ids)[0], tuned(ids)[0])
    assert not torch.equal(again(ids)[0], model(ids)[0])
    # merged: one file of weights and beginning
    statewise.save(again, tmp_path / "merged.pth", format="rwkv")
    assert torch.equal(statewise.load(tmp_path / "merged.pth")(ids)[0], again(ids)[0])


@every_model
def test_a_beginning_is_tuned_on(model: Any) -> None:
    first = learn_initial_state(model)
    with torch.no_grad():
        first.blocks[0].att.time_state.normal_()
    second = learn_initial_state(first.eval())
    assert not second.training
    assert first.blocks[0].att.time_state.requires_grad
    assert torch.equal(second.blocks[0].att.time_state, first.blocks[0].att.time_state)
    with torch.no_grad():
        second.blocks[0].att.time_state.zero_()
    assert first.blocks[0].att.time_state.any()
    assert second.emb.weight.data_ptr() == first.emb.weight.data_ptr() == model.emb.weight.data_ptr()


@pytest.mark.parametrize("name", ["rwkv7"])
def test_bad_files_are_named(model: Any, tmp_path: Path) -> None:
    right = {f"blocks.{i}.att.time_state": torch.zeros(2, 16, 16) for i in range(2)}
    path = tmp_path / "state.pth"
    for tensors, message in (
        ({"blocks.0.att.time_state": torch.zeros(2, 16, 16)}, r"blocks\.1\.att\.time_state is missing"),
        (right | {"blocks.2.att.time_state": torch.zeros(2, 16, 16)}, r"unknown tensor blocks\.2"),
        (right | {"head.weight": torch.zeros(31, 32)}, r"unknown tensor head\.weight"),
        (right | {"blocks.1.att.time_state": torch.zeros(2, 16, 8)}, r"has shape \(2, 16, 8\)"),
        (right | {"blocks.1.att.time_state": torch.zeros(2, 16, 16, dtype=torch.long)}, "floating point"),
    ):
        torch.save(tensors, path)
        with pytest.raises(WeightsError, match=message):
            load_initial_state(model, path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(WeightsError):
        load_initial_state(model, path)
    with pytest.raises(FileNotFoundError):
        load_initial_state(model, tmp_path / "absent.pth")


@pytest.mark.parametrize("name", ["rwkv7"])
def test_refused_arguments(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no learnt state"):
        save_initial_state(model, tmp_path / "state.pth")
    with pytest.raises(ValueError, match="endings"):
        save_initial_state(learn_initial_state(model), tmp_path / "state.txt")
    four: Any = statewise.create("rwkv4", vocab_size=7, num_layers=1, width=8)
    with pytest.raises(ValueError, match="RWKV4 has no initial state"):
        learn_initial_state(four)
