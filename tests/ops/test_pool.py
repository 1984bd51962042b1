"""Steps in place on a pool of states: each advanced row is what the step makes of it, every other row is untouched."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops import gpu, token_shift_step_, wkv4_step_, wkv7_step_
from statewise.ops.checks import trusting_values
from statewise.state import WKV4State
from tests.step_cases import DEVICE, LARGE, STEPS, StepCase, leaves, map_leaves

every_step = pytest.mark.parametrize("case", STEPS, ids=lambda case: case.id)
every_form = pytest.mark.parametrize(
    "backend", [pytest.param("torch"), *([] if gpu.serves(torch.device(DEVICE)) else ["triton"])]
)
# One unit of the last place; the interpreter does not round what it stores as bfloat16.
UNIT = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def chosen(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


def hold(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    unit = UNIT.get(got.dtype, 0.0)
    torch.testing.assert_close(got.double(), want.double(), rtol=unit + bound, atol=10 * bound)


def advance(case: StepCase, backend: str, sizes: dict[str, int], rows: list[int], slots: int, **how: Any) -> None:
    """One step of the rows, against the same step out of place."""
    dtype, storage = how.get("dtype", torch.float64), how.get("storage", torch.float64)
    place: Callable[[Tensor], Tensor] = how.get("place", lambda leaf: leaf)
    inputs = case.inputs({"B": len(rows), **sizes}, dtype, how.get("parameters"))
    pool = map_leaves(place, case.pool(sizes, slots, storage))
    before = map_leaves(Tensor.clone, pool)
    index = chosen(rows)
    y = case.step_(inputs, pool, index, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want, after = case.step(inputs, map_leaves(lambda leaf: leaf[index].to(wide), before), backend="reference")
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    assert y.dtype == want.dtype
    hold(y, want, bound)
    others = [slot for slot in range(slots) if slot not in rows]
    for new, old, end in zip(leaves(pool), leaves(before), leaves(after), strict=True):
        hold(new[index], end.to(new.dtype), bound)
        assert torch.equal(new[others], old[others])


@every_step
@every_form
@settings(max_examples=8)
@given(data=st.data())
def test_rows_advance_and_others_stay(case: StepCase, backend: str, data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, 5))
    rows = data.draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=3))
    advance(case, backend, {x: data.draw(st.integers(1, 5)) for x in case.letters}, rows, slots)


@every_step
@every_form
def test_beyond_one_tile(case: StepCase, backend: str) -> None:
    advance(case, backend, LARGE, [3, 0], 5)


@every_step
@every_form
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_pool_may_be_stored_in_half_the_bytes(case: StepCase, backend: str, storage: torch.dtype) -> None:
    sizes = dict.fromkeys(case.letters, 3)
    for dtype in (torch.float32, torch.bfloat16):
        advance(case, backend, sizes, [4, 1], 6, dtype=dtype, parameters=torch.float32, storage=storage)


@every_step
@every_form
def test_a_pool_may_be_one_layer_of_many(case: StepCase, backend: str) -> None:
    whole: list[tuple[Tensor, Tensor]] = []

    def place(leaf: Tensor) -> Tensor:
        layers = torch.randn(leaf.shape[0], 3, *leaf.shape[1:], dtype=leaf.dtype, device=leaf.device)
        layers[:, 1] = leaf
        whole.append((layers, layers.clone()))
        return layers[:, 1]

    advance(case, backend, dict.fromkeys(case.letters, 3), [4, 1], 6, place=place)
    for layers, before in whole:
        assert torch.equal(layers[:, [0, 2]], before[:, [0, 2]])


@every_step
@every_form
def test_sequences_come_and_go(case: StepCase, backend: str) -> None:
    """Decoding in a pool, rows joining and leaving, is decoding each sequence alone."""
    rng = random.Random(0)
    sizes, slots = dict.fromkeys(case.letters, 2), 4
    pool = case.pool(sizes, slots, torch.float64)
    alone = [map_leaves(lambda leaf, row=row: leaf[row : row + 1].clone(), pool) for row in range(slots)]
    shared = {name: x for name, x in case.inputs({"B": 1, **sizes}, torch.float64).items()}
    for _ in range(5):
        rows = rng.sample(range(slots), rng.randint(1, 3))
        drawn = case.inputs({"B": len(rows), **sizes}, torch.float64)
        inputs = {name: x if case.shapes[name].startswith("B ") else shared[name] for name, x in drawn.items()}
        y = case.step_(inputs, pool, chosen(rows), backend=backend)
        for place, row in enumerate(rows):
            own = {n: x[place : place + 1] if case.shapes[n].startswith("B ") else x for n, x in inputs.items()}
            want, alone[row] = case.step(own, alone[row], backend="reference")
            hold(y[place : place + 1], want, 1e-12)
    for row, state in enumerate(alone):
        for leaf, want in zip(leaves(pool), leaves(state), strict=True):
            hold(leaf[row : row + 1], want, 1e-12)


@every_step
@every_form
def test_what_it_refuses(case: StepCase, backend: str) -> None:
    sizes = dict.fromkeys(case.letters, 3)
    inputs, pool = case.inputs({"B": 2, **sizes}, torch.float64), case.pool(sizes, 4, torch.float64)
    before = map_leaves(Tensor.clone, pool)

    def refused(match: str, inputs: Any = inputs, pool: Any = pool, index: Any = None, backend: str = backend) -> None:
        with pytest.raises(ValueError, match=match):
            case.step_(inputs, pool, chosen([3, 0]) if index is None else index, backend=backend)

    refused(r"index \[3, 3\] names a row more than once", index=chosen([3, 3]))
    refused(r"index \[4, 0\] must lie in 0\.\.3", index=chosen([4, 0]))
    refused(r"index \[-1, 0\] must lie in", index=chosen([-1, 0]))
    refused("index has 3 entries for a batch of 2", index=chosen([1, 2, 3]))
    refused("must be a 1-D int64 tensor, got torch.int32", index=chosen([3, 0]).int())
    refused("must be a 1-D int64 tensor, got list", index=[3, 0])
    refused("state.* has shape", pool=map_leaves(lambda leaf: leaf[..., :2], pool))
    refused("state.* must be", pool=None)
    refused("accepted are separate rows", pool=map_leaves(lambda leaf: leaf[:1].expand_as(leaf), pool))
    # Each row in every other number of a longer one.
    refused(
        "accepted are separate rows",
        pool=map_leaves(lambda leaf: torch.stack([leaf, leaf], -1)[..., 0], pool),
    )
    refused("accepted are None, 'torch', 'triton'", backend="native")
    live = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    refused("has no gradient", inputs=live)
    refused("has no gradient", pool=map_leaves(lambda leaf: leaf.clone().requires_grad_(), pool))
    first = next(iter(inputs))
    refused(f"{first} has shape", inputs={**inputs, first: inputs[first][..., None]})
    for old, leaf in zip(leaves(before), leaves(pool), strict=True):
        assert torch.equal(old, leaf), "what is refused changes nothing"
    with torch.no_grad():
        case.step_(live, pool, chosen([3, 0]), backend=backend)


def test_a_trusted_index_is_not_looked_at() -> None:
    pool, x = torch.randn(3, 2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    want = pool[chosen([2, 2])]
    with trusting_values():
        assert torch.equal(token_shift_step_(x, pool, chosen([2, 2]), backend="torch"), want)


def test_the_maximum_is_not_rounded() -> None:
    pool = WKV4State(*[torch.zeros(3, 2, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)])
    x, index = torch.zeros(1, 2, device=DEVICE), chosen([0])
    with pytest.raises(ValueError, match=r"state\.max has dtype torch\.bfloat16; accepted are float32"):
        wkv4_step_(x, x, x[0], x[0], pool, index)
    with pytest.raises(ValueError, match="must be a WKV4State"):
        wkv4_step_(x, x, x[0], x[0], pool.num, index)  # type: ignore[arg-type]


def test_inference_mode() -> None:
    with torch.inference_mode():
        inside = torch.randn(3, 2, device=DEVICE)
    outside = torch.randn(3, 2, device=DEVICE)
    x = torch.randn(1, 2, device=DEVICE)
    for pool in (inside, outside):
        for backend in ("torch", *([] if gpu.serves(torch.device(DEVICE)) else ["triton"])):
            with torch.inference_mode():
                want = pool[1:2].clone()
                assert torch.equal(token_shift_step_(x, pool, chosen([1]), backend=backend), want)
                assert torch.equal(pool[1:2], x)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs are a GPU's")
def test_a_captured_step_follows_its_index() -> None:
    B, H, K, V, slots = 3, 2, 64, 64, 8
    inputs = [torch.randn(B, H, V if i == 3 else K, device=DEVICE) / 8 for i in range(6)]
    pool = torch.randn(slots, H, K, V, device=DEVICE)
    beside, index = pool.clone(), chosen([0, 1, 2])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiled before it is captured
        wkv7_step_(*inputs, pool.clone(), index)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = wkv7_step_(*inputs, pool, index)
    for rows in ([5, 1, 7], [0, 5, 2]):
        index.copy_(chosen(rows))
        graph.replay()
        want = wkv7_step_(*inputs, beside, chosen(rows))
        assert torch.equal(y, want)
        assert torch.equal(pool, beside)
