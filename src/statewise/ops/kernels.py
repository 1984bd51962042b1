"""The compiled CPU kernels: where they are, and one way to make a pair of them an operator of torch.

``csrc/`` is compiled once per instruction set into libraries beside this file, plain C functions on raw pointers that
know nothing of torch or Python; one of them, the best the processor has, is loaded when first asked for. Every kernel
shares torch's pool of threads and obeys ``torch.set_num_threads``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statewise.ops.memory import empty

__all__ = [
    "Library",
    "blank_like",
    "call_kernel",
    "covers",
    "library",
    "load",
    "register_kernels",
    "spans",
]

# What a kernel calls a dtype of activations (csrc/rows.h).
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}

#: torch's name for what the processor can do → libraries that run on it, best first.
_SERVES = {
    "AVX512": ("avx512", "avx2", "portable"),
    "AVX2": ("avx2", "portable"),
}


class Library(NamedTuple):
    """The loaded library, or why there is none.

    Attributes:
        functions: the C functions by name; ``None`` if none could be loaded.
        level: the instruction set it was compiled for.
        reason: why there is none, in a line; empty if there is one.
    """

    functions: ctypes.CDLL | None
    level: str
    reason: str


@functools.cache
def library() -> Library:
    """The best library for this processor; ``ATEN_CPU_CAPABILITY``, torch's own switch, chooses a lesser one."""
    return load(Path(__file__).parent)


def load(folder: Path) -> Library:
    """The best library in ``folder`` that this processor can run."""
    for level in _SERVES.get(torch.backends.cpu.get_cpu_capability(), ("portable",)):
        path = folder / f"_kernels_{level}.so"
        if not path.exists():
            continue
        try:
            return Library(ctypes.CDLL(str(path)), level, "")
        except OSError as error:
            return Library(None, level, f"{path.name} cannot be loaded: {error}")
    return Library(
        None, "", "this installation has no compiled CPU kernels: no C++17 compiler was found when it was built"
    )


def spans(batch: int, time: int, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``(n, 2)`` int64: where each sequence starts among the ``batch · time`` tokens, and how many it has."""
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].long()
        return torch.stack([starts, cu_seqlens[1:].long() - starts], 1)
    starts = torch.arange(batch) * time
    counts = torch.full((batch,), time) if lengths is None else lengths.long()
    return torch.stack([starts, counts], 1)


def covers(where: Tensor, tokens: int) -> bool:
    """Whether every token belongs to one of the sequences ``where``."""
    return int(where[:, 1].sum()) == tokens


def blank_like(x: Tensor, whole: bool) -> Tensor:
    """Room for a tensor like ``x`` ``(tokens, ...)``; zeros unless a kernel will write the whole of it."""
    return empty(x.shape, x.dtype) if whole else torch.zeros_like(x, memory_format=torch.contiguous_format)


Argument = Tensor | list[Tensor] | int | None


def call_kernel(name: str, dtype: torch.dtype, *arguments: Argument) -> None:
    """Call a C function: the dtype of activations, then tensors as addresses (a list: the address of their addresses,
    ``None``: 0) and numbers as they are, then the number of threads."""
    functions = library().functions
    assert functions is not None, "dispatch asked first"
    tables = []  # kept until the call is over
    numbers = [_CODES[dtype]]
    for argument in arguments:
        if argument is None:
            numbers.append(0)
        elif isinstance(argument, Tensor):
            numbers.append(argument.data_ptr())
        elif isinstance(argument, list):
            table = (ctypes.c_int64 * len(argument))(*[tensor.data_ptr() for tensor in argument])
            tables.append(table)
            numbers.append(ctypes.addressof(table))
        else:
            numbers.append(argument)
    numbers.append(torch.get_num_threads())
    function = getattr(functions, name)
    if function.argtypes is None:
        function.argtypes = [ctypes.c_int64] * len(numbers)
    if function(*numbers):
        raise RuntimeError(f"{name} does not serve {dtype} with sizes {[a for a in arguments if isinstance(a, int)]}")


def register_kernels(
    name: str,
    *,
    time: Sequence[str],
    shared: Sequence[str],
    state: Sequence[str],
    output: str,
    sizes: Callable[[Sequence[Tensor | None], Sequence[Tensor | None], Sequence[Tensor]], Sequence[int]],
    kept: Callable[[int, Sequence[Tensor]], tuple[int, ...]] | None = None,
    every: int = 1,
    optional: Sequence[str] = (),
    function: str | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register ``statewise::NAME_native`` on the C functions ``NAME_forward`` and ``NAME_backward``.

    The C functions take, in this order: the dtype; addresses of the inputs and parameters; of the spans and how many
    there are; the sizes; addresses of the first state; then, forward: of y, of the last state, of the states kept for
    backward (or 0); backward: of the last state, of the states kept, of the cotangents of y and of the last state, of
    the gradients of inputs, parameters and first state; and the number of threads. Gradients of parameters have a row
    a sequence and are summed here, in order.

    Args:
        name: of the operator.
        time: names of inputs ``(tokens, ...)``, all of one dtype.
        shared: names of inputs without a time axis, of the dtype of sums.
        state: names of state leaves ``(n, ...)``, of the dtype of sums.
        output: which of ``time`` has the shape of y.
        sizes: (inputs, parameters, state) → the sizes the kernel wants to know.
        kept: (slots, state) → shape of what forward keeps for backward; ``None`` if that is nothing.
        every: tokens between kept states.
        optional: names of inputs and parameters that may be ``None``.
        function: NAME of the C functions, where two operators share them.

    Returns:
        A function of the inputs, parameters, state and spans that returns y and the new state leaves.
        First derivatives only.
    """
    function = function or name
    n_time, n_shared, n_state = len(time), len(shared), len(state)
    names = [*time, *shared, *state]

    def declare(some: Sequence[str]) -> str:
        return ", ".join(f"Tensor{'?' if name in optional else ''} {name}" for name in some)

    def sort(tensors: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        return (
            list(tensors[:n_time]),
            list(tensors[n_time : n_time + n_shared]),
            list(tensors[n_time + n_shared : n_time + n_shared + n_state]),
        )

    def contiguous(tensors: Sequence[Any]) -> list[Any]:
        return [None if x is None else x.contiguous() for x in tensors]

    def room(keep: bool, tokens: int, rows: int, leaves: Sequence[Tensor]) -> tuple[int, ...]:
        """Of the states kept: every sequence has the slots it needs, and some have one more."""
        return kept(tokens // every + rows, leaves) if kept is not None and keep else (0,)

    results = ", ".join(["Tensor"] * (2 + n_state))

    @torch.library.custom_op(
        f"statewise::{name}_native",
        mutates_args=(),
        device_types="cpu",
        schema=f"({declare(names)}, Tensor spans, bool keep) -> ({results})",
    )
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, where, keep = arguments
        inputs, parameters, leaves = sort(contiguous(tensors))
        model = inputs[time.index(output)]
        y = blank_like(model, covers(where, model.shape[0]))
        ends = [torch.empty_like(leaf) for leaf in leaves]
        states = empty(room(keep, model.shape[0], where.shape[0], leaves), leaves[0].dtype)
        where = where.contiguous()
        if states.numel():  # what an operator returns is never left to chance
            count, bytes_each = states.shape[0], states.nbytes // states.shape[0]
            call_kernel("clear_unused_slots", model.dtype, where, where.shape[0], every, states, count, bytes_each)
        known = (*inputs, *parameters, where, where.shape[0], *sizes(inputs, parameters, leaves))
        keeping = states if states.numel() else None
        call_kernel(f"{function}_forward", model.dtype, *known, *leaves, y, *ends, keeping)
        return (y, *ends, states)

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, where, keep = arguments
        inputs, _, leaves = sort(tensors)
        model = inputs[time.index(output)]
        y = torch.empty_like(model, memory_format=torch.contiguous_format)
        ends = [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves]
        return (y, *ends, leaves[0].new_empty(room(keep, model.shape[0], where.shape[0], leaves)))

    derived = ", ".join(["Tensor"] * len(names))
    grads_in = ", ".join(f"Tensor grad_{n}" for n in ("y", *state))

    @torch.library.custom_op(
        f"statewise::{name}_native_backward",
        mutates_args=(),
        device_types="cpu",
        schema=f"({declare(names)}, Tensor spans, {declare([f'{s}_end' for s in state])}, Tensor kept, {grads_in})"
        f" -> ({derived})",
    )
    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        inputs, parameters, leaves = sort(contiguous(arguments[: len(names)]))
        where, *rest = contiguous(arguments[len(names) :])
        ends, states, grads = rest[:n_state], rest[n_state], rest[n_state + 1 :]
        model = inputs[time.index(output)]
        rows, whole = where.shape[0], covers(where, model.shape[0])
        # An operator cannot return None: an empty tensor, each its own, stands for it.
        d_inputs = [leaves[0].new_empty(0) if x is None else blank_like(x, whole) for x in inputs]
        d_parameters = [leaves[0].new_empty(0) if p is None else p.new_empty(rows, *p.shape) for p in parameters]
        d_leaves = [torch.empty_like(leaf) for leaf in leaves]
        given = [None if p is None else d for p, d in zip([*inputs, *parameters], d_inputs + d_parameters, strict=True)]
        known = (*inputs, *parameters, where, rows, *sizes(inputs, parameters, leaves))
        call_kernel(f"{function}_backward", model.dtype, *known, *leaves, *ends, states, *grads, *given, *d_leaves)
        total = [d if p is None else d.sum(0) for p, d in zip(parameters, d_parameters, strict=True)]
        return (*d_inputs, *total, *d_leaves)

    @backward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        state_like = arguments[len(names) - 1]
        return tuple(
            state_like.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in arguments[: len(names)]
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, where, keep = inputs
        if not keep:
            raise RuntimeError(f"{name}_native: called without `keep`, it cannot be differentiated")
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)  # no zeros for what is kept
        ctx.save_for_backward(*tensors, where, *output[1:])

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        ends = saved[len(names) + 1 : len(names) + 1 + n_state]
        given = [
            torch.zeros_like(like, memory_format=torch.contiguous_format) if grad is None else grad
            for grad, like in zip(grads[: 1 + n_state], [saved[time.index(output)], *ends], strict=True)
        ]
        found = backward(*saved, *given)
        live = [None if x is None else d for x, d in zip(saved[: len(names)], found, strict=True)]
        return (*live, None, None)

    forward.register_autograd(differentiate, setup_context=setup_context)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, where = arguments
        keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        return tuple(forward(*tensors, where, keep)[: 1 + n_state])

    return call
