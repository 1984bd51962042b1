"""Does this model keep the promise? Every law of equal forms, run on the model itself.

A law compares two ways to the same answer. The difference of two tensors is the largest absolute difference divided
by the largest absolute value of the second (at least 1e-3, so that tensors of near zeros do not shout); infinities
must sit in the same places. The state of every law is compared along with its logits.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from statewise.ops.dispatch import prefer
from statewise.state import ModelState, load_state, stack

__all__ = ["BOUNDS", "LawResult", "bound_of", "difference", "run_laws", "stir", "verify"]

#: Two orders of the same sums may differ by this much. A lower precision rounds activations between the blocks, so
#: what is bounded there is how far rounding is blown up, not the forms themselves: float64 is the strict test.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 3e-2}
_SMALLEST_SCALE = 1e-3


class LawResult(NamedTuple):
    """One law on one model."""

    law: str
    difference: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the law holds."""
        return self.difference <= self.bound


def verify(
    model: nn.Module,
    *,
    length: int = 83,
    batch_size: int = 3,
    cuts: int = 4,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[LawResult]:
    """Run every law on ``model`` in its own dtype and on its own device.

    Args:
        model: a causal language model of this package, in any mode; left as it is, gradients included. A fresh one
            should go through :func:`stir` first.
        length: tokens in a row.
        batch_size: rows in a batch.
        cuts: random places at which the sequence is cut, besides 0, 1, length - 1 and length.
        seed: fixes the tokens, the cuts and the directions of the gradient test.
        progress: called with each law's name before it runs.

    Returns:
        One row a law. Laws of exact equality (nothing mutated, save and load, rows chosen and stacked) have bound 0.

    Raises:
        ValueError: a length below 4, a batch below 2, or a model whose dtype has no bound.
    """
    if length < 4 or batch_size < 2:
        raise ValueError(f"length is {length} and batch_size {batch_size}; at least 4 and 2 are accepted")
    bound = bound_of(model)
    subject = _Subject(model, length, batch_size, cuts, seed)
    laws = [
        ("split anywhere = whole", subject.split, bound),
        ("token by token = whole", subject.steps, bound),
        ("padded = alone", subject.padded, bound),
        ("packed = separate", subject.packed, bound),
        ("rows of a batch = alone", subject.rows, bound),
        ("no state = fresh state", subject.fresh, bound),
        ("inputs and state untouched", subject.untouched, 0.0),
        ("state saved and loaded", subject.saved, 0.0),
        ("state rows chosen and stacked", subject.stacked, 0.0),
        ("gradients through a split = whole", subject.gradients, bound),
        ("fast kernels = reference", subject.reference, bound),
    ]
    return run_laws(laws, progress)


def bound_of(model: nn.Module) -> float:
    """How far two forms of ``model`` may differ in its dtype.

    Raises:
        ValueError: a dtype without a bound.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in BOUNDS:
        raise ValueError(f"the model's dtype is {dtype}; accepted are {', '.join(map(str, BOUNDS))}")
    return BOUNDS[dtype]


def run_laws(
    laws: Sequence[tuple[str, Callable[[], float], float]], progress: Callable[[str], None] | None
) -> list[LawResult]:
    """(name, what measures it, its bound) → one row a law; ``progress`` is told each name before it runs."""
    results = []
    for name, law, limit in laws:
        if progress is not None:
            progress(name)
        results.append(LawResult(name, law(), limit))
    return results


def stir(model: nn.Module, *, seed: int = 0, scale: float = 0.1) -> None:
    """Add noise to every parameter, in place: of size ``scale`` for vectors, ``scale`` over the root of the last
    axis for matrices.

    A fresh RWKV has output projections of zeros, so its state reaches no logit and every law would hold for nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            wide = parameter.shape[-1] if sum(size > 1 for size in parameter.shape) > 1 else 1
            parameter.add_((noise * (scale * (wide**-0.5 if wide > 1 else 1.0))).to(parameter))


class _Subject:
    """A model with the tokens it is tried on, and the answers for whole rows that every law comes back to."""

    def __init__(self, model: nn.Module, length: int, batch_size: int, cuts: int, seed: int) -> None:
        self.model: Any = model
        self.device = next(model.parameters()).device
        self.length, self.batch_size = length, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = self._random_tokens(batch_size, length)
        drawn = torch.randint(2, length - 1, (cuts,), generator=self.generator).tolist()
        self.cuts = sorted({0, 1, length - 1, length, *drawn})
        with torch.no_grad():
            # Everything below starts from a state in the middle of a text, not from the easy start.
            _, self.start = self.model(self._random_tokens(batch_size, 5))
            self.whole = self.model(self.tokens, self.start)

    def _random_tokens(self, rows: int, length: int) -> Tensor:
        size = self.model.config.vocab_size
        return torch.randint(0, size, (rows, length), generator=self.generator).to(self.device)

    @torch.no_grad()
    def split(self) -> float:
        worst = 0.0
        for pieces in [(cut, self.length - cut) for cut in self.cuts] + [tuple(_gaps(self.cuts))]:
            worst = max(worst, difference(self._in_pieces(pieces), self.whole))
        return worst

    def _in_pieces(self, pieces: Sequence[int]) -> tuple[Tensor, ModelState]:
        outputs, state = [], self.start
        for piece in torch.split(self.tokens, list(pieces), dim=1):
            logits, state = self.model(piece, state)
            outputs.append(logits)
        return torch.cat(outputs, dim=1), state

    @torch.no_grad()
    def steps(self) -> float:
        outputs, state = [], self.start
        for token in self.tokens.unbind(1):
            logits, state = self.model.step(token, state)
            outputs.append(logits)
        return difference((torch.stack(outputs, dim=1), state), self.whole)

    @torch.no_grad()
    def padded(self) -> float:
        worst = 0.0
        for lengths in self._ragged_lengths():
            given = torch.tensor(lengths, device=self.device)
            logits, state = self.model(self.tokens, self.start, lengths=given)
            for row, (size, after) in enumerate(zip(lengths, state.split(), strict=True)):
                worst = max(worst, difference((logits[row : row + 1, :size], after), self._alone(row, size)))
        return worst

    def _ragged_lengths(self) -> list[list[int]]:
        """Every cut appears as the length of some row."""
        groups = -(-len(self.cuts) // self.batch_size)
        lengths = itertools.cycle(self.cuts)
        return [list(itertools.islice(lengths, self.batch_size)) for _ in range(groups)]

    def _alone(self, row: int, size: int) -> tuple[Tensor, ModelState]:
        answer: tuple[Tensor, ModelState] = self.model(self.tokens[row : row + 1, :size], self.start.select([row]))
        return answer

    @torch.no_grad()
    def packed(self) -> float:
        worst = 0.0
        for sizes in self._ragged_lengths():
            row = torch.cat([self.tokens[index, :size] for index, size in enumerate(sizes)])[None]
            bounds = torch.tensor([0, *sizes], device=self.device).cumsum(0)
            logits, state = self.model(row, self.start, cu_seqlens=bounds)
            parts = torch.split(logits[0], sizes)
            for index, (size, after) in enumerate(zip(sizes, state.split(), strict=True)):
                worst = max(worst, difference((parts[index][None], after), self._alone(index, size)))
        return worst

    @torch.no_grad()
    def rows(self) -> float:
        logits, state = self.whole
        return max(
            difference((logits[row : row + 1], after), self._alone(row, self.length))
            for row, after in enumerate(state.split())
        )

    @torch.no_grad()
    def fresh(self) -> float:
        return difference(self.model(self.tokens), self.model(self.tokens, self.model.init_state(self.batch_size)))

    def untouched(self) -> float:
        tokens, start, frozen = self.tokens.clone(), self.start.clone(), self.start.clone()
        with torch.no_grad():
            _, after = self.model(tokens, start)
            kept = after.clone()
            self.model(tokens, start, lengths=torch.tensor(self._ragged_lengths()[0], device=self.device))
            self.model.step(tokens[:, 0], start)
            self.model(tokens[:, 1:], after)
            self.model.step(tokens[:, 1], after)
        logits, state = self.model(tokens, start)  # once more with a graph
        backward = [leaf.sum() for leaf in pytree.tree_leaves((logits, state)) if leaf.requires_grad]
        total = torch.stack([leaf.to(logits.dtype) for leaf in backward]).sum()
        torch.autograd.grad(total, self._trained(), allow_unused=True)
        pairs = [(start, frozen), (after, kept), (tokens.to(logits.dtype), self.tokens.to(logits.dtype))]
        return max(difference(now, before) for now, before in pairs)

    @torch.no_grad()
    def saved(self) -> float:
        _, state = self.whole
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.safetensors"
            state.save(path)
            loaded = load_state(path)
        same_kinds = [leaf.dtype for leaf in pytree.tree_leaves(state)] == [
            leaf.dtype for leaf in pytree.tree_leaves(loaded)
        ]
        return difference(loaded, state.to("cpu")) if same_kinds else float("inf")

    @torch.no_grad()
    def stacked(self) -> float:
        _, state = self.whole
        order = list(reversed(range(self.batch_size)))
        turned = stack([state.split()[row] for row in order])
        return max(difference(turned, state.select(order)), difference(turned.select(order), state))

    def gradients(self) -> float:
        logits, state = self.whole
        directions = [
            torch.randn(leaf.shape, generator=self.generator).to(leaf) for leaf in pytree.tree_leaves((logits, state))
        ]

        def gradients(answer: tuple[Tensor, ModelState]) -> list[Tensor]:
            leaves = pytree.tree_leaves(answer)
            reached = [(leaf, way) for leaf, way in zip(leaves, directions, strict=True) if leaf.requires_grad]
            total = torch.stack([(leaf * way).sum().to(logits.dtype) for leaf, way in reached]).sum()
            return list(torch.autograd.grad(total, self._trained(), allow_unused=True, materialize_grads=True))

        with torch.enable_grad():
            return difference(
                gradients(self._in_pieces(_gaps(self.cuts))), gradients(self.model(self.tokens, self.start))
            )

    @torch.no_grad()
    def reference(self) -> float:
        with prefer("reference"):
            slow = self.model(self.tokens, self.start)
        return difference(slow, self.whole)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def _gaps(cuts: Iterable[int]) -> list[int]:
    marks = sorted(cuts)
    return [later - earlier for earlier, later in itertools.pairwise(marks)]


def difference(given: Any, wanted: Any) -> float:
    """The largest difference between two equally built values, as the module's docstring defines it."""
    worst = 0.0
    for one, other in zip(pytree.tree_leaves(given), pytree.tree_leaves(wanted), strict=True):
        if one.shape != other.shape:
            return float("inf")
        if one.numel() == 0:
            continue
        a, b = one.detach().double(), other.detach().double()
        a, b = torch.where(a == b, 0.0, a), torch.where(a == b, 0.0, b)  # equal infinities differ by nothing
        finite = other.detach().double()
        finite = finite[finite.isfinite()]
        scale = max(float(finite.abs().max()) if finite.numel() else 0.0, _SMALLEST_SCALE)
        gap = float((a - b).abs().max()) / scale
        worst = max(worst, float("inf") if gap != gap else gap)  # max() would pass a NaN over
    return worst
