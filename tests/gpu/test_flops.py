"""Matrix products are counted as they are made."""

from __future__ import annotations

import dataclasses
import os

import pytest

pytest.importorskip("triton")

from benchmarks.gpu_cases import CASES, GpuCase
from benchmarks.gpu_flops import COUNTED, count_flops

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: nothing is interpreted"
)


def case(op: str) -> GpuCase:
    return next(case for case in CASES if case.op == op)


@needs_interpreter
@pytest.mark.parametrize("op", COUNTED)
def test_a_count_is_at_least_the_recurrences_own_products_and_grows_with_heads(op: str) -> None:
    published = case(op)
    forward, both = count_flops(published)
    size = published.sizes
    state = size["K"] * size["V"] if "K" in size else size["P"] * size["N"]
    # What is learnt enters the state, and the state is read: two products a token; backward makes as many twice.
    own = 4 * state * published.batch * published.time * size["H"]
    assert forward >= own
    assert both >= 3 * own
    assert count_flops(dataclasses.replace(published, batch=2 * published.batch)) == (2 * forward, 2 * both)


@needs_interpreter
def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of"):
        count_flops(case("wkv4"))
    few = dataclasses.replace(case("ssd"), batch=1, time=4096, sizes={**case("ssd").sizes, "H": 1})
    with pytest.raises(ValueError, match="no count of it is true"):
        count_flops(few)


def test_without_the_interpreter_there_is_nothing_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        count_flops(case("wkv7"))
