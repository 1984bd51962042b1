"""``statewise train``: a run from flags, from a TOML file with the same names, or from both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from statewise.cli import COMMANDS
from statewise.cli.options import given_arguments
from statewise.training.config import TrainConfig

__all__ = ["Options", "configure", "main"]


@dataclass(frozen=True)
class Options:
    """What the command line may say besides the fields of :class:`TrainConfig`."""

    config: Annotated[Path | None, "a TOML file with the names below; flags win over it"] = None
    json: Annotated[bool, "print one JSON document at the end"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    given = given_arguments([Options, TrainConfig], arguments, prog="statewise train", description=COMMANDS["train"])
    options = Options(given.pop("config", None), given.pop("json", False))
    config = configure(options.config, given)
    from statewise.training import train

    train(config)
    return 0


def configure(file: Path | None, given: Mapping[str, Any]) -> TrainConfig:
    """The run that is meant: flags over the file over the defaults; to resume, the run's own file stands below.

    Raises:
        ValueError: an unknown name or a value that is not accepted.
        FileNotFoundError: no such file.
    """
    base = TrainConfig() if file is None else TrainConfig.from_toml(file)
    if given.get("resume", base.resume) and file is None:
        written = Path(given.get("out", base.out)) / "config.toml"
        if written.is_file():
            base = TrainConfig.from_toml(written)
    return dataclasses.replace(base, **given)
