"""State is a value: what a model remembers, as named tuples of tensors.

Legend: B batch, C channels (width), H heads, K key rows, V value columns, N SSM state size, P SSM head width,
W convolution width, R MIMO rank, S rotary angles.

Every container is a ``NamedTuple``: torch sees it as a pytree (compile, export, ``tree_map``), nothing can be assigned
into it, and it unpacks in the order of its fields. Row ``b`` of every tensor belongs to sequence ``b`` of the batch.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from statewise.errors import StateError
from statewise.files import atomic_write

__all__ = [
    "LayerState",
    "Mamba2LayerState",
    "Mamba3State",
    "MambaLayerState",
    "ModelState",
    "RWKV4LayerState",
    "RWKV5LayerState",
    "RWKV6LayerState",
    "RWKV7LayerState",
    "WKV4State",
    "load_state",
    "stack",
]


class WKV4State(NamedTuple):
    """The WKV-4 average so far, each ``(B, C)`` float32: true sums are ``num * exp(max)`` and ``den * exp(max)``.

    ``max`` is the largest exponent met, decayed along with the sums; a fresh state has ``max = -inf`` and zero sums.
    """

    num: Tensor
    den: Tensor
    max: Tensor


class RWKV4LayerState(NamedTuple):
    """One RWKV-4 block: the last input of time mixing ``(B, C)``, the average, the last input of channel mixing."""

    att_shift: Tensor
    wkv: WKV4State
    ffn_shift: Tensor


class RWKV5LayerState(NamedTuple):
    """One RWKV-5 block: the last input of time mixing ``(B, C)``, ``S`` as ``(B, H, K, V)``, the last input of the
    channel mixing."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor


class RWKV6LayerState(NamedTuple):
    """One RWKV-6 block, as :class:`RWKV5LayerState`."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor


class RWKV7LayerState(NamedTuple):
    """One RWKV-7 block, as :class:`RWKV5LayerState`."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor


class MambaLayerState(NamedTuple):
    """One Mamba-1 block: the last W-1 inputs of the convolution ``(B, W-1, channels)``, oldest first, and the SSM
    state ``(B, channels, N)``."""

    conv: Tensor
    ssm: Tensor


class Mamba2LayerState(NamedTuple):
    """One Mamba-2 block: the last W-1 inputs of the convolution ``(B, W-1, channels)`` (x, B and C beside each other),
    oldest first, and the SSM state ``(B, H, P, N)``."""

    conv: Tensor
    ssm: Tensor


class Mamba3State(NamedTuple):
    """One Mamba-3 block: rotary angles ``(B, H, S)``, the SSM state ``(B, H, P, N)``, and the last token's key
    ``(B, R, H, N)``, biased and rotated, and value ``(B, H, P)``, which enter the state half a step late."""

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


LayerState: TypeAlias = (
    RWKV4LayerState
    | RWKV5LayerState
    | RWKV6LayerState
    | RWKV7LayerState
    | MambaLayerState
    | Mamba2LayerState
    | Mamba3State
)

# The name a saved file carries, and the shape of each tensor in the order `_leaves` gives them.
_FAMILIES: dict[str, type[Any]] = {
    "rwkv4": RWKV4LayerState,
    "rwkv5": RWKV5LayerState,
    "rwkv6": RWKV6LayerState,
    "rwkv7": RWKV7LayerState,
    "mamba": MambaLayerState,
    "mamba2": Mamba2LayerState,
    "mamba3": Mamba3State,
}
_LEAVES: dict[str, tuple[str, ...]] = {
    "rwkv4": ("att_shift", "wkv.num", "wkv.den", "wkv.max", "ffn_shift"),
    **dict.fromkeys(("rwkv5", "rwkv6", "rwkv7"), ("att_shift", "wkv", "ffn_shift")),
    **dict.fromkeys(("mamba", "mamba2"), ("conv", "ssm")),
    "mamba3": ("angle", "ssm", "k", "v"),
}
_DIMENSIONS = {
    "rwkv4": (2, 2, 2, 2, 2),
    **dict.fromkeys(("rwkv5", "rwkv6", "rwkv7"), (2, 4, 2)),
    "mamba": (3, 3),
    "mamba2": (3, 4),
    "mamba3": (3, 4, 4, 3),
}

_VERSION = "1"
_LAYOUT = "canonical"
_LARGEST_HEADER = 1 << 24
_MOST_LAYERS = 4096


def _leaves(layer: LayerState) -> list[Tensor]:
    leaves: list[Tensor] = []
    for field in layer:
        leaves.extend(field if isinstance(field, tuple) else [field])
    return leaves


def _rebuild(family: str, leaves: Sequence[Tensor]) -> LayerState:
    if family == "rwkv4":
        att_shift, num, den, largest, ffn_shift = leaves
        return RWKV4LayerState(att_shift, WKV4State(num, den, largest), ffn_shift)
    rebuilt: LayerState = _FAMILIES[family](*leaves)
    return rebuilt


class ModelState(NamedTuple):
    """The state of a whole model: one container per block, first block first.

    Every method returns a new value; nothing here writes into a tensor that somebody else may hold.
    """

    layers: tuple[LayerState, ...]

    @property
    def family(self) -> str:
        """``"rwkv4"``, ``"rwkv5"``, ``"rwkv6"``, ``"rwkv7"``, ``"mamba"``, ``"mamba2"`` or ``"mamba3"``."""
        if not self.layers:
            raise ValueError("a ModelState without layers belongs to no family")
        for name, kind in _FAMILIES.items():
            if isinstance(self.layers[0], kind):
                return name
        raise ValueError(f"ModelState.layers holds {type(self.layers[0]).__name__}, which is no known layer state")

    @property
    def batch_size(self) -> int:
        """How many sequences this state holds."""
        return _leaves(self.layers[0])[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(leaf.numel() * leaf.element_size() for layer in self.layers for leaf in _leaves(layer))

    def map(self, function: Callable[[Tensor], Tensor]) -> ModelState:
        """Apply ``function`` to every tensor."""
        family = self.family
        return ModelState(tuple(_rebuild(family, [function(leaf) for leaf in _leaves(layer)]) for layer in self.layers))

    def clone(self) -> ModelState:
        """A copy that shares no memory with this state; gradients flow through it."""
        return self.map(torch.clone)

    def detach(self) -> ModelState:
        """The same values, cut from the graph: where truncated back-propagation stops."""
        return self.map(torch.Tensor.detach)

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> ModelState:
        """Move and cast. ``None`` leaves that side as it is; a dtype may also be given alone, as in ``Tensor.to``."""
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise ValueError(f"to() got two dtypes: {device} and {dtype}")
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"a state is cast to floating-point dtypes only, got {dtype}")
        place = None if device is None else torch.device(device)
        return self.map(lambda leaf: leaf.to(device=place, dtype=dtype))

    def select(self, rows: Sequence[int] | Tensor) -> ModelState:
        """The sequences ``rows`` (a list or a 1-D integer tensor; repeats allowed), in that order."""
        index = torch.as_tensor(rows, dtype=None if isinstance(rows, Tensor) else torch.int64)
        if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
            raise ValueError(
                f"rows must be a list of integers or a 1-D integer tensor, "
                f"got {index.dtype} of shape {tuple(index.shape)}"
            )
        size = self.batch_size
        if index.numel() and not (-size <= int(index.min()) and int(index.max()) < size):
            raise ValueError(f"rows {index.tolist()} reach outside a batch of {size}")
        index = torch.where(index < 0, index + size, index).long()
        return self.map(lambda leaf: leaf.index_select(0, index.to(leaf.device)))

    def split(self) -> list[ModelState]:
        """One state of batch size 1 per sequence. ``stack`` is the way back."""
        return [self.select([row]) for row in range(self.batch_size)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with the family, the layout and its version, in one atomic step."""
        from safetensors.torch import save

        family = self.family
        tensors = {
            f"layers.{index}.{name}": leaf.detach().cpu().contiguous().clone()
            for index, layer in enumerate(self.layers)
            for name, leaf in zip(_LEAVES[family], _leaves(layer), strict=True)
        }
        metadata = {
            "format": "statewise-state",
            "version": _VERSION,
            "family": family,
            "layout": _LAYOUT,
            "layers": str(len(self.layers)),
        }
        atomic_write(path, save(tensors, metadata))

    def to_layout(self, name: str) -> list[Tensor]:
        """The flat list of tensors another project keeps for this state, in its order and orientation.

        Per layer, unless said otherwise; RWKV-4's average is num, den, max in all of them:

        - ``"rwkv-pip"`` (one sequence, no batch axis): att_shift, average or matrix, ffn_shift. The matrix is
          ``(H, K, V)`` in RWKV-5 and 6, ``(H, V, K)`` in RWKV-7.
        - ``"rwkv-lm"`` (RWKV-LM's kernels and ``time_state``): the same order with a batch axis, matrices
          ``(B, H, V, K)``.
        - ``"fla"``: the same order with a batch axis, matrices ``(B, H, K, V)``.
        - ``"ggml"`` (one sequence, no batch axis): ffn_shift first, then as ``"rwkv-pip"``.
        - ``"transformers"``: RWKV-4 five tensors ``(B, C, layers)`` with ffn_shift first; Mamba conv
          ``(B, channels, W)`` and ssm.
        - ``"mamba-ssm"``: conv ``(B, channels, W)`` and ssm.
        - ``"mamba.py"``: ssm, then conv ``(B, channels, W-1)``.

        Raises:
            ValueError: an unknown name, a layout that cannot hold this family, or a batch it has no room for.
        """
        layout = _find_layout(name, self.family)
        if not layout.batched and self.batch_size != 1:
            raise ValueError(f"layout {name!r} holds one sequence, this state has {self.batch_size}: select one row")
        if layout.by_slot:
            slots = zip(*(_leaves(layer) for layer in self.layers), strict=True)
            found = [torch.stack(slot, dim=-1) for slot in slots]
            return [found[index] for index in layout.order]
        flat: list[Tensor] = []
        for layer in self.layers:
            leaves = _leaves(layer)
            if layout.turned is not None:
                leaves[layout.turned] = leaves[layout.turned].transpose(-1, -2)
            if layout.spare_column:  # these projects keep W columns and never read the first
                leaves[0] = torch.cat([torch.zeros_like(leaves[0][..., :1]), leaves[0]], -1)
            flat += [leaves[index] if layout.batched else leaves[index][0] for index in layout.order]
        return [tensor.clone() for tensor in flat]

    def from_layout(self, name: str, tensors: Sequence[Tensor]) -> ModelState:
        """A new state of this one's family and sizes from another project's tensors (the inverse of :meth:`to_layout`).

        This state is only the template (``model.init_state(1)`` will do); its dtypes are kept.

        Raises:
            ValueError: as :meth:`to_layout`, or a wrong number of tensors or shape, naming which.
        """
        expected = self.to_layout(name)
        if len(tensors) != len(expected):
            raise ValueError(f"layout {name!r} of this model has {len(expected)} tensors, got {len(tensors)}")
        for index, (given, want) in enumerate(zip(tensors, expected, strict=True)):
            if given.shape != want.shape:
                raise ValueError(
                    f"tensor {index} of layout {name!r} has shape {tuple(given.shape)}, expected {tuple(want.shape)}"
                )
        family, layout = self.family, _find_layout(name, self.family)
        count = len(layout.order)
        layers = []
        for number, layer in enumerate(self.layers):
            if layout.by_slot:
                given_leaves = [slot[..., number] for slot in tensors]
            else:
                given_leaves = list(tensors[number * count : (number + 1) * count])
            leaves = [given_leaves[layout.order.index(index)] for index in range(count)]
            if not layout.batched:
                leaves = [leaf[None] for leaf in leaves]
            if layout.spare_column:
                leaves[0] = leaves[0][..., 1:]
            if layout.turned is not None:
                leaves[layout.turned] = leaves[layout.turned].transpose(-1, -2)
            moved = [
                given.to(device=own.device, dtype=own.dtype, copy=True).contiguous()
                for given, own in zip(leaves, _leaves(layer), strict=True)
            ]
            layers.append(_rebuild(family, moved))
        return ModelState(tuple(layers))


class _Layout(NamedTuple):
    """How a project holds the leaves of a layer, counted as in ``_LEAVES``."""

    order: tuple[int, ...]
    batched: bool = True
    turned: int | None = None  # the leaf whose last two axes it swaps
    spare_column: bool = False  # of a convolution window
    by_slot: bool = False  # one tensor a leaf for all layers, on the last axis, instead of one a layer


_AVERAGE, _MATRIX = (0, 1, 2, 3, 4), (0, 1, 2)
_LAYOUTS: dict[str, dict[str, _Layout]] = {
    "rwkv-pip": {
        "rwkv4": _Layout(_AVERAGE, batched=False),
        "rwkv5": _Layout(_MATRIX, batched=False),
        "rwkv6": _Layout(_MATRIX, batched=False),
        "rwkv7": _Layout(_MATRIX, batched=False, turned=1),
    },
    "rwkv-lm": {
        "rwkv4": _Layout(_AVERAGE),
        "rwkv5": _Layout(_MATRIX, turned=1),
        "rwkv6": _Layout(_MATRIX, turned=1),
        "rwkv7": _Layout(_MATRIX, turned=1),
    },
    "fla": {
        "rwkv6": _Layout(_MATRIX),
        "rwkv7": _Layout(_MATRIX),
    },
    "ggml": {
        "rwkv4": _Layout((4, 0, 1, 2, 3), batched=False),
        "rwkv6": _Layout((2, 0, 1), batched=False),
        "rwkv7": _Layout((2, 0, 1), batched=False, turned=1),
    },
    "transformers": {
        "rwkv4": _Layout((4, 0, 1, 2, 3), by_slot=True),
        "mamba": _Layout((0, 1), turned=0, spare_column=True),
        "mamba2": _Layout((0, 1), turned=0, spare_column=True),
    },
    "mamba-ssm": {
        "mamba": _Layout((0, 1), turned=0, spare_column=True),
        "mamba2": _Layout((0, 1), turned=0, spare_column=True),
    },
    "mamba.py": {"mamba": _Layout((1, 0), turned=0)},
}


def _find_layout(name: str, family: str) -> _Layout:
    if name not in _LAYOUTS:
        raise ValueError(f"unknown state layout {name!r}; known: {', '.join(sorted(_LAYOUTS))}")
    if family not in _LAYOUTS[name]:
        raise ValueError(f"layout {name!r} cannot hold a {family} state (it holds {', '.join(_LAYOUTS[name])})")
    return _LAYOUTS[name][family]


def stack(states: Sequence[ModelState]) -> ModelState:
    """Join states of one model along the batch axis, in order; the inverse of :meth:`ModelState.split`.

    Raises:
        ValueError: no states, or states of different families or sizes.
    """
    if not states:
        raise ValueError("stack needs at least one state")
    family = states[0].family
    for position, other in enumerate(states):
        if other.family != family or len(other.layers) != len(states[0].layers):
            raise ValueError(
                f"state {position} is {other.family} with {len(other.layers)} layers, "
                f"state 0 is {family} with {len(states[0].layers)}"
            )
    layers: list[LayerState] = []
    for index, parts in enumerate(zip(*(state.layers for state in states), strict=True)):
        leaves = list(zip(*(_leaves(part) for part in parts), strict=True))
        for name, group in zip(_LEAVES[family], leaves, strict=True):
            if len({leaf.shape[1:] for leaf in group}) > 1:
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in group)
                raise ValueError(f"layer {index}, {name}: shapes differ beyond the batch axis: {shapes}")
        layers.append(_rebuild(family, [torch.cat(group, dim=0) for group in leaves]))
    return ModelState(tuple(layers))


def load_state(path: str | os.PathLike[str]) -> ModelState:
    """Read what :meth:`ModelState.save` wrote. The file is treated as hostile: everything it claims is checked.

    Raises:
        StateError: not such a file, damaged, of a newer version, or inconsistent with itself.
        FileNotFoundError: no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = os.fspath(path)
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        prefix = handle.read(8)
        if len(prefix) < 8:
            raise StateError(f"{name}: {size} bytes are too few for a state file")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_LARGEST_HEADER, size - 8):
            raise StateError(f"{name}: claims a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(handle.read(length))
        except (ValueError, RecursionError) as error:
            raise StateError(f"{name}: the header is not JSON: not a state file") from error
        handle.seek(0)
        content = handle.read()
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != "statewise-state":
        raise StateError(f"{name}: not a Statewise state file")
    if metadata.get("version") != _VERSION:
        raise StateError(f"{name}: version {metadata.get('version')!r}; this release reads {_VERSION!r}")
    family, layout, count = metadata.get("family"), metadata.get("layout"), metadata.get("layers")
    if family not in _FAMILIES:
        raise StateError(f"{name}: unknown model family {family!r}; known: {', '.join(_FAMILIES)}")
    if layout != _LAYOUT:
        raise StateError(f"{name}: unknown layout {layout!r}; known: {_LAYOUT}")
    if (
        not isinstance(count, str)
        or not count.isdecimal()
        or not 0 < len(count) < 6
        or not 0 < int(count) <= _MOST_LAYERS
    ):
        raise StateError(f"{name}: claims {count!r} layers")
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise StateError(f"{name}: {error}") from error
    wanted = [f"layers.{i}.{leaf}" for i in range(int(count)) for leaf in _LEAVES[family]]
    if missing := sorted(set(wanted) - set(tensors)):
        raise StateError(f"{name}: tensor {missing[0]} is missing")
    if extra := sorted(set(tensors) - set(wanted)):
        raise StateError(f"{name}: unknown tensor {extra[0]}")
    rows = tensors[wanted[0]].shape[:1]
    per_layer = len(_LEAVES[family])
    for index, key in enumerate(wanted):
        tensor, dimensions = tensors[key], _DIMENSIONS[family][index % per_layer]
        first = tensors[wanted[index % per_layer]]
        if not tensor.dtype.is_floating_point:
            raise StateError(f"{name}: tensor {key} has dtype {tensor.dtype}; a state is floating point")
        if tensor.dim() != dimensions or tensor.shape[:1] != rows or tensor.shape != first.shape:
            raise StateError(f"{name}: tensor {key} has shape {tuple(tensor.shape)}, which does not fit the others")
    leaves = [tensors[key] for key in wanted]
    return ModelState(tuple(_rebuild(family, leaves[i : i + per_layer]) for i in range(0, len(leaves), per_layer)))
