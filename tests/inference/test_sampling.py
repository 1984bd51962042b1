"""The rules of choice, one by one and against a plain reading of their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from statewise.inference import SamplingRule, choose_token


def _drawn(logits: list[float], rule: SamplingRule, draws: int = 400, **more: torch.Tensor) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    chosen = [choose_token(torch.tensor(logits), rule, generator=generator, **more) for _ in range(draws)]
    return [chosen.count(token) / draws for token in range(len(logits))]


def test_greedy_takes_the_first_of_the_largest_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert choose_token(torch.tensor([0.0, 3.0, 3.0]), SamplingRule(temperature=0)) == 1
    assert torch.equal(before, torch.get_rng_state())


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    shares = _drawn([0.0, math.log(4) * 2], SamplingRule(temperature=2.0), draws=2000)
    assert shares[1] == pytest.approx(0.8, abs=0.03)  # 3 standard deviations


@pytest.mark.parametrize(
    ("rule", "allowed"),
    [
        (SamplingRule(top_k=1), {2}),
        (SamplingRule(top_k=2), {1, 2}),
        (SamplingRule(top_k=99), {0, 1, 2, 3}),
        (SamplingRule(top_p=0.01), {2}),
        (SamplingRule(top_p=0.6), {1, 2}),  # 0.5 alone does not reach it
        (SamplingRule(top_p=0.5), {2}),  # reached exactly
        (SamplingRule(top_k=3, top_p=0.6), {1, 2}),  # of the three kept, 0.5/0.9 alone does not reach it
        (SamplingRule(top_k=3, top_p=0.5), {2}),
    ],
)
def test_the_cut_keeps_just_these(rule: SamplingRule, allowed: set[int]) -> None:
    shares = _drawn([math.log(p) for p in (0.125, 0.25, 0.5, 0.125)], rule, draws=300)
    assert {token for token, share in enumerate(shares) if share} <= allowed
    assert all(shares[token] for token in allowed)


def test_penalties_subtract_once_and_per_count() -> None:
    counts = torch.tensor([0, 1, 3])
    logits = torch.tensor([0.0, 1.0, 2.0])
    greedy = {"temperature": 0.0}
    assert choose_token(logits, SamplingRule(presence_penalty=1.5, **greedy), counts=counts) == 2
    assert choose_token(logits, SamplingRule(presence_penalty=2.5, **greedy), counts=counts) == 0
    assert choose_token(logits, SamplingRule(frequency_penalty=0.6, **greedy), counts=counts) == 1
    assert choose_token(logits, SamplingRule(presence_penalty=-9.0, **greedy), counts=counts) == 2
    assert torch.equal(logits, torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([-3e4, 3e4, 2.9e4])
    chosen = choose_token(logits, SamplingRule(temperature=temperature), generator=torch.Generator().manual_seed(1))
    assert chosen == 1 or temperature == 1e300


def test_masked_tokens_are_never_drawn() -> None:
    logits = [0.0, -math.inf, -math.inf, 0.0]
    for rule in (SamplingRule(), SamplingRule(top_k=3), SamplingRule(top_p=1 - 1e-9), SamplingRule(temperature=1e9)):
        shares = _drawn(logits, rule, draws=100)
        assert shares[1] == shares[2] == 0


@pytest.mark.parametrize("bad", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf], []])
def test_logits_without_a_choice_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="logits"):
        choose_token(torch.tensor(bad), SamplingRule())


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
        {"presence_penalty": math.inf},
        {"frequency_penalty": None},
    ],
)
def test_values_out_of_range_are_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingRule(**bad)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@example(logits=[0.0, 0.0, 1.0, 8.1e-37], temperature=1.0, top_k=0, top_p=0.5, seed=0)  # differ, and round to equals
@given(
    logits=st.lists(st.floats(-20, 20), min_size=1, max_size=12),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
    seed=st.integers(0, 1 << 30),
)
def test_what_is_drawn_lies_in_the_set_the_definition_gives(
    logits: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    weights = [math.exp((value - max(logits)) / temperature) for value in torch.tensor(logits).double().tolist()]
    # By logits: two that differ may still have equal weights.
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
    total, mass, allowed = sum(weights[token] for token in ranked), 0.0, set()
    for token in ranked:
        if allowed and mass / total >= top_p + 1e-9:  # rounding may decide at the very edge
            break
        allowed.add(token)
        mass += weights[token]
    rule = SamplingRule(temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(seed)
    assert choose_token(torch.tensor(logits, dtype=torch.float64), rule, generator=generator) in allowed
