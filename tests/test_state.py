"""States as values: rows, batches, casts, files and other projects' layouts."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise import StateError
from statewise.state import (
    LayerState,
    Mamba2LayerState,
    Mamba3State,
    MambaLayerState,
    ModelState,
    RWKV4LayerState,
    RWKV5LayerState,
    RWKV6LayerState,
    RWKV7LayerState,
    WKV4State,
    load_state,
    stack,
)


def numbered(*shape: int, seed: int = 0) -> Tensor:
    """Asymmetric contents: no two entries equal, so a transposed or swapped axis cannot pass."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def make(family: str, batch: int = 3, layers: int = 2) -> ModelState:
    made: list[LayerState] = []
    for i in range(layers):
        seeds = range(100 * i, 100 * i + 9)
        if family == "rwkv4":
            a, b, c, d, e = (numbered(batch, 6, seed=s) for s in seeds[:5])
            made.append(RWKV4LayerState(a, WKV4State(b, c, d), e))
        else:
            kind, shapes = _OTHERS[family]
            made.append(kind(*(numbered(batch, *shape, seed=seed) for shape, seed in zip(shapes, seeds, strict=False))))
    return ModelState(tuple(made))


_MATRIX = ((8,), (2, 4, 4), (8,))
_OTHERS: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "rwkv5": (RWKV5LayerState, _MATRIX),
    "rwkv6": (RWKV6LayerState, _MATRIX),
    "rwkv7": (RWKV7LayerState, _MATRIX),
    "mamba": (MambaLayerState, ((3, 5), (5, 7))),
    "mamba2": (Mamba2LayerState, ((3, 9), (2, 4, 3))),
    "mamba3": (Mamba3State, ((2, 3), (2, 4, 6), (1, 2, 6), (2, 4))),
}
FAMILIES = ("rwkv4", *_OTHERS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def leaves(state: ModelState) -> list[Tensor]:
    found: list[Tensor] = []
    state.map(lambda leaf: found.append(leaf) or leaf)  # type: ignore[func-returns-value]
    return found


def equal(a: ModelState, b: ModelState) -> bool:
    return a.family == b.family and all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@every_family
def test_clone_shares_nothing_and_keeps_the_graph(family: str) -> None:
    state = make(family).map(lambda leaf: leaf.requires_grad_())
    copy = state.clone()
    assert equal(copy, state)
    assert all(leaf.grad_fn is not None for leaf in leaves(copy))
    detached = state.detach()
    assert not any(leaf.requires_grad for leaf in leaves(detached))
    with torch.no_grad():
        for leaf in leaves(copy):
            leaf.zero_()
    assert not equal(copy, state)


@every_family
def test_casts(family: str) -> None:
    state = make(family)
    assert {leaf.dtype for leaf in leaves(state.to(dtype=torch.float64))} == {torch.float64}
    assert {leaf.dtype for leaf in leaves(state.to(torch.bfloat16))} == {torch.bfloat16}
    assert {leaf.device.type for leaf in leaves(state.to("meta"))} == {"meta"}
    assert {leaf.dtype for leaf in leaves(state)} == {torch.float32}
    with pytest.raises(ValueError, match="int64"):
        state.to(torch.int64)


@every_family
def test_rows(family: str) -> None:
    state = make(family, batch=4)
    chosen = state.select([2, 0, 2])
    assert chosen.batch_size == 3
    for before, after in zip(leaves(state), leaves(chosen), strict=True):
        assert torch.equal(after, before[[2, 0, 2]])
    assert equal(state.select(torch.tensor([2, 0, 2])), chosen)
    assert equal(state.select([-1]), state.select([3]))
    assert state.select([]).batch_size == 0
    assert equal(stack(state.split()), state)
    with pytest.raises(ValueError, match="outside a batch of 4"):
        state.select([4])
    with pytest.raises(ValueError, match="1-D integer"):
        state.select(torch.tensor([0.5]))


@every_family
def test_nbytes(family: str) -> None:
    state = make(family)
    assert state.nbytes == sum(leaf.numel() * 4 for leaf in leaves(state))


def test_stack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one"):
        stack([])
    with pytest.raises(ValueError, match="state 1 is mamba"):
        stack([make("rwkv4"), make("mamba")])
    with pytest.raises(ValueError, match="state 1 is rwkv4 with 3 layers"):
        stack([make("rwkv4"), make("rwkv4", layers=3)])
    other = make("mamba").map(lambda leaf: leaf[..., :2])
    with pytest.raises(ValueError, match="layer 0, conv"):
        stack([make("mamba"), other])


@every_family
def test_a_file_gives_back_the_state(family: str, tmp_path: Path) -> None:
    state = make(family)
    state.save(tmp_path / "state")
    assert equal(load_state(tmp_path / "state"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@every_family
def test_infinities_survive_a_file(family: str, tmp_path: Path) -> None:
    state = make(family).map(lambda leaf: torch.full_like(leaf, -torch.inf))
    state.save(tmp_path / "state")
    assert equal(load_state(tmp_path / "state"), state)


def rewrite(path: Path, change: object) -> None:
    """Save the file again with another header; ``change`` edits the parsed one."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "pt", "not a Statewise state file"),
        ("version", "2", "version '2'"),
        ("family", "gpt", "unknown model family"),
        ("layout", "fla", "unknown layout"),
        ("layers", "1", "unknown tensor layers.1"),
        ("layers", "3", "layers.2.att_shift is missing"),
        ("layers", "99999999999999999999", "claims"),
        ("layers", "-1", "claims"),
        ("layers", "0", "claims"),
    ],
)
def test_lies_about_what_it_is(key: str, value: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    make("rwkv7").save(path)
    rewrite(path, lambda header: header["__metadata__"].update({key: value}))
    with pytest.raises(StateError, match=message) as caught:
        load_state(path)
    assert str(path) in str(caught.value)


def test_another_familys_state_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state"
    make("rwkv4").save(path)
    rewrite(path, lambda header: header["__metadata__"].update({"family": "mamba"}))
    with pytest.raises(StateError, match="missing"):
        load_state(path)


def test_shapes_that_do_not_fit_each_other(tmp_path: Path) -> None:
    first, second = make("mamba").layers
    assert isinstance(second, MambaLayerState)
    ModelState((first, MambaLayerState(second.conv[:2], second.ssm))).save(tmp_path / "state")
    with pytest.raises(StateError, match=r"layers\.1\.conv"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\xff" * 200, b"\x02\0\0\0\0\0\0\0{}", b"\x05\0\0\0\0\0\0\0[[[[["]
)
def test_what_is_no_state_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(StateError, match="state"):
        load_state(path)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_never_crashes(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    make("rwkv4").save(path)
    content = bytearray(path.read_bytes())
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(min(len(content), 900))] = rng.randrange(256)
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    path.write_bytes(content)
    try:
        state = load_state(path)
    except StateError:
        return
    assert state.batch_size >= 0


#: Who can hold what.
LAYOUTS = {
    "rwkv-pip": ("rwkv4", "rwkv5", "rwkv6", "rwkv7"),
    "rwkv-lm": ("rwkv4", "rwkv5", "rwkv6", "rwkv7"),
    "fla": ("rwkv6", "rwkv7"),
    "ggml": ("rwkv4", "rwkv6", "rwkv7"),
    "transformers": ("rwkv4", "mamba", "mamba2"),
    "mamba-ssm": ("mamba", "mamba2"),
    "mamba.py": ("mamba",),
}
#: These hold one sequence and no batch axis.
SINGLE = ("rwkv-pip", "ggml")


@every_family
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_there_and_back(family: str, layout: str) -> None:
    state = make(family, batch=1 if layout in SINGLE else 3)
    if family not in LAYOUTS[layout]:
        with pytest.raises(ValueError, match=f"cannot hold a {family} state"):
            state.to_layout(layout)
        return
    template = state.map(torch.zeros_like)
    flat = state.to_layout(layout)
    assert equal(template.from_layout(layout, flat), state)
    assert not any(leaf.any() for leaf in leaves(template)), "the template stays as it is"
    for tensor in flat:
        tensor.zero_()
    assert equal(state, make(family, batch=1 if layout in SINGLE else 3)), "what is given out shares nothing"


@pytest.mark.parametrize("layout", SINGLE)
@pytest.mark.parametrize("family", ["rwkv4", "rwkv7"])
def test_one_sequence_layouts_refuse_a_batch(family: str, layout: str) -> None:
    with pytest.raises(ValueError, match="one sequence"):
        make(family, batch=2).to_layout(layout)


@pytest.mark.parametrize("family", ["rwkv5", "rwkv6", "rwkv7"])
def test_who_turns_the_matrix(family: str) -> None:
    """The package and ggml changed sides between RWKV-6 and RWKV-7; RWKV-LM and fla are on opposite ones throughout."""
    state = make(family, batch=1)
    matrix = state.layers[1].wkv  # type: ignore[union-attr]
    assert isinstance(matrix, Tensor)
    turned = matrix.transpose(-1, -2)
    assert torch.equal(state.to_layout("rwkv-lm")[4], turned)
    assert torch.equal(state.to_layout("rwkv-pip")[4], (turned if family == "rwkv7" else matrix)[0])
    if family != "rwkv5":
        assert torch.equal(state.to_layout("fla")[4], matrix)
        ffn, att, kept = state.to_layout("ggml")[3:]
        assert torch.equal(kept, (turned if family == "rwkv7" else matrix)[0])
        assert torch.equal(ffn, state.layers[1].ffn_shift[0])  # type: ignore[union-attr]
        assert torch.equal(att, state.layers[1].att_shift[0])  # type: ignore[union-attr]


def test_layouts_say_what_the_projects_keep() -> None:
    state = make("rwkv7", batch=1)
    layer = state.layers[1]
    assert isinstance(layer, RWKV7LayerState)
    flat = state.to_layout("rwkv-pip")
    assert len(flat) == 6
    assert torch.equal(flat[4], layer.wkv[0].transpose(-1, -2))
    v4 = make("rwkv4").to_layout("transformers")
    assert [tuple(t.shape) for t in v4] == [(3, 6, 2)] * 5
    assert torch.equal(v4[0][..., 1], make("rwkv4").layers[1].ffn_shift)  # type: ignore[union-attr]
    mamba = make("mamba")
    first = mamba.layers[0]
    assert isinstance(first, MambaLayerState)
    conv, ssm = mamba.to_layout("mamba-ssm")[:2]
    assert conv.shape == (3, 5, 4)
    assert not conv[..., 0].any()
    assert torch.equal(conv[..., 1:], first.conv.transpose(1, 2))
    h, inputs = mamba.to_layout("mamba.py")[:2]
    assert torch.equal(h, ssm)
    assert torch.equal(inputs, conv[..., 1:])


def test_layouts_refuse() -> None:
    with pytest.raises(ValueError, match="unknown state layout"):
        make("mamba").to_layout("jax")
    with pytest.raises(ValueError, match="cannot hold"):
        make("rwkv7").to_layout("mamba-ssm")
    state = make("mamba")
    with pytest.raises(ValueError, match="has 4 tensors, got 3"):
        state.from_layout("mamba-ssm", state.to_layout("mamba-ssm")[:3])
    swapped = state.to_layout("mamba-ssm")[::-1]
    with pytest.raises(ValueError, match="tensor 0"):
        state.from_layout("mamba-ssm", swapped)
