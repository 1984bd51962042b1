"""A ModelState in transformers' cache: a layer of the cache per block, a recurrent state per tensor of the block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    LinearAttentionLayer,
)

from statewise.state import ModelState

__all__ = ["LAYER_TYPE", "RecurrentStateLayer", "read_cache", "write_cache"]

#: What ``layer_types`` of a configuration says; transformers then builds the layers below wherever it builds a cache.
LAYER_TYPE = "statewise"


class RecurrentStateLayer(LinearAttentionLayer, CacheLayerMixin):
    """One block of a :class:`~statewise.state.ModelState`, its tensors in the order of the block's fields.

    ``recurrent_states[i]`` holds tensor ``i`` in our own layout; there are no ``conv_states``, as ours are one sample
    shorter than transformers'. The cached length counts the columns read, padding included, as ``generate`` does.
    """

    # Where the base classes differ: they copy into fixed buffers, which would cut gradients through the state and
    # forbid another batch size after `reset`; and they fill with zeros, where RWKV-4 begins with minus infinity.

    _layer_type = LAYER_TYPE
    is_sliding = False
    is_compileable = False

    def __init__(self, number_of_states: int = 1, **kwargs: Any) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.number_of_states: int = number_of_states
        self.columns = 0

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Hold ``recurrent_states`` itself, whatever was there."""
        self.number_of_states = max(self.number_of_states, state_idx + 1)
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
        self.is_conv_states_initialized[state_idx] = False
        self.device, self.dtype = recurrent_states.device, recurrent_states.dtype
        return recurrent_states

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """There are no keys and values here."""
        raise ValueError("a Statewise cache holds recurrent states, no keys and values")

    def get_seq_length(self) -> int:
        """Columns read so far."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over everything read and ``query_length`` columns more."""
        return self.columns + query_length, 0

    def reset(self) -> None:
        """Back to the model's documented start."""
        self.columns = 0
        for index in range(self.number_of_states):
            self.recurrent_states[index] = None
            self.is_recurrent_states_initialized[index] = self.has_previous_state[index] = False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, beside each other."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows ``indices``, in that order."""
        self._map(lambda state: state[indices.to(state.device)])

    def activate_past_recording(self) -> None:
        """Refused: assisted generation rewinds its cache, and a recurrent state cannot be rewound."""
        raise ValueError("a recurrent state cannot be rewound, so this model cannot assist another's generation")

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for index, state in self.recurrent_states.items():
            if state is not None:
                self.recurrent_states[index] = change(state)


# What transformers calls a static cache is one of fixed size: this one always is.
STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = RecurrentStateLayer


def read_cache(cache: Cache, spec: pytree.TreeSpec) -> ModelState | None:
    """The state a cache holds (its own tensors, not copies); ``None`` before anything was read.

    Args:
        cache: ``DynamicCache(config=model.config)``, as ``generate`` makes one.
        spec: structure of the model's state.

    Raises:
        ValueError: a cache of another kind or model.
    """
    layers = getattr(cache, "layers", None)
    if not layers or not all(isinstance(layer, RecurrentStateLayer) for layer in layers):
        raise ValueError(
            f"past_key_values is {cache!r}; accepted is a DynamicCache(config=model.config), as this model returns it"
        )
    if not cache.has_previous_state():
        return None
    leaves = [state for layer in layers for state in layer.recurrent_states.values()]
    if len(leaves) != spec.num_leaves:
        raise ValueError(f"past_key_values holds {len(leaves)} tensors; this model's state has {spec.num_leaves}")
    state: ModelState = pytree.tree_unflatten(leaves, spec)
    return state


def write_cache(cache: Cache, state: ModelState, columns: int) -> None:
    """Replace what ``cache`` holds by ``state``, which has read ``columns`` columns more."""
    for number, (layer, block) in enumerate(zip(cache.layers, state.layers, strict=True)):
        for index, leaf in enumerate(pytree.tree_leaves(block)):
            cache.update_recurrent_state(leaf, number, state_idx=index)
        layer.columns += columns
