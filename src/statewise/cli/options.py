"""A dataclass of options ↔ command-line arguments. Imports neither torch nor numpy.

A field without a default is given by its place (a ``tuple``: one or more), the others as ``--its-name``. The type says
how the text is read (``str``, ``int``, ``float``, ``bool`` as ``--x/--no-x``, ``Path``, ``Literal``, a ``tuple`` as
values divided by commas, a ``dict`` as ``name=value`` divided by commas, ``X | None``). Help is the text in
``Annotated[type, text]``, or the string under the field.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeAlias, TypeVar, Union

__all__ = ["Dtype", "from_arguments", "given_arguments"]

Dtype: TypeAlias = Literal["float64", "float32", "bfloat16", "float16"]

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def from_arguments(kind: type[T], arguments: Sequence[str], *, prog: str, description: str) -> T:
    """``kind`` filled from ``arguments``.

    Raises:
        ValueError: unknown, missing or unreadable arguments, in one line.
        SystemExit: after ``--help``, with code 0.
    """
    return kind(**given_arguments([kind], arguments, prog=prog, description=description))


def given_arguments(
    kinds: Sequence[type[Any]],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Field name → value of what was given, and of nothing else, over the fields of all ``kinds``.

    ``defaults`` (field name → value) only changes what the help shows.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for kind in kinds:
        hints = typing.get_type_hints(kind, include_extras=True)
        documented = _documented(kind)
        for field in dataclasses.fields(kind):
            hint, text = hints[field.name], documented.get(field.name, "")
            if typing.get_origin(hint) is Annotated:
                hint, text = typing.get_args(hint)[:2]
            _add(parser, field.name, hint, text, {**_default(field), **(defaults or {})})
    return vars(parser.parse_args(list(arguments)))


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.default is not dataclasses.MISSING:
        return {field.name: field.default}
    if field.default_factory is not dataclasses.MISSING:
        return {field.name: field.default_factory()}
    return {}


def _add(parser: argparse.ArgumentParser, name: str, hint: Any, text: str, defaults: Mapping[str, Any]) -> None:
    text = text.replace("%", "%%")
    if name not in defaults:
        if typing.get_origin(hint) is tuple:
            item = _reader(typing.get_args(hint)[0])
            parser.add_argument(name, type=item, nargs="+", help=text, metavar=name.upper())
        else:
            parser.add_argument(name, type=_reader(hint), help=text, metavar=name.upper())
        return
    flag = "--" + name.replace("_", "-")
    kind = _without_none(hint)
    shown = _shown(defaults[name])
    if shown:
        text = f"{text} (default: {shown})".strip()
    if kind is bool:
        action = argparse.BooleanOptionalAction
        parser.add_argument(flag, dest=name, action=action, help=text, default=argparse.SUPPRESS)
        return
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else None
    metavar = None if choices else _metavar(hint)
    parser.add_argument(flag, dest=name, type=_reader(hint), choices=choices, help=text, metavar=metavar)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).replace("%", "%%")


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) == 1:
            return kinds[0]
        # `int | float` and the like: the widest reader serves, text last.
        return str if str in kinds else Path if Path in kinds else float
    return hint


def _reader(hint: Any) -> Callable[[str], Any]:
    kind = _without_none(hint)
    if typing.get_origin(kind) in (tuple, list):
        item = _reader(typing.get_args(kind)[0])

        def values(text: str) -> tuple[Any, ...]:
            return tuple(item(part) for part in text.split(",") if part)

        values.__name__ = "comma-separated list"
        return values
    if typing.get_origin(kind) is dict:
        return _table
    if typing.get_origin(kind) is Literal:
        return type(typing.get_args(kind)[0])
    if not callable(kind):
        raise TypeError(f"an option cannot have the type {hint!r}")
    return typing.cast("Callable[[str], Any]", kind)


def _table(text: str) -> dict[str, Any]:
    """``a=1,b=true,c=word`` as numbers, booleans and texts."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise argparse.ArgumentTypeError(f"{part!r} is not name=value")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _metavar(hint: Any) -> str:
    kind = _without_none(hint)
    if typing.get_origin(kind) in (tuple, list):
        return _metavar(typing.get_args(kind)[0]) + ",..."
    if typing.get_origin(kind) is dict:
        return "NAME=VALUE,..."
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}.get(kind, "VALUE")


def _documented(kind: type[Any]) -> dict[str, str]:
    """Field name → the string that stands under it in the class's source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except OSError:  # installed without source: help without sentences
        return {}
    found: dict[str, str] = {}
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef)).body
    for field, text in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = " ".join(text.value.value.split())
    return found
