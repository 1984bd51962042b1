"""The `rwkv` package live: RWKV-7a's DeepEmbed, and a learnt beginning with contents that no transposition survives."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import statewise
from statewise.training.state_tuning import learn_initial_state

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("rwkv") is None, reason="the rwkv package is not installed: `make parity` installs it"
)

LIMIT = 2e-5  # float32, logits of a few units
PROMPT, TOKEN = [3, 1, 4, 1, 5, 9, 2, 6], 5

_ASK = """
import os, sys, torch
from rwkv.model import RWKV
folder, prompt, token = sys.argv[1], list(map(int, sys.argv[2].split(","))), int(sys.argv[3])
model = RWKV(model=folder + "/model", strategy="cpu fp32")
begin = None
if os.path.exists(folder + "/time_state.pt"):  # what the package keeps of RWKV-7's beginning is up to its caller
    begin = model.generate_zero_state()
    for layer, wkv in enumerate(torch.load(folder + "/time_state.pt")):
        begin[3 * layer + 1] = wkv
with torch.no_grad():
    logits, state = model.forward(prompt, begin)
    after, state = model.forward([token], state)
torch.save({"logits": logits, "after": after, "state": state}, folder + "/told.pt")
"""


def random(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    model: Any = statewise.create(name, vocab_size=40, num_layers=2, width=128, head_size=64, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def compare(folder: Path, model: Any, **environment: str) -> None:
    statewise.save(model, folder / "model.pth", format="rwkv")
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(folder), ",".join(map(str, PROMPT)), str(TOKEN)],
        env={**os.environ, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told: dict[str, Any] = torch.load(folder / "told.pt")
    logits, state = model(torch.tensor([PROMPT]))
    after, state = model.step(torch.tensor([TOKEN]), state)
    pairs: list[tuple[str, Tensor, Tensor]] = [
        ("logits", logits[0, -1], told["logits"]),
        ("after one token more", after[0], told["after"]),
        *zip((f"state {i}" for i in range(6)), state.to_layout("rwkv-pip"), told["state"], strict=True),
    ]
    for what, got, want in pairs:
        gap = float((got - want).abs().max())
        assert gap <= LIMIT * max(1.0, float(want.abs().max())), f"{what}: {gap:.1e}"


def test_deep_embed(tmp_path: Path) -> None:
    compare(tmp_path, random("rwkv7", deep_embed=32), RWKV_V7_ON="1", RWKV_DE_VERSION="1")


@pytest.mark.parametrize("name", ["rwkv5", "rwkv6", "rwkv7"])
def test_learnt_beginning(tmp_path: Path, name: str) -> None:
    model = learn_initial_state(random(name))
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_()
    if name == "rwkv7":
        torch.save([block.att.time_state.detach() for block in model.blocks], tmp_path / "time_state.pt")
    compare(tmp_path, model, RWKV_V7_ON=str(int(name == "rwkv7")))
