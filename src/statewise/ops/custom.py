"""A function as an operator of torch.

:func:`torch.library.custom_op` makes the same, but imports ``torch._dynamo`` when an operator is first called, about a
second that whoever compiles nothing need not wait; and it looks for aliases among the results of every call, which our
tests do, with ``opcheck``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Operator", "operator"]

_NAMESPACE = "statewise"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


class Operator:
    """``statewise::NAME``; a call goes through torch's dispatcher."""

    def __init__(self, name: str, schema: str, device_types: str | Sequence[str], function: Callable[..., Any]) -> None:
        self.name = f"{_NAMESPACE}::{name}"
        torch.library.define(self.name, schema, lib=_library, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(self.name, device_types or "default", _untraced(function), lib=_library)
        self._overload = getattr(getattr(torch.ops, _NAMESPACE), name).default

    def __call__(self, *arguments: Any) -> Any:
        return self._overload(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What comes out of tensors that hold nothing; see :func:`torch.library.register_fake`."""
        torch.library.register_fake(self.name, function, lib=_library)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """See :func:`torch.library.register_autograd`."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=_library)


def operator(
    name: str, *, schema: str, device_types: str | Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Operator]:
    """Register the function below as ``statewise::name``.

    Args:
        name: without the namespace.
        schema: arguments and results; nothing that is given is changed, and no result is a view of it.
        device_types: torch's names of the devices that the function runs on; none: on any.
    """
    return lambda function: Operator(name, schema, device_types, function)


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` hidden from torch.compile, which else looks into whatever runs while it does."""
    hidden: list[Callable[..., Any]] = []

    def run(*arguments: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # nothing is being compiled, and asking would import it
            return function(*arguments)
        if not hidden:
            hidden.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return hidden[0](*arguments)

    return run
