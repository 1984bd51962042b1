"""A pair of kernels, forward and backward, as one operator of torch.

Compiled CPU kernels and GPU kernels are registered alike, with a fake and an autograd implementation:
``torch.compile(fullgraph=True)``, ``torch.export``, autocast and checkpointing see one node, and what forward
keeps for backward exists only if something will be differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Pair", "Some", "register_pair"]

#: Tensors, and ``None`` for those that are optional and absent.
Some = Sequence[Any]


class Pair(Protocol):
    """The two kernels of an operator. ``where`` says where sequences lie, ``options`` how to compute, each in the order
    of its declarations; all tensors are contiguous."""

    def kept_shape(self, inputs: Some, leaves: Some, where: Some, options: Some) -> tuple[int, ...]:
        """Of what forward keeps for backward, in the dtype of the state; ``(0,)`` if that is nothing."""

    def forward(
        self, inputs: Some, parameters: Some, leaves: Some, where: Some, options: Some, keep: bool
    ) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """y, the state leaves after the last token, and what is kept (empty unless ``keep``)."""

    def backward(
        self,
        inputs: Some,
        parameters: Some,
        leaves: Some,
        where: Some,
        options: Some,
        ends: Some,
        kept: Tensor,
        grad_y: Tensor,
        grad_ends: Some,
    ) -> tuple[Some, Some, Some]:
        """Gradients of inputs, parameters and first state; anything for those that are absent."""


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

    def sort(tensors: Some) -> tuple[list[Any], list[Any], list[Any]]:
        return (
            list(tensors[:n_time]),
            list(tensors[n_time : n_time + n_shared]),
            list(tensors[n_time + n_shared : n_names]),
        )

    def contiguous(tensors: Some) -> list[Any]:
        return [x.contiguous() if isinstance(x, Tensor) else x for x in tensors]

    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def kept_shape(arguments: Some, keep: bool) -> tuple[int, ...]:
        inputs, _, leaves = sort(arguments)
        after = arguments[n_names:]
        return pair.kept_shape(inputs, leaves, after[:n_where], after[n_where:]) if keep else (0,)

    said = ", ".join([*where, *options])

    @torch.library.custom_op(
        f"statewise::{name}",
        mutates_args=(),
        device_types=device_types,
        schema=f"({declare(names)}, {said}, bool keep) -> ({', '.join(['Tensor'] * (2 + n_state))})",
    )
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *given, keep = contiguous(arguments)
        after = given[n_names:]
        y, ends, kept = pair.forward(*sort(given), after[:n_where], after[n_where:], keep)
        return (y, *ends, kept)

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        *given, keep = arguments
        leaves = given[n_time + n_shared : n_names]
        return (like(given[model]), *map(like, leaves), given[n_names - 1].new_empty(kept_shape(given, keep)))

    grads = ", ".join(f"Tensor grad_{n}" for n in ("y", *state))
    ends_of = ", ".join(f"Tensor {s}_end" for s in state)
    after = ", ".join(part for part in (said, ends_of, "Tensor kept", grads) if part)

    @torch.library.custom_op(
        f"statewise::{name}_backward",
        mutates_args=(),
        device_types=device_types,
        schema=f"({declare(names)}, {after}) -> ({', '.join(['Tensor'] * n_names)})",
    )
    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        given = contiguous(arguments)
        after = given[n_names:]
        rest = after[n_where + len(options) :]
        found = pair.backward(
            *sort(given),
            after[:n_where],
            after[n_where : n_where + len(options)],
            rest[:n_state],
            rest[n_state],
            rest[n_state + 1],
            rest[n_state + 2 :],
        )
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
        return tuple(forward(*arguments, keep)[: 1 + n_state])

    return call
