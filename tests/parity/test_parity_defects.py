"""That the checks of tests/laws/test_published_defects.py can fail: the packages of today fail them.

A failure here means that a package has mended something: good news, and the texts that name the defect need a word.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from tests.parity import hand_over

needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed: `make parity` installs it"
)


def ids(batch: int, time: int) -> torch.Tensor:
    return torch.randint(1, hand_over.VOCAB, (batch, time), generator=torch.Generator().manual_seed(time))


@needs_transformers
@pytest.mark.parametrize("family", ["mamba", "falcon-mamba"])
@torch.no_grad()
def test_transformers_drops_the_state_on_a_second_chunk(family: str) -> None:
    model, tokens = hand_over.made_by_transformers(family), ids(1, 20)
    whole = model(tokens).logits
    cache = model(tokens[:, :9], use_cache=True).cache_params
    second = model(tokens[:, 9:], cache_params=cache, use_cache=True).logits
    assert float((second - whole[:, 9:]).abs().max()) > 1e-2


@needs_transformers
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@torch.no_grad()
def test_transformers_reads_padding_into_the_state(family: str) -> None:
    model, tokens = hand_over.made_by_transformers(family), ids(1, 12)
    padded = torch.cat((tokens, torch.zeros(1, 5, dtype=torch.long)), dim=1)
    mask = torch.cat((torch.ones(1, 12, dtype=torch.long), torch.zeros(1, 5, dtype=torch.long)), dim=1)
    token = ids(1, 1)

    def after(prompt: torch.Tensor, mask: torch.Tensor) -> Any:
        cache = model(prompt, attention_mask=mask, use_cache=True).cache_params
        return model(token, cache_params=cache, use_cache=True).logits

    assert float((after(padded, mask) - after(tokens, torch.ones_like(tokens))).abs().max()) > 1e-2


@needs_transformers
@torch.no_grad()
def test_transformers_rwkv4_mixes_up_a_batch_of_single_tokens() -> None:
    model, tokens = hand_over.made_by_transformers("rwkv4"), ids(2, 9)
    whole = model(tokens).logits
    told = model(tokens[:, :8], use_cache=True)
    got = model(tokens[:, 8:], state=told.state, use_cache=True).logits
    assert got.shape != whole[:, 8:].shape or float((got - whole[:, 8:]).abs().max()) > 1e-3
