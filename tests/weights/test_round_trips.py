"""Every format to ours and to every other, and back: names, shapes, dtypes and bits as they were."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise import weights
from statewise.weights import files

# Asymmetric sizes: nothing square that could come back turned.
MODELS: dict[str, dict[str, Any]] = {
    "rwkv4": {"width": 24},
    "rwkv5": {"width": 32, "head_size": 8},
    "rwkv6": {"width": 32, "head_size": 8},
    "rwkv7": {"width": 128, "head_size": 64},  # fla ties the heads' norm to their size
    "mamba": {"width": 20},
    "mamba2": {"width": 32, "head_size": 8, "groups": 2, "state_size": 6},
    "mamba3": {"width": 32, "head_size": 8, "state_size": 8},
}
HOLDS = {
    "statewise": set(MODELS),
    "rwkv": {"rwkv4", "rwkv5", "rwkv6", "rwkv7"},
    "fla": {"rwkv7"},
    "hf": {"rwkv4", "mamba", "mamba2"},
    "mamba-ssm": {"mamba", "mamba2", "mamba3"},
    "mamba.py": {"mamba"},
}
# Has rules of its own for dtypes, and for what it holds as functions of our tensors: tests/weights/test_gguf.py.
GGUF = {"rwkv6", "rwkv7", "mamba", "mamba2"}


def checkpoint(name: str) -> weights.Checkpoint:
    """Random contents, of dtypes that differ from tensor to tensor as in files of mixed precision."""
    torch.manual_seed(1)
    model = statewise.create(name, vocab_size=48, num_layers=2, **MODELS[name])
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    tied: dict[int, torch.dtype] = {}
    tensors = {}
    for key, value in model.state_dict().items():
        dtype = tied.setdefault(value.data_ptr(), next(dtypes))
        tensors[key] = value.add(torch.randn(value.shape, generator=torch.Generator().manual_seed(2))).to(dtype)
    return weights.Checkpoint(name, asdict(model.config), tensors, "statewise")


def whole(found: weights.Checkpoint) -> weights.Checkpoint:
    """With every field of the configuration, those too that no file tells: what `statewise convert` writes."""
    return found._replace(fields=asdict(statewise.create(found.architecture, **found.fields).config))


def raw(path: Path) -> dict[str, Tensor]:
    """A format's tensors as they lie in its files, not in our terms."""
    places = files.open_directory(path)[1] if path.is_dir() else [path]
    return {name: tensor for place in places for name, tensor in files.read_tensors(place).items()}


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype, name
        assert tensor.shape == want[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), want[name].view(torch.uint8)), name


@pytest.mark.parametrize(
    ("name", "format", "other"),
    [
        (name, format, other)
        for name in MODELS
        for format, other in itertools.product([f for f, held in HOLDS.items() if name in held], repeat=2)
    ],
)
def test_through_another_format_and_back(tmp_path: Path, name: str, format: str, other: str) -> None:
    weights.write(tmp_path / "first", checkpoint(name), format)
    first = weights.read(tmp_path / "first")
    weights.write(tmp_path / "other", whole(first), other)
    weights.write(tmp_path / "again", whole(weights.read(tmp_path / "other")), format)
    again = weights.read(tmp_path / "again")
    equal(raw(tmp_path / "again"), raw(tmp_path / "first"))
    assert again.architecture == name
    for field in set(first.fields) & set(again.fields):
        assert first.fields[field] in (again.fields[field], None), field  # None: by rule, which the sizes now tell


@pytest.mark.parametrize("name", MODELS)
def test_what_is_tabled_is_what_can_be_written(tmp_path: Path, name: str) -> None:
    assert {*HOLDS, "gguf"} == set(weights.FORMATS)
    for format, held in (HOLDS | {"gguf": GGUF}).items():
        if name not in held:
            with pytest.raises(ValueError, match="cannot hold"):
                weights.write(tmp_path / format, checkpoint(name), format)


def test_half_a_configuration_is_refused_by_name(tmp_path: Path) -> None:
    weights.write(tmp_path / "first", checkpoint("mamba"), "mamba-ssm")
    with pytest.raises(ValueError, match="no field 'inner_norm'"):
        weights.write(tmp_path / "second", weights.read(tmp_path / "first"), "hf")
    assert not (tmp_path / "second").exists()
