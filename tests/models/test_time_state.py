"""A learnt beginning (`time_state`): every form starts from it, a given state wins, files carry it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise import WeightsError
from statewise.models.learned_state import first_wkv
from statewise.state import ModelState, stack
from statewise.testing.laws import leaves_of

SIZES: dict[str, Any] = {"vocab_size": 31, "num_layers": 2, "width": 32, "head_size": 16, "learned_state": True}
every_model = pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "rwkv7"])


@pytest.fixture(name="model")
def _model(name: str) -> Any:
    """A float64 model none of whose weights are zero, its beginning of the size of a state."""
    model = statewise.create(name, **SIZES).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_((1.0 if key.endswith("time_state") else 0.1) * torch.randn_like(parameter))
    return model


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(0, 31, (batch, time))


def by_hand(model: Any, rows: int) -> ModelState:
    """The beginning: zeros but for S[k, v] = time_state[v, k] in every row."""
    begin = model.init_state(rows)
    layers = []
    for layer, block in zip(begin.layers, model.blocks, strict=True):
        wkv = torch.zeros_like(layer.wkv)
        for row in range(rows):
            for head in range(2):
                wkv[row, head] = block.att.time_state[head].T
        layers.append(type(layer)(torch.zeros_like(layer.att_shift), wkv, torch.zeros_like(layer.ffn_shift)))
    return ModelState(tuple(layers))


def same(one: Any, other: Any) -> None:
    for a, b in zip(leaves_of(one), leaves_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_model
@torch.no_grad()
def test_every_form_begins_there(model: Any) -> None:
    ids, begin = tokens(3, 9), by_hand(model, 3)
    same(model.init_state(3), begin)
    whole = model(ids, begin)
    same(model(ids), whole)
    assert (model(ids, _zeros(begin))[0] - whole[0]).abs().max() > 1e-3  # so it matters
    logits, state = model(ids[:, :4])
    later, state = model(ids[:, 4:], state)
    same((torch.cat([logits, later], 1), state), whole)
    outputs, state = [], model.init_state(3)
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        outputs.append(logits)
    same((torch.stack(outputs, 1), state), whole)
    same(model.step(ids[:, 0], None), model.step(ids[:, 0], begin))


@every_model
@torch.no_grad()
def test_padded_and_packed_begin_there(model: Any) -> None:
    sizes = [0, 8, 1, 5]
    rows = [tokens(1, size) for size in sizes]
    alone = [model(row) for row in rows]
    padded = torch.full((4, 8), -100)
    for row, ids in enumerate(rows):
        padded[row, : sizes[row]] = ids
    logits, state = model(padded, lengths=torch.tensor(sizes))
    for row, size in enumerate(sizes):
        same((logits[row : row + 1, :size], state.select([row])), alone[row])
    packed = model(torch.cat(rows, 1), cu_seqlens=torch.tensor([0, *sizes]).cumsum(0))
    same(packed, (torch.cat([y for y, _ in alone], 1), stack([end for _, end in alone])))


def _zeros(state: ModelState) -> ModelState:
    return ModelState(tuple(type(layer)(*(torch.zeros_like(leaf) for leaf in layer)) for layer in state.layers))


@every_model
@torch.no_grad()
def test_a_given_state_wins(name: str, model: Any) -> None:
    plain = statewise.create(name, **(SIZES | {"learned_state": False})).double()
    plain.load_state_dict({key: t for key, t in model.state_dict().items() if not key.endswith("time_state")})
    ids = tokens(2, 7)
    same(model(ids, plain.init_state(2)), plain(ids))
    same(model.step(ids[:, 0], plain.init_state(2)), plain.step(ids[:, 0], plain.init_state(2)))


@every_model
def test_gradients_add_up_over_rows(model: Any) -> None:
    ids = tokens(3, 9)
    learnt = [block.att.time_state for block in model.blocks]

    def loss(result: tuple[Tensor, ModelState]) -> Tensor:
        logits, state = result
        weight = torch.sin(torch.arange(logits.numel(), dtype=logits.dtype)).view_as(logits)
        return (logits * weight).sum() + sum(leaf.square().sum() for leaf in leaves_of(state))

    begin = by_hand(model, 3)
    leaves = [layer.wkv.detach().requires_grad_() for layer in begin.layers]
    begin = ModelState(tuple(layer._replace(wkv=leaf) for layer, leaf in zip(begin.layers, leaves, strict=True)))
    expected = [g.sum(0).transpose(1, 2) for g in torch.autograd.grad(loss(model(ids, begin)), leaves)]
    packed = torch.tensor([0, 9, 18, 27])
    for got in (
        torch.autograd.grad(loss(model(ids)), learnt),
        torch.autograd.grad(loss(model(ids, model.init_state(3))), learnt),
        torch.autograd.grad(loss(model(ids.view(1, -1), cu_seqlens=packed)), learnt),
    ):
        same(got, expected)
    model.set_grad_checkpointing()
    same(torch.autograd.grad(loss(model(ids)), learnt), expected)


@every_model
def test_a_state_is_no_view_of_a_weight(model: Any) -> None:
    before = [block.att.time_state.detach().clone() for block in model.blocks]
    for state in (model.init_state(1), model(tokens(1, 0))[1], model(tokens(2, 0))[1]):
        for layer in state.layers:
            layer.wkv.detach().fill_(7.0)
    assert all(torch.equal(block.att.time_state, old) for block, old in zip(model.blocks, before, strict=True))
    assert torch.equal(first_wkv(torch.full((1, 1, 1), 2.0), 1), torch.full((1, 1, 1, 1), 2.0))
    one = torch.ones(1, 1, 1)
    assert first_wkv(one, 1).data_ptr() != one.data_ptr()


@every_model
def test_half_precision_begins_in_float32(model: Any) -> None:
    model = model.bfloat16()
    assert {leaf.dtype for leaf in leaves_of(model.init_state(2))} == {torch.float32}
    assert {leaf.dtype for leaf in leaves_of(model(tokens(2, 3))[1])} == {torch.float32}


@every_model
def test_it_begins_as_zeros_and_decays(name: str) -> None:
    model = statewise.create(name, **SIZES)
    assert all(not block.att.time_state.any() for block in model.blocks)
    by_name = {key: group for group in model.parameter_groups(0.1) for key in group["names"]}
    assert [by_name[f"blocks.{i}.att.time_state"]["weight_decay"] for i in range(2)] == [0.1, 0.1]
    with pytest.raises(ValueError, match="learned_state"):
        statewise.create(name, **(SIZES | {"learned_state": 1}))


@every_model
@pytest.mark.parametrize("format", ["rwkv", "statewise"])
def test_files(model: Any, tmp_path: Path, format: str) -> None:
    statewise.save(model, tmp_path / "out.pth", format=format)
    again = statewise.load(tmp_path / "out.pth", dtype=torch.float64)
    assert again.config.learned_state
    assert set(again.state_dict()) == set(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


@every_model
def test_what_does_not_fit_is_named(model: Any, tmp_path: Path) -> None:
    whole = dict(model.state_dict())
    for tensors, message in (
        ({k: t for k, t in whole.items() if k != "blocks.1.att.time_state"}, r"blocks\.1\.att\.time_state is missing"),
        ({k: t for k, t in whole.items() if k != "blocks.0.att.time_state"}, r"blocks\.0\.att\.time_state is missing"),
        (whole | {"blocks.0.att.time_state": torch.zeros(2, 16, 8)}, r"time_state has shape \(2, 16, 8\)"),
    ):
        torch.save(tensors, tmp_path / "bad.pth")
        with pytest.raises(WeightsError, match=message):
            statewise.load(tmp_path / "bad.pth")


def test_where_there_is_no_place_for_one(tmp_path: Path) -> None:
    model = statewise.create("rwkv7", **SIZES, group_norm_eps=16e-5)
    with pytest.raises(ValueError, match="learnt initial state"):
        statewise.save(model, tmp_path / "fla", format="fla")
    four = statewise.create("rwkv4", vocab_size=7, num_layers=1, width=8)
    torch.save(four.state_dict() | {"blocks.0.att.time_state": torch.zeros(1, 8, 8)}, tmp_path / "four.pth")
    with pytest.raises(WeightsError, match="unknown tensor"):
        statewise.load(tmp_path / "four.pth")
