"""RWKV-7a: DeepEmbed against its equation, in every form, in training, and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise import WeightsError
from statewise.models.rwkv7 import RWKV7, RWKV7Config
from statewise.state import stack
from statewise.testing.laws import leaves_of
from statewise.training import language_model_loss

SIZES: dict[str, Any] = {"vocab_size": 31, "num_layers": 3, "width": 32, "head_size": 16, "deep_embed": 4}


@pytest.fixture(name="model")
def _model() -> RWKV7:
    """A float64 model none of whose branches is switched off."""
    model = RWKV7(RWKV7Config(**SIZES)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, time))


def same(one: Any, other: Any, limit: float = 1e-10) -> None:
    for a, b in zip(leaves_of(one), leaves_of(other), strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@torch.no_grad()
def test_the_equation(model: RWKV7) -> None:
    """One token at a time: k ⊙ (((x s1) E) s2 + s0), E by the token and by its normed embedding."""
    ids, ffn, ln0 = tokens(1, 6), model.blocks[1].ffn, model.blocks[0].ln0
    seen: list[Any] = []
    for module in (ffn, ffn.key, ffn.value):
        module.register_forward_hook(lambda _m, given, out: seen.append((given[0], out)))
    model(ids)
    (_, key), (hidden, _), (x, _) = seen
    for t, token in enumerate(ids[0].tolist()):
        embedded = ln0(model.emb.weight[token])
        E = (ffn.s_emb.weight[token] + ffn.s_emb_x.weight @ embedded).view(4, 4)
        scale = x[0, t] @ ffn.s1 @ E @ ffn.s2 + ffn.s0[0, 0]
        torch.testing.assert_close(hidden[0, t], key[0, t].relu() ** 2 * scale)


def test_pieces_and_steps_are_the_whole(model: RWKV7) -> None:
    ids = tokens(2, 19)
    whole = model(ids)
    for pieces in ([7, 0, 1, 11], [1] * 19):
        outputs, state = [], None
        for part in ids.split(pieces, 1):
            logits, state = model(part, state)
            outputs.append(logits)
        same((torch.cat(outputs, 1), state), whole)
    outputs, state = [], model.init_state(2)
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
        outputs.append(logits)
    same((torch.stack(outputs, 1), state), whole)


def test_padded_and_packed_are_alone(model: RWKV7) -> None:
    sizes = [9, 0, 1, 6]
    rows = [tokens(1, size) for size in sizes]
    alone = [model(row) for row in rows]
    padded = torch.full((4, 9), -100)
    for row, ids in enumerate(rows):
        padded[row, : sizes[row]] = ids
    logits, state = model(padded, lengths=torch.tensor(sizes))
    for row, size in enumerate(sizes):
        same((logits[row : row + 1, :size], state.select([row])), alone[row])
    packed = model(torch.cat(rows, 1), cu_seqlens=torch.tensor([0, *sizes]).cumsum(0))
    same(packed, (torch.cat([y for y, _ in alone], 1), stack([end for _, end in alone])))


def test_the_state_is_that_of_rwkv7(model: RWKV7) -> None:
    plain = RWKV7(RWKV7Config(**(SIZES | {"deep_embed": 0}))).double()
    ours, theirs = model.init_state(2), plain.init_state(2)
    assert [leaf.shape for leaf in leaves_of(ours)] == [leaf.shape for leaf in leaves_of(theirs)]
    assert [leaf.shape for leaf in leaves_of(model(tokens(2, 3))[1])] == [leaf.shape for leaf in leaves_of(ours)]


def test_it_begins_without_effect() -> None:
    model = RWKV7(RWKV7Config(**SIZES))
    with torch.no_grad():
        for block in model.blocks:  # official starts switch the channel mixing off
            block.ffn.value.weight.normal_()
    plain = RWKV7(RWKV7Config(**(SIZES | {"deep_embed": 0})))
    plain.load_state_dict({key: t for key, t in model.state_dict().items() if ".ffn.s" not in key})
    ids = tokens(2, 8)
    same(model(ids), plain(ids), 1e-6)


def test_training_reaches_every_part(model: RWKV7) -> None:
    ids = tokens(2, 12)
    ids[ids == 30] = 0

    def gradients() -> dict[str, Tensor]:
        loss = language_model_loss(model(ids)[0], ids.roll(-1, 1))
        found = torch.autograd.grad(loss, list(model.parameters()))
        return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))

    plain = gradients()
    for layer in range(3):
        for name in ("s_emb_x.weight", "s1", "s2", "s0"):
            assert plain[f"blocks.{layer}.ffn.{name}"].any()
        read = plain[f"blocks.{layer}.ffn.s_emb.weight"].any(1)
        assert read.nonzero()[:, 0].tolist() == ids.unique().tolist()  # only the tokens that were read
    model.set_grad_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])


def test_it_learns() -> None:
    model = RWKV7(RWKV7Config(**SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = tokens(4, 17)
    losses = []
    for _ in range(25):
        loss = language_model_loss(model(ids[:, :-1])[0], ids[:, 1:])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    unlearnt = torch.eye(4).flatten()
    assert all((block.ffn.s_emb.weight != unlearnt).any() and block.ffn.s1.any() for block in model.blocks)


def test_optimiser_groups(model: RWKV7) -> None:
    by_name = {name: group for group in model.parameter_groups(0.1) for name in group["names"]}
    assert set(by_name) == {name for name, _ in model.named_parameters()}
    decayed = {name for name in by_name if ".ffn.s" in name and by_name[name]["weight_decay"]}
    assert decayed == {f"blocks.{i}.ffn.{name}.weight" for i in range(3) for name in ("s_emb", "s_emb_x")}


@pytest.mark.parametrize("format", ["rwkv", "statewise"])
def test_files(model: RWKV7, tmp_path: Path, format: str) -> None:
    model = model.bfloat16()
    statewise.save(model, tmp_path / "out.pth", format=format)
    again = statewise.load(tmp_path / "out.pth", dtype=torch.bfloat16)
    assert again.config.deep_embed == 4
    assert set(again.state_dict()) == set(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        model = RWKV7(RWKV7Config(vocab_size=65536, num_layers=1, width=768, deep_embed=32))
    shapes = {key[13:]: tuple(t.shape) for key, t in model.state_dict().items() if key.startswith("blocks.0.ffn.s")}
    assert shapes == {
        "s_emb.weight": (65536, 1024),
        "s_emb_x.weight": (1024, 768),
        "s1": (768, 32),
        "s2": (32, 3072),
        "s0": (1, 1, 3072),
    }


def test_what_does_not_fit_is_named(model: RWKV7, tmp_path: Path) -> None:
    whole = dict(model.state_dict())
    attention = {"blocks.2.qkv.k_emb.weight": torch.zeros(31, 8)}
    short = {key: tensor for key, tensor in whole.items() if key != "blocks.2.ffn.s2"}
    narrow = whole | {"blocks.1.ffn.s_emb.weight": torch.zeros(31, 9)}
    other = whole | {"blocks.0.ffn.s_emb.weight": torch.zeros(31, 9)}
    none = whole | {"blocks.0.ffn.s1": torch.zeros(32, 0), "blocks.0.ffn.s_emb.weight": torch.zeros(31, 0)}
    endless = whole | {"blocks.0.ffn.s1": torch.zeros(0, 1 << 40)}
    for tensors, message in (
        (whole | attention, r"qkv\.k_emb.*RWKV-7b"),
        (short, r"blocks\.2\.ffn\.s2 is missing"),
        (other, r"blocks\.0\.ffn\.s_emb\.weight has shape \(31, 9\)"),
        (none, r"blocks\.0\.ffn\.s1 has shape \(32, 0\)"),
        (endless, r"blocks\.0\.ffn\.s1 has shape \(0, "),
        (narrow, r"blocks\.1\.ffn\.s_emb\.weight has shape \(31, 9\)"),
    ):
        torch.save(tensors, tmp_path / "bad.pth")
        with pytest.raises(WeightsError, match=message):
            statewise.load(tmp_path / "bad.pth")
    own = RWKV7(RWKV7Config(**SIZES, group_norm_eps=16e-5))
    with pytest.raises(ValueError, match="DeepEmbed"):
        statewise.save(own, tmp_path / "fla", format="fla")


@pytest.mark.parametrize("rank", [-1, True, 2.0, None])
def test_ranks_that_are_none(rank: Any) -> None:
    with pytest.raises(ValueError, match="deep_embed"):
        RWKV7Config(**(SIZES | {"deep_embed": rank}))
