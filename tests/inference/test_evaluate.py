"""Bits per byte: against the definition written out, and the same for every window."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from statewise.inference import evaluate_bits_per_byte

DATA = np.random.default_rng(0).integers(0, 256, 61).astype(np.uint8)


def test_equals_the_definition(model: torch.nn.Module) -> None:
    logits, _ = model(torch.tensor([[0, *DATA[:-1].tolist()]]))
    chances = logits[0].detach().softmax(-1)
    bits = -sum(math.log2(float(chances[t, int(token)])) for t, token in enumerate(DATA))
    result = evaluate_bits_per_byte(model, DATA, window=16)
    assert result["bits_per_byte"] == pytest.approx(bits / len(DATA), rel=1e-12)
    assert result["perplexity"] == pytest.approx(2 ** (bits / len(DATA)), rel=1e-12)
    assert (result["tokens"], result["bytes"]) == (61, 61)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("window", [1, 7, 60, 61, 62, 1000])
def test_the_window_cannot_matter(model: torch.nn.Module, window: int) -> None:
    whole = evaluate_bits_per_byte(model, DATA, window=61)["bits_per_byte"]
    assert evaluate_bits_per_byte(model, DATA, window=window)["bits_per_byte"] == pytest.approx(whole, rel=1e-12)


def test_bytes_may_be_more_than_tokens(rwkv4: torch.nn.Module) -> None:
    plain = evaluate_bits_per_byte(rwkv4, DATA)
    longer = evaluate_bits_per_byte(rwkv4, torch.from_numpy(DATA), num_bytes=122)
    assert longer["bits_per_byte"] == pytest.approx(plain["bits_per_byte"] / 2)
    assert longer["perplexity"] == pytest.approx(plain["perplexity"])


def test_progress_ends_at_the_result(rwkv4: torch.nn.Module) -> None:
    seen: list[tuple[int, float]] = []
    result = evaluate_bits_per_byte(rwkv4, DATA, window=20, progress=lambda done, bits: seen.append((done, bits)))
    assert [done for done, _ in seen] == [20, 40, 60, 61]
    assert seen[-1][1] == pytest.approx(result["bits_per_byte"])


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (np.zeros(0, np.uint8), {}, "empty"),
        ([], {}, "empty"),
        ([300], {}, "300"),
        ([-1], {}, "-1"),
        ([0.5], {}, "integers"),
        ([[1]], {}, "shape"),
        ([1], {"window": 0}, "window"),
        ([1], {"num_bytes": 0}, "num_bytes"),
    ],
)
def test_wrong_arguments_are_refused(rwkv4: torch.nn.Module, data: object, options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate_bits_per_byte(rwkv4, data, **options)  # type: ignore[arg-type]
