"""What docs/bridges.md says of transformers runs, and without transformers the error says what to install."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/bridges.md"


def test_the_section_on_transformers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'statewise[hf]'")
    monkeypatch.chdir(tmp_path)
    section = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1]
    assert section.startswith("transformers\n")
    code = re.findall(r"^```python no-run\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    assert len(code) == 3
    session: dict[str, object] = {}
    for block in code:
        exec(compile(block, str(PAGE), "exec"), session)


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("hf", "hf_cache"):
        monkeypatch.delitem(sys.modules, f"statewise.bridges.{name}", raising=False)
    with pytest.raises(ImportError, match=re.escape("pip install 'statewise[hf]'")):
        importlib.import_module("statewise.bridges.hf")
