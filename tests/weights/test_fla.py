"""flash-linear-attention's RWKV-7: names and shapes as its converter makes them, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import statewise
from statewise import WeightsError


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = statewise.create("rwkv7", vocab_size=40, num_layers=2, width=128, head_size=64, ffn_width=256)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(name="directory")
def _directory(tmp_path: Path) -> Path:
    statewise.save(model(), tmp_path / "fla", format="fla")
    return tmp_path / "fla"


def test_names_and_shapes_are_theirs(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    rank = config["decay_low_rank_dim"]
    expected = {
        "model.embeddings.weight": (40, 128),
        "model.layers.0.pre_norm.weight": (128,),
        "model.layers.1.attn_norm.bias": (128,),
        "model.layers.1.ffn_norm.weight": (128,),
        "model.layers.1.attn.x_r": (1, 1, 128),
        "model.layers.1.attn.k_k": (128,),
        "model.layers.1.attn.r_k": (2, 64),
        "model.layers.1.attn.r_proj.weight": (128, 128),
        "model.layers.1.attn.g_norm.weight": (128,),
        "model.layers.1.attn.w_lora.lora.0.weight": (rank, 128),
        "model.layers.1.attn.w_lora.lora.2.weight": (128, rank),
        "model.layers.1.attn.w_lora.lora.2.bias": (128,),
        "model.layers.1.ffn.x_k": (128,),
        "model.layers.1.ffn.key.weight": (256, 128),
        "model.norm.weight": (128,),
        "lm_head.weight": (40, 128),
    }
    assert {name: tuple(tensors[name].shape) for name in expected} == expected
    assert "model.layers.0.attn.v_lora.lora.0.weight" not in tensors
    assert "model.layers.1.attn.v_lora.lora.0.weight" in tensors
    assert torch.equal(tensors["model.layers.1.attn.w_lora.lora.0.weight"], model().blocks[1].att.w1.t())


def test_there_and_back_bit_for_bit(directory: Path, tmp_path: Path) -> None:
    loaded = statewise.load(directory)
    before, after = model().state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    statewise.save(loaded, tmp_path / "again", format="fla")
    first, second = (load_file(where / "model.safetensors") for where in (directory, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_heads_norm_follows_the_head_size_there(directory: Path, tmp_path: Path) -> None:
    assert statewise.load(directory).config.group_norm_eps == pytest.approx(64e-5)
    small = statewise.create("rwkv7", vocab_size=8, num_layers=1, width=64, head_size=32, group_norm_eps=32e-5)
    statewise.save(small, tmp_path / "small", format="fla")
    assert statewise.load(tmp_path / "small").config.group_norm_eps == pytest.approx(32e-5)
    other = statewise.create("rwkv7", vocab_size=8, num_layers=1, width=64, head_size=32)
    with pytest.raises(ValueError, match="epsilon"):
        statewise.save(other, tmp_path / "other", format="fla")


@pytest.mark.parametrize(
    ("field", "value", "message"), [("attn", {"layers": [1]}, "attention layers"), ("norm_eps", 1e-6, "norm_eps")]
)
def test_what_rwkv7_is_not_is_refused(directory: Path, field: str, value: object, message: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(WeightsError, match=message):
        statewise.load(directory)


def test_a_sharded_directory_is_one_checkpoint(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    whole = statewise.load(directory).state_dict()
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({name: tensors[name] for name in names if where[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    split = statewise.load(directory).state_dict()
    assert all(torch.equal(whole[name], split[name]) for name in whole)
