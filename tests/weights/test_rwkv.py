"""RWKV files: sizes from tensors, and one clear error for whatever does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import statewise
from statewise import WeightsError
from statewise.weights import read


@pytest.fixture(name="golden")
def _golden(shared: Path) -> Path:
    return shared / "golden" / "rwkv"


def test_sizes_are_read_from_the_tensors(golden: Path) -> None:
    found = read(golden / "v4_a.pth")
    assert found.architecture == "rwkv4"
    assert found.fields == {"vocab_size": 128, "num_layers": 3, "width": 64, "ffn_width": 256}
    found = read(golden / "v7_a.pth")
    assert found.architecture == "rwkv7"
    assert found.fields["head_size"] == 32
    assert found.fields["keeps_unused"]


@pytest.mark.parametrize("name", ["v4_a", "v7_a"])
def test_a_pth_comes_back_as_it_was(golden: Path, tmp_path: Path, name: str) -> None:
    model = statewise.load(golden / f"{name}.pth", dtype=torch.bfloat16)
    statewise.save(model, tmp_path / "out.pth", format="rwkv")
    before, after = (torch.load(p, weights_only=True) for p in (golden / f"{name}.pth", tmp_path / "out.pth"))
    assert set(after) == set(before)
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key]), key


def altered(golden: Path, tmp_path: Path, change: object) -> Path:
    tensors = torch.load(golden / "v4_a.pth", weights_only=True)
    change(tensors)  # type: ignore[operator]
    torch.save(tensors, tmp_path / "altered.pth")
    return tmp_path / "altered.pth"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.att.key.weight"), r"blocks\.1\.att\.key\.weight is missing"),
        (lambda t: t.update({"blocks.1.att.other": torch.zeros(1)}), r"unknown tensor blocks\.1\.att\.other"),
        (lambda t: t.update({"blocks.2.ln1.bias": torch.zeros(3)}), r"blocks\.2\.ln1\.bias has shape \(3,\)"),
        (lambda t: t.update({"ln_out.bias": torch.zeros(64, dtype=torch.int32)}), r"ln_out\.bias has dtype"),
        (lambda t: t.pop("emb.weight"), r"emb\.weight is missing"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("blocks.1.")], "without gaps"),
        (lambda t: t.clear(), "no tensors"),
        (lambda t: [t.pop(k) for k in list(t) if k != "emb.weight"], "no architecture"),
    ],
)
def test_what_does_not_fit_is_named(golden: Path, tmp_path: Path, change: object, message: str) -> None:
    path = altered(golden, tmp_path, change)
    with pytest.raises(WeightsError, match=message) as caught:
        statewise.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs", b"PK\x03\x04half"])
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.pth"):
        statewise.load(path)


def test_a_cut_or_damaged_file_is_seen(golden: Path, tmp_path: Path) -> None:
    content = (golden / "v4_a.pth").read_bytes()
    path = tmp_path / "model.pth"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"model\.pth"):
        statewise.load(path)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(WeightsError, match="damaged"):
        statewise.load(path)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path(tmp_path / "sprung").touch, ()  # type: ignore[return-value]

    torch.save({"emb.weight": Trap()}, tmp_path / "model.pth")
    with pytest.raises(WeightsError):
        statewise.load(tmp_path / "model.pth")
    assert not (tmp_path / "sprung").exists()


def test_missing_paths_and_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        statewise.load(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match=r"no config\.json"):
        statewise.load(tmp_path)
