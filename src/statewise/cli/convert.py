"""``statewise convert``: rewrite a checkpoint in another format, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from statewise.cli import COMMANDS
from statewise.cli.options import from_arguments

__all__ = ["Options", "main"]


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    source: Annotated[str, "a checkpoint file or directory, a run's folder, or hf://owner/name"]
    target: Annotated[Path, "what to write: a .pth file for `rwkv`, a .gguf for `gguf`, a directory for the others"]
    to: Annotated[str, "format: statewise, rwkv (a .pth), fla, mamba-ssm, hf, mamba.py or gguf"] = "statewise"
    overwrite: Annotated[bool, "write over what is already there"] = False
    json: Annotated[bool, "print one JSON document"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise convert", description=COMMANDS["convert"])
    from statewise.cli.checkpoints import locate, survey
    from statewise.errors import WeightsError
    from statewise.weights import FORMATS, write

    if options.to not in FORMATS:
        raise ValueError(f"--to is {options.to!r}; accepted are {', '.join(FORMATS)}")
    target = options.target
    taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if taken and not options.overwrite:
        raise ValueError(f"{target} is already there; --overwrite writes over it")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no directory to write {target.name} into")
    source = locate(options.source)
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"{target} cannot be converted onto itself")
    found = survey(source)
    for names, what in ((found.missing, "missing"), (found.extra, "unknown"), (sorted(found.misshaped), "mis-shaped")):
        if names:
            raise WeightsError(f"{source}: tensor {names[0]} is {what} ({len(names)} in all): not converted")
    try:
        write(target, found.checkpoint, options.to)
    except OSError as error:
        raise ValueError(f"{target} cannot be written: {error.strerror}") from error
    from statewise.cli.console import print_json

    result = {
        "architecture": found.checkpoint.architecture,
        "from": found.checkpoint.layout,
        "to": options.to,
        "tensors": len(found.checkpoint.tensors),
        "path": str(target),
    }
    if options.json:
        print_json(result)
    else:
        print(f"{result['architecture']}: {result['tensors']} tensors, {result['from']} -> {options.to}, in {target}")
    return 0
