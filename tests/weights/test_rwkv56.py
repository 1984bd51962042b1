"""RWKV-5 and RWKV-6 files: generation and sizes from tensors, back to the bit, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise import WeightsError
from statewise.weights import read

SIZES: dict[str, dict[str, Any]] = {
    "v50_a": {"vocab_size": 128, "num_layers": 2, "width": 32, "head_size": 16, "ffn_width": 112, "version": "5.0"},
    "v51_a": {"vocab_size": 128, "num_layers": 2, "width": 32, "head_size": 16, "ffn_width": 112, "version": "5.1"},
    "v52_a": {"vocab_size": 128, "num_layers": 2, "width": 64, "head_size": 32, "ffn_width": 224, "version": "5.2"},
    "v6_a": {
        "vocab_size": 128,
        "num_layers": 2,
        "width": 64,
        "head_size": 32,
        "ffn_width": 224,
        "mix_rank": 32,
        "decay_rank": 64,
    },
}
every_file = pytest.mark.parametrize("name", sorted(SIZES))


@pytest.fixture(name="golden")
def _golden(shared: Path) -> Path:
    return shared / "golden" / "rwkv"


@every_file
def test_generation_and_sizes_are_read_from_the_tensors(golden: Path, name: str) -> None:
    found = read(golden / f"{name}.pth")
    assert found.architecture == f"rwkv{name[1]}"
    assert found.fields == SIZES[name]


def test_ranks_are_read_from_the_tensors(tmp_path: Path) -> None:
    model = statewise.create(
        "rwkv6", vocab_size=9, num_layers=2, width=16, head_size=4, ffn_width=24, mix_rank=3, decay_rank=5
    )
    statewise.save(model, tmp_path / "odd.pth", format="rwkv")
    again = statewise.load(tmp_path / "odd.pth")
    assert again.config == model.config
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in again.state_dict().items())


@every_file
@pytest.mark.parametrize("format", ["rwkv", "statewise"])
def test_a_file_comes_back_as_it_was(golden: Path, tmp_path: Path, name: str, format: str) -> None:
    model = statewise.load(golden / f"{name}.pth", dtype=torch.bfloat16)
    statewise.save(model, tmp_path / "out.pth", format=format)
    before = torch.load(golden / f"{name}.pth", weights_only=True)
    after = read(tmp_path / "out.pth")
    assert after.fields == SIZES[name] | ({"learned_state": False} if format == "statewise" else {})
    assert set(after.tensors) == set(before)
    for key, tensor in after.tensors.items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key]), key


def test_weights_are_cast_before_anything_is_computed(golden: Path) -> None:
    """A bfloat16 file in float32: the values are the file's, exactly."""
    model = statewise.load(golden / "v6_a.pth")
    tensors = torch.load(golden / "v6_a.pth", weights_only=True)
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[key].float())


Change = Callable[[dict[str, Tensor]], object]
ATT = "blocks.0.att."


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("v50_a", lambda t: t.pop("blocks.1.att.time_first"), r"blocks\.1\.att\.time_first is missing"),
        ("v50_a", lambda t: t.update({f"{ATT}time_faaaa": torch.zeros(2)}), r"unknown tensor blocks\.0\.att\.time_f"),
        ("v51_a", lambda t: t.pop(f"{ATT}time_decay"), r"blocks\.0\.att\.time_decay is missing"),
        ("v51_a", lambda t: t.pop("blocks.1.att.gate.weight"), r"blocks\.1\.att\.gate\.weight is missing"),
        ("v51_a", lambda t: t.update({f"{ATT}time_decay": torch.zeros(3)}), r"3 heads, which do not divide the width"),
        ("v51_a", lambda t: t.update({f"{ATT}time_decay": torch.zeros(0)}), r"0 heads, which do not divide the width"),
        ("v51_a", lambda t: t.update({f"{ATT}time_decay": torch.zeros(2, 1, 1)}), r"\(2, 1, 1\), expected 1 or 2 axes"),
        ("v52_a", lambda t: t.pop(f"{ATT}gate.weight"), r"blocks\.0\.att\.gate\.weight is missing"),
        (
            "v52_a",
            lambda t: t.update({"blocks.1.att.time_decay": torch.zeros(2)}),
            r"1\.att\.time_decay has shape \(2,\)",
        ),
        ("v52_a", lambda t: t.update({f"{ATT}time_faaaa": torch.zeros(32, 2)}), r"time_faaaa has shape \(32, 2\)"),
        ("v6_a", lambda t: t.pop(f"{ATT}time_maa_w2"), r"blocks\.0\.att\.time_maa_w2 is missing"),
        ("v6_a", lambda t: t.pop(f"{ATT}time_decay_w1"), r"blocks\.0\.att\.time_decay_w1 is missing"),
        ("v6_a", lambda t: t.pop(f"{ATT}time_faaaa"), r"blocks\.0\.att\.time_faaaa is missing"),
        ("v6_a", lambda t: t.pop("blocks.1.ffn.time_maa_r"), r"blocks\.1\.ffn\.time_maa_r is missing"),
        ("v6_a", lambda t: t.update({f"{ATT}gate_w1": torch.zeros(64, 8)}), r"unknown tensor blocks\.0\.att\.gate_w1"),
        ("v6_a", lambda t: t.update({f"{ATT}time_maa_w2": torch.zeros(4, 32, 64)}), r"has shape \(4, 32, 64\)"),
        ("v6_a", lambda t: t.update({f"{ATT}time_maa_w2": torch.zeros(5)}), r"shape \(5,\), expected 3 axes"),
        ("v6_a", lambda t: t.update({f"{ATT}time_faaaa": torch.zeros(2, 24)}), r"width 64 is not a multiple"),
    ],
)
def test_what_does_not_fit_is_named(golden: Path, tmp_path: Path, name: str, change: Change, message: str) -> None:
    tensors = torch.load(golden / f"{name}.pth", weights_only=True)
    change(tensors)
    path = tmp_path / "altered.pth"
    torch.save(tensors, path)
    with pytest.raises(WeightsError, match=message) as caught:
        statewise.load(path)
    assert str(path) in str(caught.value)
