"""The promise of equal forms, kept by every language model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import statewise
from statewise.state import ModelState, load_state, stack
from statewise.testing.laws import Pair, difference, leaves_of

SMALL: dict[str, dict[str, Any]] = {
    "rwkv4": {"vocab_size": 61, "num_layers": 2, "width": 24},
    "rwkv7": {"vocab_size": 61, "num_layers": 2, "width": 32, "head_size": 16},
    "rwkv5": {"vocab_size": 61, "num_layers": 2, "width": 32, "head_size": 16},
    "rwkv6": {"vocab_size": 61, "num_layers": 2, "width": 32, "head_size": 16},
    "mamba": {"vocab_size": 64, "num_layers": 2, "width": 24, "state_size": 5},
    "mamba2": {"vocab_size": 64, "num_layers": 2, "width": 24, "state_size": 5, "head_size": 8, "groups": 2},
    "mamba3": {
        "vocab_size": 64,
        "num_layers": 2,
        "width": 24,
        "state_size": 6,
        "head_size": 12,
        "mlp_width": 20,
        "mimo_rank": 2,
    },
}
every_model = pytest.mark.parametrize("name", sorted(SMALL))
LIMIT = 1e-9


def test_every_model_is_held_to_the_laws() -> None:
    assert set(SMALL) == set(statewise.list_models("language"))


@pytest.fixture(name="model")
def _model(name: str) -> Any:
    """A float64 model none of whose weights are zero: official starts switch whole branches off."""
    torch.manual_seed(3)
    model = statewise.create(name, **SMALL[name]).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (batch, time), generator=torch.Generator().manual_seed(seed))


def same(one: Any, other: Any, what: str, limit: float = LIMIT) -> None:
    for index, (a, b) in enumerate(zip(leaves_of(one), leaves_of(other), strict=True)):
        a, b = a.detach(), b.detach()
        finite = b[torch.isfinite(b)].abs()
        gap = difference(Pair(what, a, b, float(finite.max()) if finite.numel() else 1.0))
        assert gap <= limit, f"{what}, tensor {index}: {gap:.2e} > {limit:.0e}"


def in_pieces(model: Any, ids: torch.Tensor, pieces: list[int], state: Any = None) -> Any:
    outputs = []
    for part in ids.split(pieces, 1):
        logits, state = model(part, state)
        outputs.append(logits)
    return torch.cat(outputs, 1), state


@every_model
@pytest.mark.parametrize("cut", [0, 1, 15, 16, 17, 40, 41])
def test_two_pieces_are_the_whole(model: Any, cut: int) -> None:
    ids = tokens(2, 41)
    same(in_pieces(model, ids, [cut, 41 - cut]), model(ids), f"cut at {cut}")


@every_model
def test_many_pieces_are_the_whole(model: Any) -> None:
    ids = tokens(2, 41)
    edges = sorted(random.Random(1).sample(range(42), 6))
    pieces = [b - a for a, b in zip([0, *edges], [*edges, 41], strict=True)]
    same(in_pieces(model, ids, pieces), model(ids), f"pieces {pieces}")


@every_model
def test_steps_are_the_whole(model: Any) -> None:
    ids = tokens(2, 23)
    state = model.init_state(2)
    outputs = []
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        outputs.append(logits)
    same((torch.stack(outputs, 1), state), model(ids), "steps")


@every_model
def test_padded_is_alone(model: Any) -> None:
    ids, lengths = tokens(4, 30), torch.tensor([30, 0, 1, 17])
    ids[torch.arange(30) >= lengths[:, None]] = -100  # padding may hold anything
    logits, state = model(ids, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, end = model(ids[row : row + 1, :length])
        same(logits[row : row + 1, :length], alone, f"row {row}")
        same(state.select([row]), end, f"state of row {row}")


@every_model
def test_padded_from_a_state_is_alone(model: Any) -> None:
    _, begin = model(tokens(3, 9, seed=5))
    ids, lengths = tokens(3, 20), torch.tensor([20, 0, 2])
    logits, state = model(ids, begin, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, end = model(ids[row : row + 1, :length], begin.select([row]))
        same(logits[row : row + 1, :length], alone, f"row {row}")
        same(state.select([row]), end, f"state of row {row}")


@every_model
def test_packed_is_separate(model: Any) -> None:
    sizes = [0, 17, 1, 0, 12]
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    ids = tokens(1, 30)
    _, begin = model(tokens(len(sizes), 9, seed=5))
    logits, state = model(ids, begin, cu_seqlens=bounds)
    alone = [model(part, begin.select([row])) for row, part in enumerate(ids.split(sizes, 1))]
    same(logits, torch.cat([y for y, _ in alone], 1), "packed logits")
    same(state, stack([end for _, end in alone]), "packed states")


@every_model
def test_gradients_flow_through_the_state(model: Any) -> None:
    ids = tokens(2, 24)

    def gradients(pieces: list[int]) -> list[torch.Tensor]:
        logits, state = in_pieces(model, ids, pieces)
        weight = torch.sin(torch.arange(logits.numel(), dtype=torch.float64)).view_as(logits)
        loss = (logits * weight).sum() + sum(leaf.square().sum() for leaf in leaves_of(state))
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True))

    same(gradients([7, 1, 16]), gradients([24]), "gradients", 1e-8)


@every_model
def test_rows_are_independent(model: Any) -> None:
    ids = tokens(3, 20)
    logits, state = model(ids)
    order = [2, 0, 1]
    moved, moved_state = model(ids[order])
    same(moved, logits[order], "rows moved")
    same(moved_state, state.select(order), "states moved")


@every_model
def test_nothing_given_is_changed(model: Any) -> None:
    ids = tokens(2, 20)
    _, state = model(ids)
    before, ids_before = state.clone(), ids.clone()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    model(ids, state)
    model.step(ids[:, 0], state)
    assert torch.equal(ids, ids_before)
    for a, b in zip(leaves_of(state), leaves_of(before), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())


@every_model
def test_a_fresh_state_is_no_state(model: Any) -> None:
    ids = tokens(2, 12)
    same(model(ids, model.init_state(2)), model(ids), "fresh start", 0.0)


@every_model
def test_no_tokens_change_nothing(model: Any) -> None:
    _, state = model(tokens(2, 12))
    logits, after = model(tokens(2, 0), state)
    assert logits.shape == (2, 0, model(tokens(2, 1))[0].shape[-1])
    same(after, state, "T = 0", 0.0)


@every_model
def test_checkpointing_changes_no_gradient(model: Any) -> None:
    ids = tokens(2, 20)

    def gradients() -> list[torch.Tensor]:
        logits, _ = model(ids)
        loss = logits.square().sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True))

    plain = gradients()
    model.set_grad_checkpointing(True)
    model.train()
    same(gradients(), plain, "activation checkpointing")


@every_model
def test_parameter_groups_hold_every_parameter_once(model: Any) -> None:
    groups = model.parameter_groups(0.1)
    listed = [parameter for group in groups for parameter in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@every_model
def test_a_token_outside_the_vocabulary_is_named(model: Any) -> None:
    for bad in (-1, 10_000):
        ids = tokens(1, 3)
        ids[0, 1] = bad
        with pytest.raises(ValueError, match=str(bad)):
            model(ids)


@every_model
def test_states_survive_a_file_and_a_batch(model: Any, tmp_path: Path) -> None:
    _, state = model(tokens(3, 12))
    state.save(tmp_path / "state")
    same(load_state(tmp_path / "state"), state, "saved and loaded", 0.0)
    same(stack(state.split()), state, "split and stacked", 0.0)
    assert [type(layer) for layer in load_state(tmp_path / "state").layers] == [type(layer) for layer in state.layers]
    assert state.nbytes == sum(leaf.numel() * leaf.element_size() for leaf in leaves_of(state))


@every_model
def test_a_model_survives_its_file(model: Any, name: str, tmp_path: Path) -> None:
    statewise.save(model, tmp_path / "kept")
    again = statewise.load(tmp_path / "kept", dtype=torch.float64)
    assert again.config == model.config
    ids = tokens(2, 9)
    same(again(ids), model(ids), "saved and loaded", 0.0)


@every_model
@pytest.mark.parametrize("half", ["autocast", "cast"])
def test_half_precision_keeps_a_float32_state(name: str, half: str) -> None:
    model = statewise.create(name, **SMALL[name])
    ids = tokens(2, 20)
    want, _ = model(ids)
    if half == "cast":
        model = model.to(torch.bfloat16)
        got, state = model(ids)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got, state = model(ids)
    assert torch.isfinite(got).all()
    for leaf in leaves_of(state):
        assert leaf.dtype == torch.float32
    same(got.float(), want, half, 0.05)


@pytest.mark.long
@every_model
def test_the_step_compiles_and_exports(name: str) -> None:
    torch.manual_seed(0)
    model = statewise.create(name, **SMALL[name]).eval()
    ids = tokens(2, 6)
    _, state = model(ids)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, token: torch.Tensor, state: ModelState) -> Any:
            return self.model.step(token, state)

    want = model.step(ids[:, 0], state)
    torch._dynamo.reset()
    compiled = torch.compile(model.step, fullgraph=True)
    same(compiled(ids[:, 0], state), want, "compiled step", 1e-5)
    exported = torch.export.export(Step(), (ids[:, 0], state)).module()
    same(exported(ids[:, 0], state), want, "exported step", 1e-5)
    whole = torch.compile(model, fullgraph=True)
    same(whole(ids), model(ids), "compiled whole", 1e-5)


@every_model
def test_a_state_can_be_mapped_like_any_pytree(model: Any) -> None:
    _, state = model(tokens(2, 5))
    doubled = tree_map(lambda leaf: leaf * 2, state)
    assert isinstance(doubled, ModelState)
    same(doubled, state.map(lambda leaf: leaf * 2), "tree_map", 0.0)
