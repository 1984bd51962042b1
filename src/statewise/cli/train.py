"""``statewise train``: a run from flags, from a TOML file with the same names, or from both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from statewise.cli import COMMANDS
from statewise.cli.options import given_arguments
from statewise.training.config import TrainConfig

if TYPE_CHECKING:
    from statewise.training import RunResult

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
    from statewise.cli.console import print_json
    from statewise.ops.memory import keep_freed_memory
    from statewise.training import train

    keep_freed_memory()
    result = train(config)
    if options.json:
        print_json({**dataclasses.asdict(result), "plot": str(_plot(config)) if config.plot else None})
    else:
        print(_summary(result, config))
    return 130 if result.interrupted else 0


def configure(file: Path | None, given: Mapping[str, Any]) -> TrainConfig:
    """The run that is meant: flags over the file over the defaults; to resume without a file, over the run's own.

    Raises:
        ValueError: an unknown name or a value that is not accepted.
        FileNotFoundError: no such file.
    """
    base = TrainConfig() if file is None else TrainConfig.from_toml(file)
    if file is None and given.get("resume"):
        out = given.get("out", base.out)
        written = Path(out) / "config.toml"
        if written.is_file():
            base = dataclasses.replace(TrainConfig.from_toml(written), out=out)
    return dataclasses.replace(base, **given)


def _plot(config: TrainConfig) -> Path:
    return Path(config.out) / "loss.png"


def _summary(result: RunResult, config: TrainConfig) -> str:
    lines = [f"{'stopped' if result.interrupted else 'done'} at step {result.step} of {config.steps}"]
    for name, value in (("training", result.bits_per_byte), ("validation", result.valid_bits_per_byte)):
        if value is not None:
            lines.append(f"{name}: {value:.4f} bits per byte")
    lines.append(f"{result.tokens:,} tokens in {result.seconds:.0f} s")
    lines.append(f"snapshot: {result.snapshot}")
    if config.plot:
        lines.append(f"plot: {_plot(config)}")
    if result.interrupted:
        lines.append(f"go on with: statewise train --resume --out {result.out}")
    return "\n".join(lines)
