"""State is a value: what a model remembers, as named tuples of tensors.

Legend: B batch, C channels (width), H heads, K key rows, V value columns, N SSM state size, W convolution width.

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
    "MambaLayerState",
    "ModelState",
    "RWKV4LayerState",
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


class RWKV7LayerState(NamedTuple):
    """One RWKV-7 block: the last input of time mixing ``(B, C)``, ``S`` as ``(B, H, K, V)``, the last input of the
    channel mixing."""

    att_shift: Tensor
    wkv: Tensor
    ffn_shift: Tensor


class MambaLayerState(NamedTuple):
    """One Mamba-1 block: the last W-1 inputs of the convolution ``(B, W-1, channels)``, oldest first, and the SSM
    state ``(B, channels, N)``."""

    conv: Tensor
    ssm: Tensor


LayerState: TypeAlias = RWKV4LayerState | RWKV7LayerState | MambaLayerState

# The name a saved file carries, and the shape of each tensor in the order `_leaves` gives them.
_FAMILIES: dict[str, type[Any]] = {"rwkv4": RWKV4LayerState, "rwkv7": RWKV7LayerState, "mamba": MambaLayerState}
_LEAVES: dict[str, tuple[str, ...]] = {
    "rwkv4": ("att_shift", "wkv.num", "wkv.den", "wkv.max", "ffn_shift"),
    "rwkv7": ("att_shift", "wkv", "ffn_shift"),
    "mamba": ("conv", "ssm"),
}
_DIMENSIONS = {
    "rwkv4": (2, 2, 2, 2, 2),
    "rwkv7": (2, 4, 2),
    "mamba": (3, 3),
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
    if family == "rwkv7":
        return RWKV7LayerState(*leaves)
    return MambaLayerState(*leaves)


class ModelState(NamedTuple):
    """The state of a whole model: one container per block, first block first.

    Every method returns a new value; nothing here writes into a tensor that somebody else may hold.
    """

    layers: tuple[LayerState, ...]

    @property
    def family(self) -> str:
        """``"rwkv4"``, ``"rwkv7"`` or ``"mamba"``."""
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

        ``"rwkv-pip"`` (batch 1, no batch axis): per layer 5 vectors for RWKV-4 (att_shift, num, den, max, ffn_shift),
        3 tensors for RWKV-7 (att_shift, ``(H, V, K)``, ffn_shift). ``"transformers"``: RWKV-4 five tensors
        ``(B, C, layers)`` with ffn_shift first; Mamba per layer conv ``(B, channels, W)`` and ssm. ``"mamba-ssm"``: the
        same per layer. ``"mamba.py"``: per layer h, then inputs ``(B, channels, W-1)``.

        Raises:
            ValueError: an unknown name, a layout that cannot hold this family, or a batch it has no room for.
        """
        family = self.family
        _check_layout(name, family)
        if name == "rwkv-pip" and self.batch_size != 1:
            raise ValueError(f"layout 'rwkv-pip' holds one sequence, this state has {self.batch_size}: select one row")
        if name == "transformers" and family == "rwkv4":
            slots = zip(*(_leaves(layer) for layer in self.layers), strict=True)
            att, num, den, largest, ffn = (torch.stack(slot, dim=-1) for slot in slots)
            return [ffn, att, num, den, largest]
        flat: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, MambaLayerState):
                window = layer.conv.transpose(1, 2)  # (B, channels, W-1)
                if name == "mamba.py":
                    flat += [layer.ssm, window]
                else:  # these projects keep W columns and never read the first
                    flat += [torch.cat([torch.zeros_like(layer.conv[:, :1]).transpose(1, 2), window], 2), layer.ssm]
                continue
            leaves = [leaf[0] for leaf in _leaves(layer)]
            if isinstance(layer, RWKV7LayerState):
                leaves[1] = leaves[1].transpose(-1, -2)
            flat += leaves
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
        family = self.family
        if name == "transformers" and family == "rwkv4":
            ffn, att, num, den, largest = tensors
            columns = [[slot[..., i] for slot in (att, num, den, largest, ffn)] for i in range(len(self.layers))]
        else:
            count = len(_LEAVES[family])
            columns = [list(tensors[i * count : (i + 1) * count]) for i in range(len(self.layers))]
            for leaves in columns:
                if family == "mamba":
                    if name == "mamba.py":
                        leaves.reverse()
                    else:
                        leaves[0] = leaves[0][..., 1:]
                    leaves[0] = leaves[0].transpose(1, 2)
                else:
                    leaves[:] = [leaf[None] for leaf in leaves]
                    if family == "rwkv7":
                        leaves[1] = leaves[1].transpose(-1, -2)
        layers = [
            _rebuild(
                family,
                [
                    given.to(device=own.device, dtype=own.dtype, copy=True).contiguous()
                    for given, own in zip(leaves, _leaves(layer), strict=True)
                ],
            )
            for leaves, layer in zip(columns, self.layers, strict=True)
        ]
        return ModelState(tuple(layers))


_LAYOUTS: dict[str, tuple[str, ...]] = {
    "rwkv-pip": ("rwkv4", "rwkv7"),
    "transformers": ("rwkv4", "mamba"),
    "mamba-ssm": ("mamba",),
    "mamba.py": ("mamba",),
}


def _check_layout(name: str, family: str) -> None:
    if name not in _LAYOUTS:
        raise ValueError(f"unknown state layout {name!r}; known: {', '.join(sorted(_LAYOUTS))}")
    if family not in _LAYOUTS[name]:
        raise ValueError(f"layout {name!r} cannot hold a {family} state (it holds {', '.join(_LAYOUTS[name])})")


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
