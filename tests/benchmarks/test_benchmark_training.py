"""The table of training speeds."""

from __future__ import annotations

from typing import Any

from benchmarks.training import table


def row(who: str, speed: int, rows: int = 8) -> dict[str, Any]:
    return {"who": who, "context": 512, "rows": rows, "precision": "float32", "tokens_per_second": speed}


def test_a_ratio_is_to_the_transformer_that_read_as_many_rows() -> None:
    lines = table([row("rwkv4", 300), row("transformer", 200), row("transformers rwkv4", 50, rows=1)]).splitlines()
    assert lines[2:] == ["| rwkv4 | 300 (1.50x) |", "| transformer | 200 |", "| transformers rwkv4 | 50 |"]


def test_what_was_not_timed_is_a_dash() -> None:
    other = {**row("rwkv4", 300), "context": 1024}
    lines = table([row("transformer", 200), other]).splitlines()
    assert lines[2:] == ["| transformer | 200 | – |", "| rwkv4 | – | 300 |"]
