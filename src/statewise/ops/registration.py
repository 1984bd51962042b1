"""A pair of kernels, forward and backward, as one operator of torch.

Compiled CPU kernels and GPU kernels are registered alike, with a fake and an autograd implementation:
``torch.compile(fullgraph=True)``, ``torch.export``, autocast and checkpointing see one node, and what forward
keeps for backward exists only if something will be differentiated.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from statewise.ops.custom import operator

__all__ = ["Call", "Gradients", "Pair", "Results", "Some", "keeps", "register_pair"]

#: Tensors, and ``None`` for those that are optional and absent.
Some = Sequence[Any]

#: y, the state leaves after the last token, and what is kept for backward.
Results = tuple[Tensor, Sequence[Tensor], Tensor]

#: Of inputs, parameters and first state; anything for those that are absent.
Gradients = tuple[Some, Some, Some]


class Call(NamedTuple):
    """What an operator was called with, each in the order of its declarations; all tensors are contiguous.

    Attributes:
        inputs: tensors with a time axis.
        parameters: tensors without one.
        leaves: of the first state.
        where: sequences lie.
        options: how to compute.
    """

    inputs: Some
    parameters: Some
    leaves: Some
    where: Some
    options: Some


class Pair(Protocol):
    """The two kernels of an operator."""

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        """Of what forward keeps for backward, in the dtype of the state; ``(0,)`` if that is nothing."""

    def forward(self, call: Call, keep: bool) -> Results:
        """Nothing is kept (an empty tensor) unless ``keep``."""

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        """From the last state and what was kept, and the cotangents of y and of the last state."""


def keeps(name: str, keep: int, revision: int) -> bool:
    """Whether forward keeps what backward needs: ``keep`` is 0, or the revision of what is kept.

    A number, not a truth: it is a constant of every graph the operator is in, so that what torch.compile wrote to its
    disk cache with a release that kept something else is not taken for this one's.

    Raises:
        RuntimeError: another release's revision, out of an exported program.
    """
    if keep not in (0, revision):
        raise RuntimeError(
            f"{name}: this program was exported with another release of statewise, which kept other things for "
            f"backward (revision {keep}; here it is {revision}); export it again"
        )
    return keep != 0


def register_pair(
    name: str,
    pair: Pair,
    *,
    device_types: str | Sequence[str],
    time: Sequence[str],
    shared: Sequence[str],
    state: Sequence[str],
    output: str,
    where: Sequence[str],
    options: Sequence[str] = (),
    optional: Sequence[str] = (),
    revision: int = 1,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register ``statewise::NAME`` and ``statewise::NAME_backward``.

    Args:
        name: of the operator.
        pair: computes it.
        device_types: torch's names of the devices it runs on.
        time: names of inputs with a time axis.
        shared: names of inputs without one.
        state: names of state leaves, of the dtype of sums; there may be none, and the last of ``shared`` is of that
            dtype then.
        output: which of ``time`` has the shape and dtype of y.
        where: declarations of what says where sequences lie, as in an operator's schema, e.g. ``"Tensor? lengths"``.
        options: declarations of what else the kernels want to know, e.g. ``"bool softplus"``.
        optional: names of inputs and parameters that may be ``None``.
        revision: of what is kept for backward; raised whenever its shape or meaning changes (see :func:`keeps`).

    Returns:
        A function of the inputs, parameters, state leaves, ``where`` and ``options``, returning y and the new leaves.
        First derivatives only.
    """
    n_time, n_shared, n_state, n_where = len(time), len(shared), len(state), len(where)
    names = [*time, *shared, *state]
    n_names = len(names)
    model = time.index(output)

    def declare(some: Sequence[str]) -> str:
        return ", ".join(f"Tensor{'?' if name in optional else ''} {name}" for name in some)

    cuts = [*itertools.accumulate((0, n_time, n_shared, n_state, n_where, len(options)))]

    def sort(arguments: Some) -> Call:
        return Call(*[arguments[start:stop] for start, stop in itertools.pairwise(cuts)])

    def contiguous(tensors: Some) -> list[Any]:
        return [x.contiguous() if isinstance(x, Tensor) else x for x in tensors]

    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def kept_shape(arguments: Some, keep: int) -> tuple[int, ...]:
        return pair.kept_shape(sort(arguments)) if keeps(name, keep, revision) else (0,)

    said = ", ".join([*where, *options])

    @operator(
        name,
        device_types=device_types,
        schema=f"({declare(names)}, {said}, int keep) -> ({', '.join(['Tensor'] * (2 + n_state))})",
    )
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, keep = contiguous(arguments)
        y, ends, kept = pair.forward(sort(given), keeps(name, keep, revision))
        return (y, *ends, kept)

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        *given, keep = arguments
        leaves = given[n_time + n_shared : n_names]
        return (like(given[model]), *map(like, leaves), given[n_names - 1].new_empty(kept_shape(given, keep)))

    grads = ", ".join(f"Tensor grad_{n}" for n in ("y", *state))
    ends_of = ", ".join(f"Tensor {s}_end" for s in state)
    after = ", ".join(part for part in (said, ends_of, "Tensor kept", grads) if part)

    @operator(
        f"{name}_backward",
        device_types=device_types,
        schema=f"({declare(names)}, {after}) -> ({', '.join(['Tensor'] * n_names)})",
    )
    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        given = contiguous(arguments)
        rest = given[cuts[-1] :]
        found = pair.backward(sort(given), rest[:n_state], rest[n_state], rest[n_state + 1], rest[n_state + 2 :])
        # An operator cannot return None: an empty tensor, each its own, stands for it.
        blank = given[n_names - 1]
        flat = [d for group in found for d in group]
        return tuple(blank.new_empty(0) if x is None else d for x, d in zip(given[:n_names], flat, strict=True))

    @backward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        blank = arguments[n_names - 1]
        return tuple(blank.new_empty(0) if x is None else like(x) for x in arguments[:n_names])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *given, keep = inputs
        if not keep:
            raise RuntimeError(f"{name}: called without `keep`, it cannot be differentiated")
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)  # no zeros for what is kept
        ctx.save_for_backward(*given[: n_names + n_where], *output[1:])
        ctx.options = given[n_names + n_where :]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        given, after = saved[: n_names + n_where], saved[n_names + n_where :]
        pulls = [
            torch.zeros_like(x, memory_format=torch.contiguous_format) if grad is None else grad
            for grad, x in zip(grads[: 1 + n_state], [saved[model], *after[:n_state]], strict=True)
        ]
        found = backward(*given, *ctx.options, *after, *pulls)
        live = [None if x is None else d for x, d in zip(saved[:n_names], found, strict=True)]
        return (*live, *[None] * (n_where + len(ctx.options) + 1))

    forward.register_autograd(differentiate, setup_context=setup_context)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:n_names])
        return tuple(forward(*arguments, revision if keep else 0)[: 1 + n_state])

    return call
