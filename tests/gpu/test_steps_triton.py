"""One token by one kernel: the steps in Triton, on a GPU where there is one, in the interpreter otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.steps import STEPS as OPERATORS
from statewise.ops.steps import by_kernel, contiguous_rows
from tests.step_cases import DEVICE, LARGE, STEPS, StepCase, leaves, map_leaves

pytest.importorskip("triton")

# token_shift has a kernel for pools alone: out of place it is two copies.
PURE = [case for case in STEPS if case.op != "token_shift"]
every_step = pytest.mark.parametrize("case", PURE, ids=lambda case: case.id)
# The interpreter cuts what is stored as bfloat16 off; a GPU rounds it.
UNIT = {torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7, torch.float16: 2**-11}


def worst(got: Tensor, want: Tensor) -> float:
    """Largest difference beside the largest number."""
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape
    if not got.numel():
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))


def compare(case: StepCase, inputs: Any, state: Any, bound: float) -> None:
    y, end = case.step(inputs, state, backend="triton")
    truth, last = case.step(
        {name: x.double() for name, x in inputs.items()}, map_leaves(Tensor.double, state), backend="reference"
    )
    output = inputs["v" if "v" in inputs else "x"].dtype
    assert y.dtype == output
    unit = UNIT.get(output, 0.0)
    rounded = (y.double() - truth).abs() <= unit * truth.abs()
    assert worst(torch.where(rounded, truth, y.double()), truth) <= bound
    sums = torch.float64 if any(x.dtype == torch.float64 for x in inputs.values()) else torch.float32
    for got, want in zip(leaves(end), leaves(last), strict=True):
        assert got.dtype == sums
        assert worst(got, want) <= bound


@every_step
@settings(max_examples=12)
@given(data=st.data())
def test_the_kernel_is_the_equation(case: StepCase, data: st.DataObject) -> None:
    sizes = {"B": data.draw(st.integers(0, 3)), **{x: data.draw(st.integers(1, 5)) for x in case.letters}}
    compare(case, case.inputs(sizes, torch.float64), case.pool(sizes, sizes["B"], torch.float64), 1e-12)


@every_step
def test_beyond_one_tile(case: StepCase) -> None:
    sizes = {"B": 2, **LARGE}
    compare(case, case.inputs(sizes, torch.float64), case.pool(sizes, 2, torch.float64), 1e-12)
    compare(case, case.inputs(sizes, torch.float32), case.pool(sizes, 2, torch.float32), 2e-6)


@every_step
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", [None, torch.float32, torch.float64], ids=str)
def test_every_dtype_is_read_as_it_is(case: StepCase, dtype: torch.dtype, parameters: torch.dtype | None) -> None:
    sizes = {"B": 2, **dict.fromkeys(case.letters, 3)}
    state = case.pool(sizes, 2, torch.float64 if parameters == torch.float64 else torch.float32)
    compare(case, case.inputs(sizes, dtype, parameters), state, 2e-6)


@every_step
def test_rows_may_lie_apart(case: StepCase) -> None:
    sizes = {"B": 3, **dict.fromkeys(case.letters, 3)}
    inputs, state = case.inputs(sizes, torch.float64), case.pool(sizes, 3, torch.float64)
    y, end = case.step(inputs, state, backend="triton")

    def apart(x: Tensor) -> Tensor:  # each row a slice of a longer one
        wide = torch.randn(x.shape[0], 2, *x.shape[1:], dtype=x.dtype, device=x.device)
        wide[:, 1] = x
        return wide[:, 1]

    def turned(x: Tensor) -> Tensor:  # the last axis is not the fastest
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    assert contiguous_rows(apart(inputs["v" if "v" in inputs else "x"]))
    for change in (apart, turned):
        given = {name: change(x) for name, x in inputs.items()}
        y_apart, end_apart = case.step(given, map_leaves(change, state), backend="triton")
        assert torch.equal(y_apart, y)
        assert all(torch.equal(a, b) for a, b in zip(leaves(end_apart), leaves(end), strict=True))


@every_step
def test_a_row_is_the_same_in_any_batch(case: StepCase) -> None:
    sizes = {"B": 4, **dict.fromkeys(case.letters, 3)}
    inputs, state = case.inputs(sizes, torch.float32), case.pool(sizes, 4, torch.float32)
    y, end = case.step(inputs, state, backend="triton")
    row = torch.tensor([2], device=DEVICE)
    alone = {name: x[row] if case.shapes[name].startswith("B ") else x for name, x in inputs.items()}
    y_alone, end_alone = case.step(alone, map_leaves(lambda leaf: leaf[row], state), backend="triton")
    assert torch.equal(y_alone, y[row])
    assert all(torch.equal(a, b[row]) for a, b in zip(leaves(end_alone), leaves(end), strict=True))


@every_step
def test_nothing_is_the_documented_start(case: StepCase) -> None:
    sizes = {"B": 2, **dict.fromkeys(case.letters, 3)}
    inputs = case.inputs(sizes, torch.float64)
    y, end = case.step(inputs, None, backend="triton")
    want, last = case.step(inputs, None, backend="reference")
    assert worst(y, want) <= 1e-12
    assert all(worst(a, b) <= 1e-12 for a, b in zip(leaves(end), leaves(last), strict=True))


def test_what_is_forgotten_and_what_is_huge() -> None:
    six = next(case for case in STEPS if case.id == "wkv6")
    sizes = {"B": 1, "H": 1, "K": 3, "V": 2}
    inputs, state = six.inputs(sizes, torch.float64), six.pool(sizes, 1, torch.float64)
    inputs["log_w"][:] = -torch.inf
    compare(six, inputs, state, 1e-12)
    four = next(case for case in STEPS if case.id == "wkv4")
    inputs, state = four.inputs({"B": 1, "C": 3}, torch.float32), four.pool({"B": 1, "C": 3}, 1, torch.float32)
    inputs["k"][0] = torch.tensor([3e4, -3e4, 0.0])
    compare(four, inputs, state, 2e-6)


@every_step
def test_gradients_are_the_equations(case: StepCase) -> None:
    sizes = {"B": 2, **dict.fromkeys(case.letters, 3)}
    inputs, state = case.inputs(sizes, torch.float64), case.pool(sizes, 2, torch.float64)
    live = [*inputs.values(), *leaves(state)]
    for x in live:
        x.requires_grad_()
    found = []
    for backend in ("triton", "reference"):
        # Twice, one after the other: the gradient of the second step ends at the state it was given.
        y, middle = case.step(inputs, state, backend=backend)
        out, end = case.step(inputs, middle, backend=backend)
        total = sum((leaf * leaf).sum() for leaf in [y, out, *leaves(end)])
        first = torch.autograd.grad(total, live, create_graph=True, allow_unused=True, materialize_grads=True)
        again = torch.autograd.grad(sum((x * x).sum() for x in first), live, allow_unused=True, materialize_grads=True)
        found.append([*first, *again])
    for got, want in zip(*found, strict=True):
        assert worst(got, want) <= 1e-12


def test_left_to_itself_a_step_with_gradients_is_plain_torch() -> None:
    live, x = torch.zeros(1, requires_grad=True), torch.zeros(1)
    assert by_kernel("triton", None, x, None)
    assert not by_kernel("triton", None, x, live)
    assert by_kernel("triton", "triton", x, live)
    assert not by_kernel("torch", None, x)
    with torch.no_grad():
        assert by_kernel("triton", None, x, live)


@every_step
def test_a_step_is_one_launch(case: StepCase) -> None:
    sizes = {"B": 2, **dict.fromkeys(case.letters, 3)}
    inputs, state = case.inputs(sizes, torch.bfloat16, torch.float32), case.pool(sizes, 2, torch.float32)
    with gpu.capture() as launched:
        case.step(inputs, state, backend="triton")
    (one,) = launched
    given = {x.data_ptr() for x in one.arguments.values() if isinstance(x, Tensor)}
    assert given >= {x.data_ptr() for x in [*inputs.values(), *leaves(state)]}, "nothing is copied on the way"


def arguments(case: StepCase, grad: bool) -> tuple[list[Any], list[Tensor], list[Any]]:
    """Of the registered operators: tensors, leaves, options."""
    sizes = {"B": 2, **dict.fromkeys(case.letters, 3)}
    inputs, state = case.inputs(sizes, torch.float32), case.pool(sizes, 4 if not grad else 2, torch.float32)
    names = [x.name for x in OPERATORS[case.op].pure._opoverload._schema.arguments]
    known = {**inputs, **{"dt_softplus": False, "dt_limit": [0.0, 1.0]}, **case.options}
    tensors = [known.get(name) for name in names if name not in ("state", "num", "den", "max")]
    count = sum(name in ("dt_softplus", "dt_limit", "activation") for name in names)
    options = [list(x) if isinstance(x, tuple) else x for x in tensors[len(tensors) - count :]]
    return (
        [x.requires_grad_(grad) if x is not None else None for x in tensors[: len(tensors) - count]],
        leaves(state),
        options,
    )


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)
def test_registered_operators_pass_opcheck(case: StepCase) -> None:
    tensors, pool, options = arguments(case, True)
    torch.library.opcheck(OPERATORS[case.op].pure, (*tensors, *pool, *options))
    tensors, pool, options = arguments(case, False)
    index = torch.tensor([3, 0], device=DEVICE)
    torch.library.opcheck(OPERATORS[case.op].in_place, (*tensors, *pool, index, *options))


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [case for case in STEPS if case.id in ("wkv4", "wkv7", "ssd-full")], ids=lambda case: case.id
)
def test_compiled_steps_are_the_same(case: StepCase) -> None:
    sizes = {"B": 2, **dict.fromkeys(case.letters, 3)}
    inputs, pool = case.inputs(sizes, torch.float32), case.pool(sizes, 4, torch.float32)
    index = torch.tensor([3, 0], device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(lambda i, s: case.step(i, s, backend="triton"), fullgraph=True)
    rows = map_leaves(lambda leaf: leaf[index], pool)
    want, last = case.step(inputs, rows, backend="triton")
    got, end = compiled(inputs, rows)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(leaves(end), leaves(last), strict=True))
    live = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    found = []
    for function in (compiled, lambda i, s: case.step(i, s, backend="reference")):
        y, end = function(live, rows)
        total = y.sum() + sum(leaf.sum() for leaf in leaves(end))
        found.append(torch.autograd.grad(total, list(live.values())))
    assert all(worst(got, want) <= 2e-6 for got, want in zip(*found, strict=True))

    in_place = torch.compile(lambda i, s, at: case.step_(i, s, at, backend="triton"), fullgraph=True)
    beside = map_leaves(Tensor.clone, pool)
    want = case.step_(inputs, pool, index, backend="triton")
    got = in_place(inputs, beside, index)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(leaves(beside), leaves(pool), strict=True))
