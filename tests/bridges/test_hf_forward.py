"""One call of the wrapped model: padding, chunks, loss, packed rows, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.training import language_model_loss
from tests.bridges.small_models import FAMILIES, VOCAB, padded, prompts, small

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'statewise[hf]'")

from torch.utils import _pytree as pytree
from transformers import DataCollatorWithFlattening, DynamicCache

from statewise.bridges import hf
from statewise.bridges.hf_cache import RecurrentStateLayer


def close(got: Any, want: Any) -> None:
    """Equal trees of double precision, but for the order of sums."""
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_padded_batch_is_each_row_alone(family: str, side: str) -> None:
    model, rows = small(family), prompts(7, 3, 1, 5)
    wrapped = hf.wrap(model)
    ids, mask = padded(rows, side, filler=10**6)  # outside the vocabulary: padding is never looked up
    cache = DynamicCache(config=wrapped.config)
    logits = wrapped(ids, attention_mask=mask, past_key_values=cache).logits
    state = wrapped.state_of(cache)
    # A second chunk, padded on the other side, and one step with a mask over everything.
    more, more_mask = padded(prompts(2, 4, 0, 3), {"left": "right", "right": "left"}[side], filler=-1)
    everything = torch.cat([mask, more_mask], 1)
    second = wrapped(more, attention_mask=everything, past_key_values=cache).logits
    step = torch.tensor([[3], [1], [4], [1]])
    everything = torch.cat([everything, torch.ones(4, 1, dtype=torch.long)], 1)
    third = wrapped(step, attention_mask=everything, past_key_values=cache).logits
    for number, row in enumerate(rows):
        want, alone = model(row[None])
        close(logits[number][mask[number] == 1], want[0])
        close(state.select([number]), alone)
        want, alone = model(more[number][more_mask[number] == 1][None], alone)
        close(second[number][more_mask[number] == 1], want[0])
        want, alone = model.step(step[number], alone)
        close(third[number], want)
        close(wrapped.state_of(cache).select([number]), alone)


MODEL = small("rwkv7")
WRAPPED = hf.wrap(MODEL)


@given(
    blocks=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=4),
    kept=st.integers(0, 9),
)
@settings(max_examples=25)
@torch.no_grad()
def test_any_block_of_ones_reads_that_block(blocks: list[tuple[int, int]], kept: int) -> None:
    ids = torch.randint(VOCAB, (len(blocks), 9), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for row, (start, length) in enumerate(blocks):
        mask[row, start : start + length] = 1
    output = WRAPPED(ids, attention_mask=mask, logits_to_keep=kept, use_cache=True)
    assert output.logits.shape == (len(blocks), kept or 9, VOCAB)
    state = WRAPPED.state_of(output.past_key_values)
    for row, (start, length) in enumerate(blocks):
        want, alone = MODEL(ids[row : row + 1, start : start + length])
        close(state.select([row]), alone)
        for column in range(max(start, 9 - (kept or 9)), start + length):
            close(output.logits[row, column - 9], want[0, column - start])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_chunks_continue_and_leave_no_trace(family: str) -> None:
    model, (row,) = small(family), prompts(12)
    wrapped, ids = hf.wrap(model), row[None]
    want, end = model(ids)
    first = wrapped(ids[:, :5])
    before = copy.deepcopy(first.past_key_values)
    kept_state = wrapped.state_of(first.past_key_values).clone()
    second = wrapped(ids[:, 5:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], 1), want)
    close(wrapped.state_of(second.past_key_values), end)
    assert second.past_key_values.get_seq_length() == 12
    # The copy did not move along; without use_cache nothing is written; a reset cache begins at the model's start.
    close(wrapped.state_of(before), kept_state)
    again = wrapped(ids[:, 5:], past_key_values=before, use_cache=False)
    assert again.past_key_values is None
    close(again.logits, want[:, 5:])
    close(wrapped.state_of(before), kept_state)
    before.reset()
    assert wrapped.state_of(before) is None
    close(wrapped(ids.expand(2, -1), past_key_values=before).logits, want.expand(2, -1, -1))


@torch.no_grad()
def test_rows_of_a_cache_are_repeated_and_chosen() -> None:
    model, (row,) = small("rwkv4"), prompts(6)
    wrapped = hf.wrap(model)
    _, state = model(torch.stack([row, row.flip(0)]))
    cache = wrapped.cache_of(state)
    cache.batch_repeat_interleave(2)
    close(wrapped.state_of(cache), state.select([0, 0, 1, 1]))
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    close(wrapped.state_of(cache), state.select([0, 1, 1]))


def test_gradients_pass_through_a_cache() -> None:
    model, (row,) = small("mamba"), prompts(10)
    wrapped, ids = hf.wrap(model), row[None]
    wrapped(ids, labels=ids).loss.backward()
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    first = wrapped(ids[:, :6], use_cache=True)
    second = wrapped(ids[:, 6:], past_key_values=first.past_key_values)
    language_model_loss(torch.cat([first.logits, second.logits], 1)[:, :-1], ids[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        # transformers takes its loss in single precision
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_that_of_the_rows_without_padding(side: str) -> None:
    model, rows = small("mamba2"), prompts(7, 3, 5)
    ids, mask = padded(rows, side)
    wrapped = hf.wrap(model)
    losses = []
    for row in rows:
        logits, _ = model(row[None, :-1])
        losses.append(torch.nn.functional.cross_entropy(logits[0], row[1:], reduction="sum"))
    want, steps = torch.stack(losses).sum(), sum(len(row) - 1 for row in rows)
    torch.testing.assert_close(
        wrapped(ids, attention_mask=mask, labels=ids).loss.double(), want / steps, rtol=1e-6, atol=0
    )
    told = wrapped(ids, attention_mask=mask, labels=ids, num_items_in_batch=100).loss.double()
    torch.testing.assert_close(told, want / 100, rtol=1e-6, atol=0)
    first_row = ids.clone()
    first_row[1:] = -100
    alone = wrapped(ids, attention_mask=mask, labels=first_row).loss.double()
    torch.testing.assert_close(alone, losses[0] / 6, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["rwkv7", "mamba"])
def test_packed_rows_do_not_see_each_other(family: str) -> None:
    model, rows = small(family), prompts(6, 2, 4)
    batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    batch = {name: torch.as_tensor(value) for name, value in batch.items()}
    output = hf.wrap(model)(**batch, use_cache=False)
    want = torch.cat([model(row[None])[0] for row in rows], 1)
    close(output.logits, want)
    targets = torch.cat([torch.cat([row[1:], torch.tensor([-100])]) for row in rows])
    torch.testing.assert_close(
        output.loss.double(), torch.nn.functional.cross_entropy(want[0], targets), rtol=1e-6, atol=0
    )


@torch.no_grad()
def test_logits_to_keep_and_plain_tuples() -> None:
    model, (row,) = small("rwkv6"), prompts(8)
    wrapped, ids = hf.wrap(model), row[None]
    want, _ = model(ids)
    assert torch.equal(wrapped(ids, logits_to_keep=3).logits, want[:, -3:])
    assert torch.equal(wrapped(ids, logits_to_keep=torch.tensor([6, 1])).logits, want[:, [6, 1]])
    logits, cache = wrapped(ids, return_dict=False)
    assert torch.equal(logits, want)
    assert isinstance(cache.layers[0], RecurrentStateLayer)
    assert wrapped.train()(ids).past_key_values is None


@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")  # the name older releases know
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_recomputes(family: str) -> None:
    model, (row,) = small(family), prompts(8)
    wrapped, ids = hf.wrap(model).train(), row[None]
    block = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    calls: list[None] = []
    # Before, not after: recomputing stops at the last value that is needed, within the block.
    block.register_forward_pre_hook(lambda *_: calls.append(None))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        calls.clear()
        wrapped(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    want = gradients()
    assert len(calls) == 1
    wrapped.gradient_checkpointing_enable()
    close(gradients(), want)
    assert len(calls) == 2
    wrapped.gradient_checkpointing_disable()
    gradients()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("given_arguments", "message"),
    [
        ({"inputs_embeds": torch.zeros(2, 4, 64)}, "inputs_embeds"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])}, "hole in row 1"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 2, 2]])}, "other values"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask has shape"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "attention_mask has shape"),
        ({"labels": torch.zeros(2, 3, dtype=torch.long)}, "labels have shape"),
        ({"labels": torch.zeros(2, 4, dtype=torch.long), "logits_to_keep": 1}, "logits_to_keep"),
        ({"past_key_values": DynamicCache()}, "past_key_values is"),
        ({"past_key_values": [1]}, "past_key_values is"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])}, "one row"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "input_ids has shape"),
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": torch.full((2, 4), VOCAB)}, "outside the vocabulary"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_is_refused(given_arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WRAPPED(**{"input_ids": torch.zeros(2, 4, dtype=torch.long), **given_arguments})


def test_refusals_that_need_more_than_an_argument() -> None:
    packed = torch.tensor([[0, 1, 0, 1]])
    with pytest.raises(ValueError, match="use_cache=False"):
        WRAPPED(torch.zeros(1, 4, dtype=torch.long), position_ids=packed)
    other = hf.wrap(small("rwkv7", num_layers=3))
    cache = other(torch.zeros(1, 4, dtype=torch.long)).past_key_values
    with pytest.raises(ValueError, match="tensors; this model's state has"):
        WRAPPED(torch.zeros(1, 4, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="another structure"):
        WRAPPED.cache_of(small("mamba").init_state(1))
    with pytest.raises(ValueError, match="every_n_layers"):
        WRAPPED._set_gradient_checkpointing(every_n_layers=2)
    with pytest.raises(ValueError, match="recurrent states"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
