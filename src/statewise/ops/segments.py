"""A parallel form as one torch operator that remembers little.

A parallel form is a differentiable function of one segment of tokens. Run on a whole sequence under autograd it would
keep every intermediate tensor, so it is registered here as a custom operator instead: forward walks over segments and
keeps only the state at each boundary; backward walks back, recomputes one segment at a time and differentiates it.
Memory beyond inputs and outputs is that of one segment plus T/segment states, and ``torch.compile`` and
``torch.export`` see one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from statewise.ops.custom import operator

__all__ = ["SegmentFunction", "register_segmented"]

#: (inputs ``(B, t, ...)``, parameters without time, state leaves) → (y ``(B, t, ...)``, new state leaves).
SegmentFunction = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


@contextmanager
def _recording(device: str) -> Iterator[None]:
    """Let autograd record inside an operator's own kernel, where the dispatcher has switched it off.

    Clearing what the dispatcher excludes would let autocast back in too, so it is switched off after that.
    """
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    guard = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing)
    with guard, torch.autocast(device, enabled=False), torch.enable_grad():
        yield


def register_segmented(
    name: str,
    function: SegmentFunction,
    *,
    time: Sequence[str],
    shared: Sequence[str],
    state: Sequence[str],
    output: str,
    segment: int,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register ``statewise::name`` with fake and autograd implementations.

    Args:
        name: operator name.
        function: the parallel form over one segment, differentiable, mutating nothing, aliasing nothing it was given.
        time: names of inputs ``(B, T, ...)``. All tensors of one call share one dtype; T ≥ 1.
        shared: names of inputs without a time axis.
        state: names of state leaves ``(B, ...)``.
        output: which of ``time`` has the shape of y.
        segment: tokens per segment.

    Returns:
        A function of all those tensors in that order, returning y and the new state leaves. First derivatives only.
    """
    n_time, n_shared, n_state = len(time), len(shared), len(state)
    names = [*time, *shared, *state]
    arguments = ", ".join(f"Tensor {n}" for n in names)
    results = ", ".join(["Tensor"] * (1 + 2 * n_state))

    def sort(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return (
            list(tensors[:n_time]),
            list(tensors[n_time : n_time + n_shared]),
            list(tensors[n_time + n_shared : n_time + n_shared + n_state]),
        )

    @operator(name, schema=f"({arguments}) -> ({results})")
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, parameters, leaves = sort(tensors)
        outputs: list[Tensor] = []
        kept: list[list[Tensor]] = [[] for _ in leaves]
        # Accumulation is in the dtype of the arguments, whatever the caller's autocast would like.
        with torch.autocast(inputs[0].device.type, enabled=False):
            for start in range(0, inputs[0].shape[1], segment):
                for leaf, boundary in zip(leaves, kept, strict=True):
                    boundary.append(leaf)
                y, new = function([x[:, start : start + segment] for x in inputs], parameters, leaves)
                outputs.append(y)
                leaves = list(new)
        return (torch.cat(outputs, 1), *[leaf.contiguous() for leaf in leaves], *[torch.stack(b) for b in kept])

    @forward.register_fake
    def _(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, _, leaves = sort(tensors)
        count = (inputs[0].shape[1] + segment - 1) // segment
        y = torch.empty_like(inputs[time.index(output)], memory_format=torch.contiguous_format)
        new = [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves]
        return (y, *new, *[leaf.new_empty(count, *leaf.shape) for leaf in leaves])

    gradients = ", ".join(f"Tensor grad_{n}" for n in ("y", *state))
    boundaries = ", ".join(f"Tensor {n}" for n in (*time, *shared, *[f"kept_{s}" for s in state]))
    derivatives = ", ".join(["Tensor"] * len(names))

    @operator(f"{name}_backward", schema=f"({gradients}, {boundaries}) -> ({derivatives})")
    def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
        grad_y, grad_state = tensors[0], list(tensors[1 : 1 + n_state])
        inputs, parameters, kept = sort(tensors[1 + n_state :])
        d_inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]
        d_parameters = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
        starts = range(0, inputs[0].shape[1], segment)
        for index in reversed(range(len(starts))):
            span = slice(starts[index], starts[index] + segment)
            with _recording(grad_y.device.type):
                xs = [x[:, span].detach().requires_grad_() for x in inputs]
                ps = [p.detach().requires_grad_() for p in parameters]
                ss = [k[index].detach().requires_grad_() for k in kept]
                y, new = function(xs, ps, ss)
                found = torch.autograd.grad(
                    [y, *new], [*xs, *ps, *ss], [grad_y[:, span], *grad_state], materialize_grads=True
                )
            for whole, part in zip(d_inputs, found[:n_time], strict=True):
                whole[:, span] = part
            for total, part in zip(d_parameters, found[n_time : n_time + n_shared], strict=True):
                total += part
            grad_state = list(found[n_time + n_shared :])
        return (*d_inputs, *d_parameters, *[g.contiguous() for g in grad_state])

    @backward.register_fake
    def _(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, parameters, kept = sort(tensors[1 + n_state :])
        like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*inputs, *parameters)]
        return (*like, *[k.new_empty(k.shape[1:]) for k in kept])

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        kept = output[1 + n_state :]
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*inputs[: n_time + n_shared], *kept)

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(backward(*grads[: 1 + n_state], *ctx.saved_tensors))

    forward.register_autograd(differentiate, setup_context=setup_context)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(forward(*tensors))[: 1 + n_state]

    return call
