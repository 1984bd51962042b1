"""The laws of equal forms, as functions that measure: each returns pairs that must be equal.

A law never asserts; it returns :class:`Pair` rows (what, one side, other side), so that a test, the ``verify`` command
or a newcomer's script can apply the same law with its own bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from statewise.testing.cases import OpCase

__all__ = ["Pair", "difference", "forms", "packing", "padding", "run", "splitting", "stepping"]


class Pair(NamedTuple):
    """Two tensors that a law says are equal, and on which scale their difference counts."""

    what: str
    one: Tensor
    other: Tensor
    scale: float


def difference(pair: Pair) -> float:
    """Largest difference relative to the pair's scale; infinite for NaN or unequal infinities."""
    one, other = pair.one.double(), pair.other.double()
    if one.shape != other.shape:
        return float("inf")
    if one.numel() == 0:
        return 0.0
    same = one == other  # equal infinities count as equal
    gap = torch.where(same, 0.0, (one - other).abs())
    return float("inf") if bool(gap.isnan().any()) else float(gap.max()) / max(pair.scale, 1e-30)


def leaves_of(state: Any) -> list[Tensor]:
    """The tensors of an op's state."""
    return [leaf for leaf in tree_flatten(state)[0] if isinstance(leaf, Tensor)]


class Outcome(NamedTuple):
    """Outputs, final state and gradients of one way to compute."""

    y: Tensor
    state: list[Tensor]
    gradients: dict[str, Tensor]


def run(
    case: OpCase, inputs: Mapping[str, Tensor], state: Any, pieces: Sequence[int] | None = None, **how: Any
) -> Outcome:
    """Compute ``case`` in pieces (lengths that add up to T; ``None``: whole; a piece of -1: one ``step``), and
    differentiate a random weighting of every output and of the final state."""
    live, begin = _leafs(inputs, state)
    y, end = _pieces(case, live, begin, pieces, how)
    return _outcome(y, leaves_of(end), live, begin)


def _leafs(inputs: Mapping[str, Tensor], state: Any) -> tuple[dict[str, Tensor], Any]:
    """Copies that gradients can be asked of."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    return {name: leaf(x) for name, x in inputs.items()}, None if state is None else tree_map(leaf, state)


def _outcome(y: Tensor, end: Sequence[Tensor], live: Mapping[str, Tensor], begin: Any) -> Outcome:
    generator = torch.Generator().manual_seed(7)
    chosen, weights = [], []
    for out in [y, *end]:
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
        # A row that saw nothing keeps its start, whose -inf admits no weighting.
        if out.requires_grad and not bool(torch.isinf(out).any()):
            chosen.append(out)
            weights.append(weight)
    sources = {**live, **{f"state.{i}": leaf for i, leaf in enumerate(leaves_of(begin))}}
    gradients = torch.autograd.grad(chosen, list(sources.values()), weights, materialize_grads=True, allow_unused=True)
    return Outcome(y.detach(), [leaf.detach() for leaf in end], dict(zip(sources, gradients, strict=True)))


def _pieces(
    case: OpCase, live: Mapping[str, Tensor], state: Any, pieces: Sequence[int] | None, how: Mapping[str, Any]
) -> tuple[Tensor, Any]:
    if pieces is None:
        return case.call(live, state, **how)
    shared = {name: tensor for name, tensor in live.items() if name not in case.time}
    sizes = [1 if piece == -1 else piece for piece in pieces]
    parts = {name: torch.split(live[name], sizes, 1) for name in case.time}  # one node, however many pieces
    outputs = []
    for index, piece in enumerate(pieces):
        now = {name: parts[name][index] for name in case.time}
        if piece == -1:
            y, state = case.step({**{name: x.squeeze(1) for name, x in now.items()}, **shared}, state, **how)
            outputs.append(y.unsqueeze(1))
        else:
            y, state = case.call({**now, **shared}, state, **how)
            outputs.append(y)
    return torch.cat(outputs, 1), state


def compare(one: Outcome, other: Outcome, what: str) -> list[Pair]:
    """All pairs of two outcomes that must be equal."""
    rows = [Pair(f"{what}: y", one.y, other.y, _scale([other.y]))]
    for index, (a, b) in enumerate(zip(one.state, other.state, strict=True)):
        rows.append(Pair(f"{what}: state {index}", a, b, _scale([b])))
    together = _scale(list(other.gradients.values()))
    rows += [
        Pair(f"{what}: gradient of {name}", one.gradients[name], gradient, together)
        for name, gradient in other.gradients.items()
    ]
    return rows


def _scale(tensors: Sequence[Tensor]) -> float:
    finite = [t[torch.isfinite(t)].abs() for t in tensors]
    return max((float(t.max()) for t in finite if t.numel()), default=0.0)


def forms(case: OpCase, inputs: Mapping[str, Tensor], state: Any, backend: str, **how: Any) -> list[Pair]:
    """A fast backend = reference."""
    return compare(
        run(case, inputs, state, backend=backend, **how), run(case, inputs, state, backend="reference", **how), backend
    )


def stepping(case: OpCase, inputs: Mapping[str, Tensor], state: Any, **how: Any) -> list[Pair]:
    """Step by step = whole."""
    time = inputs[case.time[0]].shape[1]
    return compare(run(case, inputs, state, [-1] * time, **how), run(case, inputs, state, **how), "steps")


def splitting(case: OpCase, inputs: Mapping[str, Tensor], state: Any, pieces: Sequence[int], **how: Any) -> list[Pair]:
    """In pieces = whole."""
    return compare(run(case, inputs, state, pieces, **how), run(case, inputs, state, **how), f"pieces {list(pieces)}")


def padding(case: OpCase, inputs: Mapping[str, Tensor], state: Any, lengths: Sequence[int], **how: Any) -> list[Pair]:
    """Each padded row = that row alone, whatever the padding holds (here: NaN), gradients included."""
    device = inputs[case.time[0]].device
    count = torch.tensor(lengths, device=device)
    time = inputs[case.time[0]].shape[1]
    valid = torch.arange(time, device=device) < count[:, None]
    dirty = {
        name: torch.where(valid.reshape(*valid.shape, *[1] * (x.dim() - 2)), x, torch.nan) if name in case.time else x
        for name, x in inputs.items()
    }
    together = run(case, dirty, state, lengths=count, **how)

    live, begin = _leafs(inputs, state)
    outputs, ends = [], []
    for row, length in enumerate(lengths):
        own = {name: x[row : row + 1, :length] if name in case.time else x for name, x in live.items()}
        start = None if begin is None else tree_map(lambda leaf, row=row: leaf[row : row + 1], begin)
        y, end = case.call(own, start, **how)
        outputs.append(torch.cat([y, y.new_zeros(1, time - length, *y.shape[2:])], 1))
        ends.append(leaves_of(end))
    alone = _outcome(torch.cat(outputs), [torch.cat(leaves) for leaves in zip(*ends, strict=True)], live, begin)
    return compare(together, alone, f"padded to {time} from {list(lengths)}")


def packing(case: OpCase, inputs: Mapping[str, Tensor], state: Any, sizes: Sequence[int], **how: Any) -> list[Pair]:
    """Each packed sequence = that sequence alone, outputs, states and gradients. ``inputs`` have batch 1."""
    bounds = torch.tensor([0, *sizes], device=inputs[case.time[0]].device).cumsum(0)
    packed = run(case, inputs, state, cu_seqlens=bounds, **how)

    live, begin = _leafs(inputs, state)
    parts = {name: torch.split(live[name], list(sizes), 1) for name in case.time}
    outputs, ends = [], []
    for index in range(len(sizes)):
        own = {name: parts[name][index] if name in case.time else x for name, x in live.items()}
        start = None if begin is None else tree_map(lambda leaf, index=index: leaf[index : index + 1], begin)
        y, end = case.call(own, start, **how)
        outputs.append(y)
        ends.append(leaves_of(end))
    alone = _outcome(torch.cat(outputs, 1), [torch.cat(leaves) for leaves in zip(*ends, strict=True)], live, begin)
    return compare(packed, alone, f"packed {list(sizes)}")
