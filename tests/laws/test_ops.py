"""The laws of equal forms, over every row of the op table."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from statewise import ops
from statewise.testing import cases, laws
from statewise.testing.cases import CASES, OpCase
from statewise.testing.tolerances import FORMS, bound

GPU = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = () if GPU == "cuda" else ("triton",)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def forms(*, without: tuple[str, ...] = ()) -> Any:
    """Every row with every backend that serves it here: Triton's on a GPU, or on the CPU in the interpreter."""
    pairs = [
        (replace(case, device=GPU) if name == "triton" else case, name)
        for case in CASES
        for name, status in ops.backends()[case.op].items()
        if status.serves and name not in without
    ]
    return pytest.mark.parametrize(("case", "backend"), pairs, ids=[f"{case.id}-{name}" for case, name in pairs])


every_form = forms()
every_fast_form = forms(without=("reference",))
# What the interpreter is too slow for. Its gradients are held to the reference's, and those to differences.
every_quick_form = forms(without=("reference", *INTERPRETED))


def forms_by(names: str, values: list[Any], few: list[Any], *, without: tuple[str, ...] = ()) -> Any:
    """:func:`forms` with each of ``values`` for ``names``; with a ``few`` of them where kernels are interpreted."""
    parameters = [
        pytest.param(case, name, *(value if "," in names else (value,)), id=f"{value}-{case.id}-{name}")
        for case, name in forms(without=without).args[1]
        for value in (few if name in INTERPRETED else values)
    ]
    assert all(value in values for value in few)
    return pytest.mark.parametrize(f"case,backend,{names}", parameters)


def hold(pairs: list[laws.Pair], forward: float = FORMS.forward, gradient: float = FORMS.gradient) -> None:
    for pair in pairs:
        limit = gradient if "gradient" in pair.what else forward
        assert laws.difference(pair) <= limit, f"{pair.what}: {laws.difference(pair):.2e} > {limit:.0e}"


def test_every_operator_has_a_row() -> None:
    # bi_wkv has no state to obey these laws with; its own are in tests/ops/test_bi_wkv.py
    assert {case.op for case in CASES} == set(ops.backends()) - {"bi_wkv"}


@forms_by(
    "time,start",
    [(time, start) for time in (1, 2, 15, 16, 17, 33, 70) for start in ("none", "given")],
    [(1, "none"), (2, "given"), (16, "given"), (17, "none"), (70, "given")],
    without=("reference",),
)
def test_fast_is_reference(case: OpCase, backend: str, time: int, start: str) -> None:
    hold(laws.forms(case, case.inputs(2, time), None if start == "none" else case.begin(2), backend))


@every_quick_form
def test_fast_is_reference_beyond_a_segment(case: OpCase, backend: str) -> None:
    hold(laws.forms(case, case.inputs(1, 1200), case.begin(1), backend))


@forms_by("start", ["none", "given"], ["given"])
def test_steps_are_the_whole(case: OpCase, backend: str, start: str) -> None:
    hold(laws.stepping(case, case.inputs(2, 37), None if start == "none" else case.begin(2), backend=backend))


def cuts(length: int, chunk: int) -> list[list[int]]:
    single = sorted({0, 1, chunk - 1, chunk, chunk + 1, length - 1, length})
    rng = random.Random(0)
    several = []
    for count in (2, 3, 7):
        edges = sorted(rng.sample(range(length + 1), count))
        several.append([b - a for a, b in zip([0, *edges], [*edges, length], strict=True)])
    return [[cut, length - cut] for cut in single] + several


@forms_by("pieces", cuts(41, 16), [[1, 40], [16, 25], [17, 24], cuts(41, 16)[-1]])
def test_pieces_are_the_whole(case: OpCase, backend: str, pieces: list[int]) -> None:
    hold(laws.splitting(case, case.inputs(2, 41), case.begin(2), pieces, backend=backend))


@every_form
def test_pieces_from_nothing_mixed_with_steps(case: OpCase, backend: str) -> None:
    hold(laws.splitting(case, case.inputs(2, 41), None, [5, -1, -1, 0, 20, -1, 13], backend=backend))


@forms_by(
    "start,lengths",
    [(start, lengths) for start in ("none", "given") for lengths in ([0, 1, 40], [17, 40, 16], [2, 15, 3])],
    [("given", [0, 1, 40]), ("none", [17, 40, 16])],
)
def test_padded_is_alone(case: OpCase, backend: str, start: str, lengths: list[int]) -> None:
    state = None if start == "none" else case.begin(3)
    hold(laws.padding(case, case.inputs(3, 40), state, lengths, backend=backend))


@forms_by(
    "start,sizes",
    [(start, sizes) for start in ("none", "given") for sizes in ([40], [0, 17, 1, 0, 20, 2, 0], [16, 16, 8], [1] * 12)],
    [("given", [0, 17, 1, 0, 20, 2, 0]), ("none", [16, 16, 8]), ("none", [1] * 12)],
)
def test_packed_is_separate(case: OpCase, backend: str, start: str, sizes: list[int]) -> None:
    state = None if start == "none" else case.begin(len(sizes))
    hold(laws.packing(case, case.inputs(1, sum(sizes)), state, sizes, backend=backend))


@every_form
def test_packing_nothing(case: OpCase, backend: str) -> None:
    inputs = case.inputs(1, 0)
    state = case.begin(2)
    y, end = case.call(inputs, state, cu_seqlens=torch.tensor([0, 0, 0], device=case.device), backend=backend)
    assert y.shape[1] == 0
    for before, after in zip(laws.leaves_of(state), laws.leaves_of(end), strict=True):
        assert torch.equal(before, after)
    _, none = case.call(inputs, None, cu_seqlens=torch.tensor([0], device=case.device), backend=backend)
    assert all(leaf.shape[0] == 0 for leaf in laws.leaves_of(none))


@every_form
def test_no_time_changes_nothing(case: OpCase, backend: str) -> None:
    state = case.begin(2)
    y, end = case.call(case.inputs(2, 0), state, backend=backend)
    whole, _ = case.call(case.inputs(2, 3), state, backend=backend)
    assert y.shape == whole[:, :0].shape
    for before, after in zip(laws.leaves_of(state), laws.leaves_of(end), strict=True):
        assert torch.equal(before, after)


@every_form
def test_a_row_cannot_see_another(case: OpCase, backend: str) -> None:
    inputs, state = case.inputs(3, 40), case.begin(3)
    order = torch.tensor([2, 0, 1], device=case.device)
    y, end = case.call(inputs, state, backend=backend)
    moved = {name: x[order] if name in case.time else x for name, x in inputs.items()}
    y_moved, end_moved = case.call(moved, tree_map(lambda leaf: leaf[order], state), backend=backend)
    hold([laws.Pair("y", y_moved, y[order], 1.0)])
    for one, other in zip(laws.leaves_of(end_moved), laws.leaves_of(end), strict=True):
        hold([laws.Pair("state", one, other[order], 1.0)])
    # A poisoned neighbour leaves the others untouched, bit for bit.
    poisoned = {name: x.clone() if name in case.time else x for name, x in inputs.items()}
    for name in case.time:
        poisoned[name][1] = torch.nan
    y_beside, end_beside = case.call(poisoned, state, backend=backend)
    assert torch.equal(y_beside[[0, 2]], y[[0, 2]])
    for one, other in zip(laws.leaves_of(end_beside), laws.leaves_of(end), strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])


@every_form
@pytest.mark.parametrize("how", ["dense", "lengths", "packed"])
def test_nothing_given_is_changed_and_every_run_is_the_same(case: OpCase, backend: str, how: str) -> None:
    rows = 2 if how == "packed" else 3
    inputs, state = case.inputs(1 if how == "packed" else 3, 40), case.begin(rows)
    extra = {
        "dense": {},
        "lengths": {"lengths": torch.tensor([3, 40, 0], device=case.device)},
        "packed": {"cu_seqlens": torch.tensor([0, 19, 40], device=case.device)},
    }[how]
    given = [*inputs.values(), *laws.leaves_of(state), *extra.values()]
    before = [tensor.clone() for tensor in given]
    y, end = case.call(inputs, state, backend=backend, **extra)
    y_again, end_again = case.call(inputs, state, backend=backend, **extra)
    assert torch.equal(y, y_again)
    for one, other in zip(laws.leaves_of(end), laws.leaves_of(end_again), strict=True):
        assert torch.equal(one, other)
    # Writing into what was returned must not reach what was given either.
    for leaf in [y, *laws.leaves_of(end)]:
        leaf.fill_(7.0)
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)


@every_case
def test_a_step_changes_nothing_given(case: OpCase) -> None:
    inputs, state = case.inputs(3, 1), case.begin(3)
    now = {name: x[:, 0] if name in case.time else x for name, x in inputs.items()}
    given = [*now.values(), *laws.leaves_of(state)]
    before = [tensor.clone() for tensor in given]
    y, end = case.step(now, state)
    for leaf in [y, *laws.leaves_of(end)]:
        leaf.fill_(7.0)
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy)


@every_form
def test_none_is_the_documented_start(case: OpCase, backend: str) -> None:
    inputs = case.inputs(2, 20)
    _, start = case.call({name: x[:, :0] if name in case.time else x for name, x in inputs.items()})
    one, other = (laws.run(case, inputs, begin, backend=backend) for begin in (None, start))
    assert torch.equal(one.y, other.y)
    for a, b in zip(one.state, other.state, strict=True):
        assert torch.equal(a, b)


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_near_the_truth(case: OpCase, backend: str, dtype: torch.dtype) -> None:
    # Parameters stay float32 beside half activations, as the contract allows.
    low = {name: x.to(dtype if name in case.time else torch.float32) for name, x in case.inputs(2, 130).items()}
    state = case.begin(2, dtype)
    got = laws.run(case, low, state, backend=backend)
    assert got.y.dtype == dtype
    assert all(leaf.dtype == torch.float32 for leaf in got.state)
    wide = tree_map(lambda leaf: leaf.double(), state)
    truth = laws.run(case, {name: x.double() for name, x in low.items()}, wide, backend="reference")
    limits = bound(case.op, dtype)
    # A weighting drawn for a bfloat16 y is itself rounded, so only float32 gradients are held to the truth's.
    pairs = laws.compare(got, truth, str(dtype))
    if dtype == torch.bfloat16:
        pairs = [pair for pair in pairs if "gradient" not in pair.what]
    hold(pairs, limits.forward, limits.gradient)


@every_quick_form
def test_gradcheck_through_inputs_and_state(case: OpCase, backend: str) -> None:
    inputs, state = case.inputs(1, 5), case.begin(1)
    names = list(inputs)
    flat, spec = tree_flatten(state)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(names, tensors, strict=False))
        leaves = list(tensors[len(names) :])
        y, end = case.call(named, torch.utils._pytree.tree_unflatten(leaves, spec), backend=backend)
        return (y, *laws.leaves_of(end))

    arguments = [tensor.clone().requires_grad_() for tensor in [*inputs.values(), *flat]]
    assert torch.autograd.gradcheck(function, arguments, eps=1e-6, atol=1e-7, rtol=1e-5)


@every_case
def test_gradients_of_the_step(case: OpCase) -> None:
    inputs, state = case.inputs(2, 1), case.begin(2)
    hold(laws.compare(laws.run(case, inputs, state, [-1]), laws.run(case, inputs, state, backend="reference"), "step"))


class _Recorder(TorchDispatchMode):
    """Notes the arguments of every call to an operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "statewise":
            self.calls.append((function, tuple(x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args)))
        return function(*args, **(kwargs or {}))


@every_fast_form
def test_registered_operators_pass_opcheck(case: OpCase, backend: str) -> None:
    recorder = _Recorder()
    inputs = {name: x.requires_grad_() for name, x in case.inputs(2, 20).items()}
    with recorder:
        y, _ = case.call(inputs, case.begin(2), backend=backend)
        y.sum().backward()
    if backend in ("native", "triton") or case.op not in (
        "token_shift",
        "token_mix",
        "causal_conv1d",
    ):  # plain torch, traced as it is
        assert len(recorder.calls) == 2, "forward and backward are one operator each"
    for function, arguments in recorder.calls:
        if not str(function).endswith("_backward.default"):
            for x in arguments:
                if isinstance(x, torch.Tensor) and x.is_floating_point():
                    x.requires_grad_()
        torch.library.opcheck(function, arguments)


@pytest.mark.long
@every_fast_form
def test_compiles_whole_and_exports_its_step(case: OpCase, backend: str) -> None:
    inputs, state = case.inputs(2, 40, torch.float32), case.begin(2, torch.float32)
    names = list(inputs)

    class Step(torch.nn.Module):
        def forward(self, tensors: list[torch.Tensor], state: Any) -> Any:
            return case.step(dict(zip(names, tensors, strict=True)), state)

    def whole(tensors: list[torch.Tensor], state: Any, lengths: torch.Tensor | None) -> Any:
        return case.call(dict(zip(names, tensors, strict=True)), state, lengths=lengths, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True)
    for lengths in (None, torch.tensor([40, 7], device=case.device)):
        want, got = (f(list(inputs.values()), state, lengths) for f in (whole, compiled))
        hold([laws.Pair("y", got[0], want[0], 1.0)], 1e-5)
    one = [x[:, 0] if name in case.time else x for name, x in inputs.items()]
    exported = torch.export.export(Step(), (one, state)).module()
    stepped = torch.compile(Step(), fullgraph=True)
    want = Step()(one, state)
    for form in (exported, stepped):
        got = form(one, state)
        hold([laws.Pair("y", got[0], want[0], 1.0)], 1e-5)
        for a, b in zip(laws.leaves_of(got[1]), laws.leaves_of(want[1]), strict=True):
            hold([laws.Pair("state", a, b, 1.0)], 1e-5)


@every_case
def test_one_kind_of_raggedness_at_a_time(case: OpCase) -> None:
    inputs = case.inputs(1, 4)
    with pytest.raises(ValueError, match="not both"):
        case.call(inputs, lengths=torch.tensor([4]), cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="must lie in 0"):
        case.call(inputs, lengths=torch.tensor([5]))
    with pytest.raises(ValueError, match="batch of 1"):
        case.call(inputs, lengths=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="int64"):
        case.call(inputs, lengths=torch.tensor([1.0]))
    for bad in ([0, 3], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match="without falling"):
            case.call(inputs, cu_seqlens=torch.tensor(bad))
    with pytest.raises(ValueError, match="one row"):
        case.call(case.inputs(2, 4), cu_seqlens=torch.tensor([0, 4]))


@every_case
def test_a_backend_that_cannot_serve_says_so(case: OpCase) -> None:
    inputs = case.inputs(1, 4)
    for name, status in ops.backends()[case.op].items():
        if not status.serves:
            with pytest.raises(ValueError, match="cannot serve"):
                case.call(inputs, backend=name)
    with pytest.raises(ValueError, match="accepted are"):
        case.call(inputs, backend="cuda")


@every_case
def test_a_state_of_another_size_is_refused(case: OpCase) -> None:
    with pytest.raises(ValueError, match="state"):
        case.call(case.inputs(2, 4), case.begin(3))


def test_cases_are_drawn_alike() -> None:
    for case in cases.CASES:
        for name, tensor in case.inputs(2, 5).items():
            assert torch.equal(tensor, case.inputs(2, 5)[name])
