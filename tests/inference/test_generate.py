"""Generation: what is read, what is yielded, what the state holds, and that nothing of the caller's changes."""

from __future__ import annotations

import gc
import math
import sys
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from statewise import generate
from statewise.errors import StateError
from statewise.inference import Generation, load_session, save_session
from statewise.state import load_state

PROMPT = [5, 200, 31, 7, 7, 90, 12]


def _greedy_by_forward(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """The slow, obvious way: read everything again for every token."""
    ids = list(prompt)
    for _ in range(count):
        logits, _ = model(torch.tensor([ids]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _same(one: object, other: object, tolerance: float = 1e-9) -> bool:
    return all(
        torch.allclose(a, b, rtol=tolerance, atol=tolerance)
        for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    )


def test_greedy_equals_reading_everything_again(model: torch.nn.Module) -> None:
    run = generate(model, PROMPT, max_tokens=12, temperature=0)
    ids = list(run)
    assert ids == _greedy_by_forward(model, PROMPT, 12)
    _, state = model(torch.tensor([PROMPT + ids[:-1]]))
    assert _same(run.state, state)
    assert run.pending == ids[-1]


def test_the_way_on_is_pending_and_state(model: torch.nn.Module) -> None:
    whole = list(generate(model, PROMPT, max_tokens=14, temperature=0))
    first = generate(model, PROMPT, max_tokens=6, temperature=0)
    head = list(first)
    assert first.pending is not None
    tail = list(generate(model, [first.pending], max_tokens=8, temperature=0, state=first.state))
    assert head + tail == whole


def test_the_prompt_may_be_cut_by_a_state(model: torch.nn.Module) -> None:
    _, state = model(torch.tensor([PROMPT[:4]]))
    kept = state.clone()
    with_state = list(generate(model, PROMPT[4:], max_tokens=8, seed=3, state=state))
    assert with_state == list(generate(model, PROMPT, max_tokens=8, seed=3))
    assert _same(state, kept, tolerance=0.0)


def test_a_long_prompt_is_read_in_chunks(rwkv4: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = torch.arange(23) % 200
    whole = list(generate(rwkv4, prompt, max_tokens=5, temperature=0))
    import sys

    monkeypatch.setattr(sys.modules["statewise.inference.generate"], "_LONGEST_CHUNK", 4)
    assert list(generate(rwkv4, prompt, max_tokens=5, temperature=0)) == whole


def test_a_seed_is_a_generator_of_its_own(rwkv4: torch.nn.Module) -> None:
    before = torch.get_rng_state()
    one, other = (generate(rwkv4, PROMPT, max_tokens=10, seed=11) for _ in range(2))
    pairs = [(next(one), next(other)) for _ in range(10)]
    assert all(a == b for a, b in pairs)
    assert torch.equal(before, torch.get_rng_state())
    assert [a for a, _ in pairs] != list(generate(rwkv4, PROMPT, max_tokens=10, seed=12))


def test_without_a_seed_the_global_generator_draws(rwkv4: torch.nn.Module) -> None:
    torch.manual_seed(4)
    first = list(generate(rwkv4, PROMPT, max_tokens=10))
    torch.manual_seed(4)
    assert list(generate(rwkv4, PROMPT, max_tokens=10)) == first


def test_a_suspended_run_leaves_the_callers_grad_mode_alone(rwkv4: torch.nn.Module) -> None:
    run = generate(rwkv4, PROMPT, max_tokens=3)
    for _ in run:
        assert torch.is_grad_enabled()
    with torch.no_grad():
        list(generate(rwkv4, PROMPT, max_tokens=2))
        assert not torch.is_grad_enabled()
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(run.state))
    logits, _ = rwkv4(torch.tensor([[1, 2]]), run.state)  # an ordinary tensor: it may be trained through
    logits.sum().backward()
    rwkv4.zero_grad()


def test_stop_ends_the_run_and_is_not_yielded(rwkv4: torch.nn.Module) -> None:
    free = list(generate(rwkv4, PROMPT, max_tokens=12, temperature=0))
    place = next(i for i, token in enumerate(free) if token not in free[:i] and i > 0)
    run = generate(rwkv4, PROMPT, max_tokens=12, temperature=0, stop=[free[place], 999])
    assert list(run) == free[:place]
    assert list(run) == []
    assert run.pending == free[place]
    _, state = rwkv4(torch.tensor([PROMPT + free[:place]]))
    assert _same(run.state, state)


def test_no_tokens_asked_for_reads_the_prompt_only(rwkv4: torch.nn.Module) -> None:
    run = generate(rwkv4, PROMPT, max_tokens=0)
    assert list(run) == []
    assert run.pending is None
    assert _same(run.state, rwkv4(torch.tensor([PROMPT]))[1])


def test_ids_past_the_tokenizer_are_masked(rwkv4: torch.nn.Module) -> None:
    ids = list(generate(rwkv4, PROMPT, max_tokens=40, temperature=50.0, seed=0, vocab_size=3))
    assert set(ids) == {0, 1, 2}


RULES: list[dict[str, float]] = [
    {"temperature": 0},
    {"temperature": 0, "presence_penalty": 1e6},  # drives every allowed logit far below the masked ones
    {"temperature": 50.0},
    {"temperature": 50.0, "top_k": 250},
    {"temperature": 50.0, "top_p": 0.999},
    {"temperature": 1e-3, "frequency_penalty": 30.0},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_rule_chooses_what_is_masked(rwkv4: torch.nn.Module, rule: dict[str, float]) -> None:
    free = list(generate(rwkv4, PROMPT, max_tokens=1, temperature=0))
    allowed = set(range(0, 10)) - {0, 4, *free}
    run = generate(rwkv4, PROMPT, max_tokens=60, seed=1, vocab_size=10, suppress=[0, 4, 99, 10**9, *free], **rule)  # type: ignore[arg-type]
    assert set(run) <= allowed


def test_a_mask_takes_the_best_of_what_is_left(rwkv4: torch.nn.Module) -> None:
    logits, _ = rwkv4(torch.tensor([PROMPT]))
    order = logits[0, -1].argsort(descending=True).tolist()
    chosen = [next(generate(rwkv4, PROMPT, max_tokens=1, temperature=0, suppress=order[:n])) for n in (0, 1, 5)]
    assert chosen == [order[0], order[1], order[5]]


def test_a_vocabulary_as_large_as_the_model_or_larger_masks_nothing(rwkv4: torch.nn.Module) -> None:
    plain = list(generate(rwkv4, PROMPT, max_tokens=10, seed=2))
    for size in (257, 65536):
        assert list(generate(rwkv4, PROMPT, max_tokens=10, seed=2, vocab_size=size, suppress=[257])) == plain


def test_masked_ids_may_stand_in_the_prompt(rwkv4: torch.nn.Module) -> None:
    assert list(generate(rwkv4, [256], max_tokens=2, temperature=0, vocab_size=256, suppress=[256]))


def test_what_padding_rows_hold_does_not_matter(rwkv4: torch.nn.Module) -> None:
    import copy

    padded = copy.deepcopy(rwkv4)
    with torch.no_grad():
        dict(padded.named_parameters())["head.weight"][256] = math.nan
    asked: dict[str, Any] = {"max_tokens": 10, "seed": 2, "vocab_size": 256}
    assert list(generate(padded, PROMPT, **asked)) == list(generate(rwkv4, PROMPT, **asked))


def test_penalties_count_what_was_sampled(rwkv4: torch.nn.Module) -> None:
    ids = list(generate(rwkv4, PROMPT, max_tokens=257, temperature=0, presence_penalty=1e6))
    assert sorted(ids) == list(range(257))  # nothing comes twice while anything is left


def test_memory_does_not_grow_with_the_run(rwkv4: torch.nn.Module) -> None:
    run: Generation = generate(rwkv4, PROMPT, max_tokens=2000, temperature=0)
    size = run.state.nbytes

    def held(tokens: int) -> int:
        """Bytes of every container there is, their tables with them, after so many more tokens: whatever is kept is
        kept in one. (What ``tracemalloc`` knows of grows by itself, as objects older than it are replaced.)"""
        for _ in range(tokens):
            next(run)
        gc.collect()
        return sum(sys.getsizeof(each, 0) for each in gc.get_objects())

    early, late = held(500), held(1000)
    assert run.state.nbytes == size
    assert late - early < 1000 * 4  # a list of all tokens grows by 8 bytes a token


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([], {}, "no tokens"),
        (torch.zeros(0, dtype=torch.int64), {}, "no tokens"),
        ([-1], {}, "-1"),
        ([257], {}, "257"),
        ([0.5], {}, "integers"),
        ([[1]], {}, "shape"),
        ("text", {}, "str"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"max_tokens": 1.5}, "max_tokens"),
        ([1], {"seed": -1}, "seed"),
        ([1], {"stop": ["a"]}, "stop"),
        ([1], {"vocab_size": 0}, "vocab_size"),
        ([1], {"vocab_size": 1.5}, "vocab_size"),
        ([1], {"vocab_size": True}, "vocab_size"),
        ([1], {"suppress": ["a"]}, "suppress"),
        ([1], {"suppress": range(257)}, "none of the model's 257 ids"),
        ([1], {"vocab_size": 2, "suppress": [0, 1]}, "none of the model's 257 ids"),
        ([1], {"temperature": -1}, "temperature"),
        ([1], {"top_p": 0}, "top_p"),
        ([1], {"top_k": -2}, "top_k"),
    ],
)
def test_wrong_arguments_are_refused_when_called(
    rwkv4: torch.nn.Module, prompt: object, options: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        generate(rwkv4, prompt, **{"max_tokens": 3, **options})  # type: ignore[arg-type]


def test_a_state_of_other_sizes_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="state"):
        generate(model, PROMPT, max_tokens=1, state=model.init_state(2))
    short = type(model.init_state(1))(model.init_state(1).layers[:1])
    with pytest.raises(ValueError, match="layers"):
        generate(model, PROMPT, max_tokens=1, state=short)


def test_nan_logits_stop_the_run(rwkv4: torch.nn.Module) -> None:
    import copy

    broken = copy.deepcopy(rwkv4)
    with torch.no_grad():
        next(iter(reversed(list(broken.parameters())))).fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        next(generate(broken, PROMPT, max_tokens=1))


def test_a_session_file_holds_state_and_pending(model: torch.nn.Module, tmp_path) -> None:  # type: ignore[no-untyped-def]
    run = generate(model, PROMPT, max_tokens=4, temperature=0)
    list(run)
    save_session(tmp_path / "s", run.state, run.pending)
    state, pending = load_session(tmp_path / "s")
    assert pending == run.pending
    assert _same(state, run.state, tolerance=0.0)
    assert _same(load_state(tmp_path / "s"), run.state, tolerance=0.0)
    run.state.save(tmp_path / "plain")
    assert load_session(tmp_path / "plain")[1] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "s"]


def test_a_lying_pending_token_is_refused(rwkv4: torch.nn.Module, tmp_path) -> None:  # type: ignore[no-untyped-def]
    save_session(tmp_path / "s", rwkv4.init_state(1), 12345)
    content = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(content.replace(b'"12345"', b'"-2345"'))
    with pytest.raises(StateError, match="-2345"):
        load_session(tmp_path / "s")
