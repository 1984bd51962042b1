"""transformers' models and ours, live: one directory, the same numbers, and a state handed over either way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import statewise

transformers = pytest.importorskip("transformers", reason="transformers is not installed: `make parity` installs it")

LIMIT = 2e-5  # float32, logits of a few units

MADE: dict[str, Any] = {
    "rwkv4": lambda: transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=100, hidden_size=64, num_hidden_layers=3, context_length=64, rescale_every=0)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=100, hidden_size=48, num_hidden_layers=3)
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=100, hidden_size=48, num_hidden_layers=3, head_dim=16, num_heads=6, n_groups=2, state_size=8
        )
    ),
}


@pytest.fixture(name="theirs", params=sorted(MADE))
def _theirs(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = MADE[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(name="ours")
def _ours(theirs: Any, tmp_path: Path) -> Any:
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1, "one file is no test of several"
    return statewise.load(tmp_path / "theirs")


def ids(time: int) -> torch.Tensor:
    return torch.randint(0, 100, (2, time), generator=torch.Generator().manual_seed(time))


@torch.no_grad()
def test_logits(theirs: Any, ours: Any) -> None:
    want = theirs(ids(17)).logits
    got, _ = ours(ids(17))
    assert float((got[..., :100] - want).abs().max()) <= LIMIT


@torch.no_grad()
def test_the_way_back(theirs: Any, ours: Any, tmp_path: Path) -> None:
    statewise.save(ours, tmp_path / "ours", format="hf")
    back = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(ids(17)).logits, theirs(ids(17)).logits)


@torch.no_grad()
def test_their_state_continues_here(theirs: Any, ours: Any) -> None:
    told = theirs(ids(9), use_cache=True)
    if ours.config.__class__.__name__ == "RWKV4Config":
        flat = list(told.state)
    else:
        flat = [
            part for layer in told.cache_params.layers for part in (layer.conv_states[0], layer.recurrent_states[0])
        ]
    state = ours.init_state(2).from_layout("transformers", flat)
    _, own = ours(ids(9))
    token = ids(1)[:, 0]
    got, _ = ours.step(token, state)
    want, _ = ours.step(token, own)
    assert float((got - want).abs().max()) <= LIMIT
