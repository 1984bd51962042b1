"""``statewise train``: a run from flags, from a TOML file with the same names, or from both.

The model decides what the names are: those of a language model's run, or of an image classifier's.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from statewise.cli import COMMANDS
from statewise.cli.options import given_arguments
from statewise.training.config import TrainConfig, WrittenConfig
from statewise.training.image_config import ImageTrainConfig, is_image_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

if TYPE_CHECKING:
    from statewise.training import ClassifierResult, RunResult

__all__ = ["Options", "config_kind", "configure", "main"]

Config = TypeVar("Config", bound=WrittenConfig)

_TEXT_NOTE = "A model of images has other options: `statewise train --model vrwkv_tiny --help`."


@dataclass(frozen=True)
class Options:
    """What the command line may say besides the fields of the configuration."""

    config: Annotated[Path | None, "a TOML file with the names below; flags win over it"] = None
    json: Annotated[bool, "print one JSON document at the end"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    return _images(arguments) if config_kind(arguments) is ImageTrainConfig else _text(arguments)


def _text(arguments: Sequence[str]) -> int:
    given = given_arguments(
        [Options, TrainConfig], arguments, prog="statewise train", description=f"{COMMANDS['train']}. {_TEXT_NOTE}"
    )
    options = Options(given.pop("config", None), given.pop("json", False))
    config: TrainConfig = configure(options.config, given)
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


def _images(arguments: Sequence[str]) -> int:
    given = given_arguments(
        [Options, ImageTrainConfig], arguments, prog="statewise train", description="train a classifier of images"
    )
    options = Options(given.pop("config", None), given.pop("json", False))
    config = configure(options.config, given, ImageTrainConfig)
    from statewise.cli.console import print_json
    from statewise.ops.memory import keep_freed_memory
    from statewise.training import train_classifier

    keep_freed_memory()
    result = train_classifier(config)
    pictures = [path for name in ("curves.png", "confusion.png") if (path := result.out / name).is_file()]
    if options.json:
        print_json({**dataclasses.asdict(result), "plots": list(map(str, pictures))})
    else:
        print(_image_summary(result, config, pictures))
    return 130 if result.interrupted else 0


def config_kind(arguments: Sequence[str]) -> type[TrainConfig] | type[ImageTrainConfig]:
    """The configuration that ``arguments`` fill: the model that is meant decides."""
    return ImageTrainConfig if is_image_model(_model(_flags(arguments))) else TrainConfig


def _model(said: Mapping[str, str]) -> str:
    if "model" in said:
        return said["model"]
    if "config" in said:
        file = Path(said["config"])
    elif "resume" in said:
        file = Path(said.get("out", TrainConfig.out)) / "config.toml"
    else:
        return TrainConfig.model
    try:
        return str(tomllib.loads(file.read_text("utf-8")).get("model", TrainConfig.model))
    except (OSError, ValueError):  # told with its reason by what reads it next
        return TrainConfig.model


def _flags(arguments: Sequence[str]) -> dict[str, str]:
    """Flags and what follows them, last ones winning, without knowing which flags there are."""
    found: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            found[name] = value if equals else next(iter(arguments[number + 1 : number + 2]), "")
    return found


def configure(
    file: Path | None,
    given: Mapping[str, Any],
    kind: type[Config] = TrainConfig,  # type: ignore[assignment]  # the default of a type variable
) -> Config:
    """The run that is meant: flags over the file over the defaults; to resume without a file, over the run's own.

    Raises:
        ValueError: an unknown name or a value that is not accepted.
        FileNotFoundError: no such file.
    """
    base = kind() if file is None else kind.from_toml(file)
    if file is None and given.get("resume"):
        out = given.get("out", base.to_dict()["out"])
        written = Path(out) / "config.toml"
        if written.is_file():
            base = dataclasses.replace(kind.from_toml(written), **{"out": out})
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
    return "\n".join([*lines, *_go_on(result)])


def _image_summary(result: ClassifierResult, config: ImageTrainConfig, pictures: Sequence[Path]) -> str:
    lines = [f"{'stopped' if result.interrupted else 'done'} at step {result.step} of {config.steps}"]
    if result.test_top1 is not None and result.test_top5 is not None:
        lines.append(f"test: top-1 {100 * result.test_top1:.2f} %, top-5 {100 * result.test_top5:.2f} %")
    lines.append(f"{result.images:,} images in {result.seconds:.0f} s")
    lines.append(f"snapshot: {result.snapshot}")
    lines += [f"plot: {path}" for path in pictures]
    return "\n".join([*lines, *_go_on(result)])


def _go_on(result: RunResult | ClassifierResult) -> list[str]:
    return [f"go on with: statewise train --resume --out {result.out}"] if result.interrupted else []
