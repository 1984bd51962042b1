"""``demo``: the whole way in miniature, and that it never touches what is already there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from statewise.cli.demo import _fresh
from statewise.text import load_corpus, order_entropy

Command = Callable[..., Any]


def test_the_whole_way_in_miniature(command: Command, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("".join(f"def number_{number}(): return {number}\n" for number in range(500)))
    threads = torch.get_num_threads()
    told = command("demo", "--data", text, "--out", tmp_path / "demo", "--steps", 24, "--sample", 12, "--json")
    report = told.json
    assert report["shown"] == {
        "the loss falls": True,
        "held-out text costs well below its order-0 entropy": True,
        "held-out text costs well below its order-1 entropy": report["bits_per_byte"]
        < 0.8 * report["order1_bits_per_byte"],
        "a resumed run is the unbroken run": True,
        "writing goes on from a saved state": True,
        "every law holds": True,
    }
    assert told.code == (0 if all(report["shown"].values()) else 1)
    assert report["order1_bits_per_byte"] == order_entropy(load_corpus(text).test, 1)
    assert report["stopped_at"] == 12
    assert Path(report["plot"]).read_bytes().startswith(b"\x89PNG")
    for piece in ("order-0 entropy", "gzip -9", "stopped at step 12", "rwkv7", "mamba", "bit for bit"):
        assert piece in told.err
    assert torch.get_num_threads() == threads


def test_a_used_folder_is_left_alone(tmp_path: Path) -> None:
    assert _fresh(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    assert _fresh(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo" / "x").touch()
    (tmp_path / "demo-2").touch()
    assert _fresh(tmp_path / "demo") == tmp_path / "demo-3"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", "1"), "--steps"),
        (("--steps", "0"), "--steps"),
        (("--sample", "1"), "--sample"),
        (("--model", "rwkv3"), "rwkv3"),
        (("--data", "absent"), "absent"),
    ],
)
def test_mistakes_write_nothing(command: Command, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    told = command("demo", "--out", tmp_path / "deep" / "demo", *arguments)
    assert told.code == 2
    assert says in told.err.splitlines()[-1]
    assert not (tmp_path / "deep").exists()
