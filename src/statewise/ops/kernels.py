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
from typing import NamedTuple

import torch
from torch import Tensor

from statewise.ops.memory import empty
from statewise.ops.registration import Call, Gradients, Results, Some, register_pair

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
    return int(where.numpy()[:, 1].sum()) == tokens  # a torch operation costs a tenth of a call


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
    sizes: Callable[[Some, Some, Sequence[Tensor]], Sequence[int]],
    kept: Callable[[int, Sequence[Tensor]], tuple[int, ...]] | None = None,
    every: int = 1,
    optional: Sequence[str] = (),
    function: str | None = None,
    revision: int = 1,
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
        revision: of what is kept; see :func:`~statewise.ops.registration.register_pair`.

    Returns:
        A function of the inputs, parameters, state and spans that returns y and the new state leaves.
        First derivatives only.
    """
    pair = _Compiled(function or name, tuple(time).index(output), sizes, kept, every)
    return register_pair(
        f"{name}_native",
        pair,
        device_types="cpu",
        time=time,
        shared=shared,
        state=state,
        output=output,
        where=("Tensor spans",),
        optional=optional,
        revision=revision,
    )


class _Compiled(NamedTuple):
    """A pair of C functions as :class:`~statewise.ops.registration.Pair`; see :func:`register_kernels`."""

    function: str
    model: int
    sizes: Callable[[Some, Some, Sequence[Tensor]], Sequence[int]]
    kept: Callable[[int, Sequence[Tensor]], tuple[int, ...]] | None
    every: int

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        """Every sequence has the slots it needs, and some have one more."""
        if self.kept is None:
            return (0,)
        return self.kept(call.inputs[self.model].shape[0] // self.every + call.where[0].shape[0], call.leaves)

    def forward(self, call: Call, keep: bool) -> Results:
        (model, spans, known), leaves = self._known(call), call.leaves
        rows = spans.shape[0]
        y = blank_like(model, covers(spans, model.shape[0]))
        ends = [torch.empty_like(leaf) for leaf in leaves]
        states = empty(self.kept_shape(call) if keep else (0,), leaves[0].dtype)
        if states.numel():  # what an operator returns is never left to chance
            count, bytes_each = states.shape[0], states.nbytes // states.shape[0]
            call_kernel("clear_unused_slots", model.dtype, spans, rows, self.every, states, count, bytes_each)
        keeping = states if states.numel() else None
        call_kernel(f"{self.function}_forward", model.dtype, *known, *leaves, y, *ends, keeping)
        return y, ends, states

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        (model, spans, known), leaves = self._known(call), call.leaves
        rows, whole = spans.shape[0], covers(spans, model.shape[0])
        d_inputs = [None if x is None else blank_like(x, whole) for x in call.inputs]
        d_parameters = [None if p is None else p.new_empty(rows, *p.shape) for p in call.parameters]
        d_leaves = [torch.empty_like(leaf) for leaf in leaves]
        given = (*known, *leaves, *ends, kept, grad_y, *grad_ends)
        call_kernel(f"{self.function}_backward", model.dtype, *given, *d_inputs, *d_parameters, *d_leaves)
        return d_inputs, [None if d is None else d.sum(0) for d in d_parameters], d_leaves

    def _known(self, call: Call) -> tuple[Tensor, Tensor, Sequence[Argument]]:
        """What y looks like, the spans, and what both functions are told first."""
        inputs, parameters, leaves, (spans,), _ = call
        known = (*inputs, *parameters, spans, spans.shape[0], *self.sizes(inputs, parameters, leaves))
        return inputs[self.model], spans, known
