"""What the pages say is run: Python blocks, command lines, links, recipes."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest
import torch
from markdown_page import Block, blocks, commands, links, run_page

import statewise
from statewise.cli import COMMANDS
from statewise.cli import train as train_command
from statewise.cli.options import given_arguments
from statewise.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "docs").glob("*.md"))
OPERATORS = sorted((ROOT / "src/statewise/ops").glob("*/README.md"))
PAGES = [ROOT / "README.md", *CHAPTERS, *OPERATORS, ROOT / "recipes/README.md"]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
# Pages that train a model to show what it learns.
TRAINING = {"rwkv4", "rwkv7", "mamba", "vision_rwkv"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def with_code(pages: list[Path]) -> list[object]:
    return [
        pytest.param(page, id=name_of(page), marks=pytest.mark.long if page.stem in TRAINING else ())
        for page in pages
        if any(block.runs for block in blocks(page.read_text("utf-8")))
    ]


@pytest.mark.parametrize("page", with_code(PAGES))
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_page(page) > 0


def check_command(line: str) -> None:
    """Raises ValueError for what the command line would refuse; ``--help`` ends with SystemExit, as it should."""
    _, name, *arguments = shlex.split(line)
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}")
    module = importlib.import_module(f"statewise.cli.{name}")
    config = train_command.config_kind(arguments)
    kinds = [module.Options, config] if name == "train" else [module.Options]
    given = given_arguments(kinds, arguments, prog=f"statewise {name}", description="")
    if name == "train":
        file = given.pop("config", None)
        given.pop("json", None)
        train_command.configure(None if file is None else ROOT / file, given, config)


def command_lines() -> list[object]:
    return [
        pytest.param(line, id=f"{name_of(page)}: {line}")
        for page in PAGES
        for line in dict.fromkeys(commands(page.read_text("utf-8")))
    ]


@pytest.mark.parametrize("line", command_lines())
def test_command_line_is_accepted(line: str) -> None:
    if "--help" in shlex.split(line):
        with pytest.raises(SystemExit) as end:
            check_command(line)
        assert end.value.code == 0
    else:
        check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [target for target in links(page.read_text("utf-8")) if not (page.parent / target).exists()]
    assert not missing


def test_index_lists_every_page() -> None:
    index = ROOT / "docs/index.md"
    linked = {(index.parent / target).resolve() for target in links(index.read_text("utf-8"))}
    assert {*CHAPTERS, *OPERATORS, ROOT / "recipes/README.md"} - {index} <= linked


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_recipe_is_a_run(recipe: Path) -> None:
    config = TrainConfig.from_toml(recipe)
    assert config.data == "enwik8"
    open_ends = ("learning_rate", "final_learning_rate", "schedule", "weight_decay", "betas", "eps", "l2wrap")
    assert not [name for name in open_ends if getattr(config, name) is None], "a recipe leaves nothing to defaults"
    with torch.device("meta"):
        model = statewise.create(
            config.model, vocab_size=256, num_layers=config.num_layers, width=config.width, **config.model_fields
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    readme = (ROOT / "recipes/README.md").read_text("utf-8")
    row = next(line for line in readme.splitlines() if line.startswith(f"| `{recipe.name}`"))
    assert f" {count / 1e6:.1f} M " in row
    assert f" {config.steps * config.accumulate * config.batch_size * config.context / 1e6:.0f} M " in row


def test_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"rwkv4-l12-d512", "rwkv4-l6-d512", "rwkv7-l6-d512", "mamba-l6-d512"}


# The tools above, on a page that is wrong in every way they are to notice.

SAMPLE = """
# A page with `statewise train --steps 3` in it and [a link](nowhere.md#part)

```python
value = 1
```

- in a list

  ```python
  assert value == 2, "the second block sees the first"
  ```

```python no-run
raise SystemExit
```

```shell
$ statewise generate runs/a \\
    --prompt "a # b"   # a remark
pip install x
```
<!-- `statewise nothing here` -->
"""


def test_blocks_of_a_page() -> None:
    found = list(blocks(SAMPLE))
    assert [block.runs for block in found] == [True, True, False, False]
    assert found[0] == Block(("python",), "value = 1\n", 5)
    assert found[1].text.startswith("assert"), "indentation of the list is taken off"
    with pytest.raises(ValueError, match="line 1 is not closed"):
        list(blocks("```python\nvalue = 1"))


def test_a_wrong_block_fails_at_its_own_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(SAMPLE, "utf-8")
    with pytest.raises(AssertionError, match="sees the first") as caught:
        run_page(page)
    assert caught.traceback[-1].lineno == SAMPLE.splitlines().index(
        '  assert value == 2, "the second block sees the first"'
    )
    page.write_text(SAMPLE.replace("value == 2", "value == 1"), "utf-8")
    assert run_page(page) == 2


def test_commands_and_links_of_a_page() -> None:
    assert list(commands(SAMPLE)) == ["statewise generate runs/a --prompt 'a # b'", "statewise train --steps 3"]
    assert list(links(SAMPLE)) == ["nowhere.md"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("statewise nonsense", "no command 'nonsense'"),
        ("statewise train --stepz 3", "unrecognized arguments: --stepz"),
        ("statewise train --steps 0", "steps is 0"),
        ("statewise generate", "required: CHECKPOINT"),
        ("statewise train --config recipes/rwkv4-l6-d512.toml --schedule linear", "invalid choice: 'linear'"),
    ],
)
def test_a_wrong_command_is_refused(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_command(line)
