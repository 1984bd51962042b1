"""transformers' directories, live: several files are one checkpoint, and what we write opens there bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import statewise
from tests.parity import hand_over

pytest.importorskip("transformers", reason="transformers is not installed: `make parity` installs it")


@pytest.mark.parametrize("family", hand_over.TRANSFORMERS)
@torch.no_grad()
def test_there_and_back_in_several_files(family: str, tmp_path: Path) -> None:
    theirs = hand_over.made_by_transformers(family)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1, "one file is no test of several"
    ours: Any = statewise.load(tmp_path / "theirs")
    tokens = torch.randint(0, hand_over.VOCAB, (2, 17), generator=torch.Generator().manual_seed(17))
    want = theirs(tokens).logits
    got, _ = ours(tokens)
    assert float((got[..., : hand_over.VOCAB] - want).abs().max()) <= 2e-5
    statewise.save(ours, tmp_path / "ours", format="hf")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(tokens).logits, want)
