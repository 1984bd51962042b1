"""transformers' generate on our models, token for token beside ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import statewise
from tests.bridges.small_models import FAMILIES, padded, prompts, small

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'statewise[hf]'")

from transformers import DynamicCache

from statewise.bridges import hf

NEW = 9


def greedy(model: Any, row: torch.Tensor, count: int = NEW) -> list[int]:
    return list(statewise.generate(model, row, max_tokens=count, temperature=0))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_of_a_padded_batch_is_each_row_alone(family: str, side: str, use_cache: bool) -> None:
    model, rows = small(family), prompts(7, 3, 1, 5)
    ids, mask = padded(rows, side)
    made = hf.wrap(model).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=use_cache, pad_token_id=0
    )
    assert made[:, ids.shape[1] :].tolist() == [greedy(model, row) for row in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_draws_from_our_distribution(family: str) -> None:
    model, (row,) = small(family), prompts(6)
    torch.manual_seed(3)
    made = hf.wrap(model).generate(row[None], max_new_tokens=NEW, do_sample=True, temperature=0.7, top_k=0, top_p=1.0)
    torch.manual_seed(3)
    want: list[int] = []
    with torch.no_grad():
        logits, state = model(row[None])
        logits = logits[:, -1]
        for _ in range(NEW):
            # transformers draws from probabilities in float32
            token = torch.multinomial((logits.float() / 0.7).softmax(-1), 1)[:, 0]
            want.append(int(token))
            logits, state = model.step(token, state)
    assert made[0, len(row) :].tolist() == want


def beams(model: Any, row: torch.Tensor, width: int, count: int) -> list[int]:
    """The best continuation that keeps ``width`` hypotheses, by its sum of log-probabilities."""
    with torch.no_grad():
        logits, state = model(row[None])
        scores, first = logits[0, -1].float().log_softmax(-1).topk(width)
        found, state = [[int(token)] for token in first], state.select([0] * width)
        for _ in range(count - 1):
            logits, state = model.step(torch.tensor([tokens[-1] for tokens in found]), state)
            scores, best = (scores[:, None] + logits.float().log_softmax(-1)).flatten().topk(width)
            origins = (best // logits.shape[-1]).tolist()
            chosen = (best % logits.shape[-1]).tolist()
            found = [[*found[origin], token] for origin, token in zip(origins, chosen, strict=True)]
            state = state.select(origins)
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_carries_each_hypothesis_state(family: str) -> None:
    # A tied head at random weights repeats its input, and one beam is then all there is.
    model = small(family, **({"tie_embeddings": False} if family.startswith("mamba") else {}))
    rows = prompts(6, 4)
    ids, mask = padded(rows, "left")
    made = hf.wrap(model).generate(ids, attention_mask=mask, max_new_tokens=NEW, num_beams=4, do_sample=False)
    want = [beams(model, row, 4, NEW) for row in rows]
    assert made[:, ids.shape[1] :].tolist() == want
    assert want != [greedy(model, row) for row in rows], "beams that follow the greedy path test nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_goes_on_from_its_own_cache(family: str) -> None:
    model, (row,) = small(family), prompts(5)
    wrapped = hf.wrap(model)
    first = wrapped.generate(row[None], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    # Everything so far and three tokens more, as transformers' continued conversations are given.
    more = torch.cat([first.sequences, prompts(3)[0][None]], dim=1)
    second = wrapped.generate(more, past_key_values=first.past_key_values, max_new_tokens=NEW, do_sample=False)
    assert second[0, more.shape[1] :].tolist() == greedy(model, more[0])


@pytest.mark.parametrize("family", ["rwkv4", "mamba2"])
def test_generate_goes_on_from_a_state(family: str) -> None:
    model, (row,) = small(family), prompts(9)
    with torch.no_grad():
        _, state = model(row[None, :5])
    wrapped = hf.wrap(model)
    made = wrapped.generate(row[None, 5:], past_key_values=wrapped.cache_of(state), max_new_tokens=NEW, do_sample=False)
    assert made[0, 4:].tolist() == greedy(model, row)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 3}, {"cache_implementation": "static"}], ids=str)
def test_ways_transformers_reads_a_prompt(options: dict[str, Any]) -> None:
    model, rows = small("rwkv7"), prompts(8, 6)
    ids, mask = padded(rows, "left")
    made = hf.wrap(model).generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **options)
    assert made[:, 8:].tolist() == [greedy(model, row) for row in rows]


def test_a_stop_token_ends_a_row() -> None:
    model, (row,) = small("mamba"), prompts(6)
    want = greedy(model, row)
    stop = want[3]
    made = hf.wrap(model, eos_token_id=stop, pad_token_id=0).generate(row[None], max_new_tokens=NEW, do_sample=False)
    assert made[0, 6:].tolist() == want[: want.index(stop) + 1]


def test_what_a_state_cannot_do_is_refused() -> None:
    wrapped, (row,) = hf.wrap(small("rwkv4")), prompts(6)
    with pytest.raises(ValueError, match="stateful"):
        wrapped.generate(row[None], assistant_model=hf.wrap(small("rwkv4")), max_new_tokens=2)
    cache = DynamicCache(config=wrapped.config)
    with pytest.raises(ValueError, match="rewound"):
        cache.activate_past_recording()
    wrapped.generate(row[None], past_key_values=cache, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="past_key_values has read"):
        wrapped.generate(row[None], past_key_values=cache, max_new_tokens=3, do_sample=False)
    ids, mask = padded(prompts(8, 2), "right")
    with pytest.raises(ValueError, match="pad on the left"):
        wrapped.generate(ids, attention_mask=mask, max_new_tokens=3, prefill_chunk_size=4)
