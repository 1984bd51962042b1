"""The `rwkv` package and ours, live: one file, the same numbers, and a state handed over either way.

The package is asked in a process of its own: it decides when it is imported whether it will read RWKV-7.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import statewise

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("rwkv") is None, reason="the rwkv package is not installed: `make parity` installs it"
)

LIMIT = 2e-5  # float32, logits of a few units
PROMPT, TOKEN = [3, 1, 4, 1, 5, 9, 2, 6], 5
SIZES: dict[str, dict[str, Any]] = {
    "rwkv4": {"width": 64},
    **{f"rwkv5 {version}": {"width": 64, "head_size": 32, "version": version} for version in ("5.0", "5.1", "5.2")},
    "rwkv6": {"width": 64, "head_size": 32},
    "rwkv7": {"width": 128, "head_size": 64},
}

_ASK = """
import sys, torch
from rwkv.model import RWKV
folder, prompt, token = sys.argv[1], list(map(int, sys.argv[2].split(","))), int(sys.argv[3])
model = RWKV(model=folder + "/model", strategy="cpu fp32")
with torch.no_grad():
    logits, state = model.forward(prompt, None)
    kept = [part.clone() for part in state]
    after, _ = model.forward([token], state)
    ours = torch.load(folder + "/ours.pt")
    from_ours, _ = model.forward([token], ours)
torch.save({"logits": logits, "state": kept, "after": after, "from_ours": from_ours}, folder + "/told.pt")
"""


@pytest.mark.parametrize("name", sorted(SIZES))
@torch.no_grad()
def test_logits_and_states(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model: Any = statewise.create(name.split()[0], vocab_size=40, num_layers=2, **SIZES[name])
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    statewise.save(model, tmp_path / "model.pth", format="rwkv")
    logits, state = model(torch.tensor([PROMPT]))
    torch.save(state.to_layout("rwkv-pip"), tmp_path / "ours.pt")
    environment = {**os.environ, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int(name == "rwkv7"))}
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(tmp_path), ",".join(map(str, PROMPT)), str(TOKEN)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = torch.load(tmp_path / "told.pt")
    after, _ = model.step(torch.tensor([TOKEN]), state)
    theirs = model.init_state(1).from_layout("rwkv-pip", told["state"])
    from_theirs, _ = model.step(torch.tensor([TOKEN]), theirs)
    for what, got, want in (
        ("logits", logits[0, -1], told["logits"]),
        ("logits after one token more", after[0], told["after"]),
        ("theirs, from our state", told["from_ours"], after[0]),
        ("ours, from their state", from_theirs[0], after[0]),
    ):
        gap = float((got - want).abs().max())
        assert gap <= LIMIT * max(1.0, float(want.abs().max())), f"{what}: {gap:.1e}"
