"""``statewise backends``: which backend serves which operator on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from statewise.cli import COMMANDS
from statewise.cli.options import from_arguments

__all__ = ["Options", "main"]


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    json: Annotated[bool, "print one JSON document"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise backends", description=COMMANDS["backends"])
    from statewise.cli.console import print_json, print_table
    from statewise.ops import backends

    served = backends()
    if options.json:
        print_json(
            {
                op: {name: {"serves": status.serves, "reason": status.reason} for name, status in row.items()}
                for op, row in served.items()
            }
        )
        return 0
    names = list(next(iter(served.values())))
    rows = [[op, *("yes" if row[name].serves else "no" for name in names)] for op, row in served.items()]
    print_table(["operator", *names], rows)
    reasons = {f"{name}: {row[name].reason}" for row in served.values() for name in names if not row[name].serves}
    for reason in sorted(reasons):
        print(reason)
    return 0
