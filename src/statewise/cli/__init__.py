"""The command ``statewise``: one module per command, imported only when it runs; torch only when it computes.

Exit codes: 0 done; 1 the answer is no (``verify``); 2 an error, told in one line; 130 interrupted; 141 the reader of
our output went away.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main"]

#: Command → what it does. Each lives in the module of its name and offers ``main(arguments) -> exit code``.
COMMANDS = {
    "demo": "train a small model on this machine, measure it, let it write, stop it and carry on",
    "train": "train a model on text or images, with snapshots that resume bit for bit",
    "generate": "continue a prompt, as a stream of text",
    "evaluate": "bits per byte of a model over a whole split, beside gzip and xz",
    "classify": "what images show, by a classifier; what the classifier looks at",
    "inspect": "what a checkpoint holds: architecture, sizes, tensors, what is missing or extra",
    "convert": "rewrite a checkpoint in another project's format",
    "verify": "check on a model that parallel, split, step, padded and packed forms agree",
    "bench": "time an operator or a model beside installed peers",
    "backends": "which backend serves which operator here, and why another does not",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; ``None`` takes the process's own.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        return _run(given)
    except SystemExit as request:  # argparse, after --help
        return request.code if isinstance(request.code, int) else 0
    except KeyboardInterrupt:
        if debug:
            raise
        print("statewise: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more on exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if debug:
            raise
        print(f"statewise: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _run(given: list[str]) -> int:
    if not given:
        raise ValueError(f"a command is needed: {', '.join(COMMANDS)} (see `statewise --help`)")
    name = given[0]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        from statewise import __version__

        print(f"statewise {__version__}")
        return 0
    if name not in COMMANDS:
        what = "option" if name.startswith("-") else "command"
        raise ValueError(f"unknown {what} {name!r}; commands are {', '.join(COMMANDS)} (see `statewise --help`)")
    module = importlib.import_module(f"statewise.cli.{name}")
    code: int = module.main(given[1:])
    sys.stdout.flush()  # so that a reader who left is met here, not while Python shuts down
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: statewise COMMAND [options]",
            "",
            "Recurrent sequence models with a linear state: RWKV and Mamba.",
            "",
            "commands:",
            *lines,
            "",
            "`statewise COMMAND --help` tells a command's options; most take --json for output a program can read.",
            "--debug, anywhere, shows the whole traceback of an error. --version tells the version.",
        ]
    )


def _one_line(error: Exception) -> str:
    """The error in one line; the kind is told where the message alone would not be understood."""
    from statewise.errors import FileError

    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    if text and isinstance(error, (ValueError, FileError, OSError, ImportError)):
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (--debug shows where)"
