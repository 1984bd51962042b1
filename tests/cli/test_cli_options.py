"""Options: a dataclass says what the command line may say."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from statewise.cli.options import from_arguments, given_arguments


@dataclass(frozen=True)
class Sample:
    """What it is for."""

    source: Annotated[Path, "where from"]
    count: Annotated[int, "how many"] = 3
    text: Annotated[str | None, "what to say"] = None
    quick: Annotated[bool, "hurry"] = False
    rate: float = 0.5
    """how fast, as 5% or more,
    per step."""
    high: int | None = None
    """the other end"""
    kind: Literal["one", "two"] = "one"
    sizes: tuple[int, ...] = (1, 2)
    more: dict[str, int | float | bool | str] = field(default_factory=dict)


def parse(*arguments: str) -> Sample:
    return from_arguments(Sample, arguments, prog="statewise sample", description="A sample.")


def test_types_are_read() -> None:
    first = parse("a/b", "--count", "7", "--text", "None", "--quick", "--rate", "1e-3")
    assert first == Sample(Path("a/b"), 7, "None", True, 1e-3)
    second = parse("a/b", "--high", "4", "--kind", "two", "--sizes", "5,6,7")
    assert second == Sample(Path("a/b"), high=4, kind="two", sizes=(5, 6, 7))


def test_a_table_is_names_with_values() -> None:
    assert parse("a", "--more", "rank=8,scale=0.5,norm=true,kind=plain").more == {
        "rank": 8,
        "scale": 0.5,
        "norm": True,
        "kind": "plain",
    }


def test_what_is_left_out_keeps_its_default() -> None:
    assert parse("a") == Sample(Path("a"))


def test_only_what_was_given_is_reported() -> None:
    given = given_arguments([Sample], ["a", "--no-quick"], prog="x", description="")
    assert given == {"source": Path("a"), "quick": False}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "SOURCE"),
        (["a", "b"], "b"),
        (["a", "--count", "x"], "--count"),
        (["a", "--cou", "3"], "--cou"),
        (["a", "--kind", "three"], "--kind"),
        (["a", "--sizes", "1,x"], "--sizes"),
        (["a", "--count"], "--count"),
        (["a", "--more", "rank"], "name=value"),
    ],
)
def test_mistakes_are_one_line_that_names_the_argument(arguments: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
    assert "statewise sample --help" in str(caught.value)


def test_help_tells_every_field_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for piece in (
        "where from",
        "how many (default: 3)",
        "--quick, --no-quick hurry (default: no)",
        "how fast, as 5% or more, per step. (default: 0.5)",
        "--high N the other end",
        "{one,two}",
        "--sizes N,...",
        "--more NAME=VALUE,...",
    ):
        assert piece in text
