"""Our language models as Hugging Face transformers models: ``generate``, ``Trainer``, ``save_pretrained``, AutoModel.

Importing this module tells transformers' AutoConfig and AutoModelForCausalLM about ``model_type: "statewise"``.

Legend: B batch, T time.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

try:
    from huggingface_hub.dataclasses import strict
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from statewise.bridges.hf_cache import LAYER_TYPE, read_cache, write_cache
except ImportError as error:
    raise ImportError(f"statewise.bridges.hf needs transformers ({error}): pip install 'statewise[hf]'") from error

from statewise.errors import WeightsError
from statewise.models import checkpoint_of, create
from statewise.state import ModelState

if TYPE_CHECKING:
    from statewise.models import LanguageModel

__all__ = ["StatewiseConfig", "StatewiseForCausalLM", "register", "wrap"]

_EMBEDDINGS = ("emb", "backbone.embedding")
_HEADS = ("head", "lm_head")
_IGNORED = -100


@strict
class StatewiseConfig(PreTrainedConfig):
    """Any architecture of :func:`statewise.list_models`: its name, and the fields of its configuration.

    Args:
        architecture: ``"rwkv7"``, ``"mamba"``, ...
        fields: as :func:`statewise.create` takes them, e.g. ``{"vocab_size": 256, "num_layers": 4, "width": 256}``.
        use_cache: whether ``forward`` returns a cache when it is not said (in training it never does).
        pad_token_id, bos_token_id, eos_token_id: what ``generate`` pads with, begins with and stops at; ``None``:
            it does not.
    """

    model_type = "statewise"

    architecture: str = ""
    fields: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def _field(self, name: str) -> Any:
        if not self.fields or name not in self.fields:
            raise AttributeError(f"this StatewiseConfig has no {name!r} among its fields")
        return self.fields[name]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self._field("vocab_size"))

    @vocab_size.setter
    def vocab_size(self, rows: int) -> None:
        # Rounding up is how an architecture was made; a size that is set is meant as it is.
        rounding = {"pad_vocab_multiple": 1} if "pad_vocab_multiple" in (self.fields or {}) else {}
        self.fields = {**(self.fields or {}), "vocab_size": rows, **rounding}

    @property
    def hidden_size(self) -> int:
        """Channels between blocks."""
        return int(self._field("width"))

    @property
    def num_hidden_layers(self) -> int:
        """Blocks."""
        return int(self._field("num_layers"))

    @property
    def layer_types(self) -> list[str]:
        """What transformers builds a cache of."""
        return [LAYER_TYPE] * self.num_hidden_layers

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding."""
        return bool((self.fields or {}).get("tie_embeddings", False))

    def validate_layer_type(self) -> None:
        """Ours is a layer type of its own, not one of transformers' list."""


class StatewiseForCausalLM(PreTrainedModel, GenerationMixin):
    """One of our language models, ``.model``, behind transformers' interface.

    Padding changes nothing: rows may be padded on either side (``attention_mask``), what they hold there is never
    read, and the cache holds each row's state after its own last token.

    Args:
        config: architecture and sizes.
        model: the model to wrap, which is shared, not copied; ``None`` creates one, initialised as its authors do.

    Raises:
        ValueError: an architecture or field that :func:`statewise.create` refuses.
    """

    config_class = StatewiseConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True  # no assisted generation: a state cannot be rewound
    _tied_weights_keys = {"model.lm_head.weight": "model.backbone.embedding.weight"}  # noqa: RUF012 (transformers' own)

    def __init__(self, config: StatewiseConfig, model: LanguageModel | None = None) -> None:
        super().__init__(config)
        self.model = create(config.architecture, **(config.fields or {})) if model is None else model
        self.gradient_checkpointing = False
        self._state_spec = pytree.tree_structure(self.model.init_state(0))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read a batch of token ids, continued from a cache.

        Args:
            input_ids: ``(B, T)``; padding may hold any integer.
            attention_mask: ``(B, T)`` of zeros and ones, or longer by what the cache has read: the last T columns
                count. In each row the ones are beside each other. ``None``: all is read.
            past_key_values: a cache this model returned, or a fresh ``DynamicCache(config=model.config)``; updated
                in place unless ``use_cache`` is false.
            labels: ``(B, T)``; the loss is the mean cross-entropy of label t+1 given the tokens up to t, without
                labels of -100 and without padding on either side of the step.
            use_cache: whether the state is kept; ``None``: as the configuration says, but never in training.
            logits_to_keep: how many of the last columns get logits, or which columns; 0 means all.
            num_items_in_batch: what the sum of losses is divided by instead of their number (Trainer gives it).
            position_ids: a row of sequences packed one after the other is told by positions that begin again at 0
                (without mask, ``B = 1``); otherwise without meaning here, as ``token_type_ids``.
            return_dict: whether the result is a ``CausalLMOutputWithPast``; ``None``: as the configuration says.

        Returns:
            loss, logits ``(B, T, vocab_size)`` (undefined where a row is padded), past_key_values.

        Raises:
            ValueError: what this model does not offer (``inputs_embeds``, ``output_hidden_states``,
                ``output_attentions``), a mask with holes, shapes that do not fit each other, or a foreign cache.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("inputs_embeds is not supported: give input_ids")
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            raise ValueError("output_hidden_states is not supported: this model returns logits and its state")
        if output_attentions:
            raise ValueError("output_attentions is not supported: there is no attention in this model")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; accepted is (B, T)")
        some = isinstance(logits_to_keep, Tensor) or logits_to_keep != 0
        if labels is not None and (labels.shape != input_ids.shape or some):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and logits_to_keep is {logits_to_keep}; "
                f"accepted are {tuple(input_ids.shape)}, as input_ids, and 0"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        state = None if past_key_values is None else read_cache(past_key_values, self._state_spec)
        keep = _mask_of(attention_mask, input_ids, continued=state is not None)
        packed = _packed(position_ids, input_ids) if attention_mask is None and state is None else None
        if packed is not None and use_cache:
            raise ValueError("position_ids tell of packed sequences, which share no cache: set use_cache=False")

        T = input_ids.shape[1]
        columns = torch.arange(T, device=input_ids.device)
        kept = columns[logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)]
        if keep is not None:
            # Our models know padding on the right: rows are turned until it is there, and their logits turned back.
            start, lengths = keep.int().argmax(1)[:, None], keep.sum(1)
            logits, state = self.model(input_ids.gather(1, (columns + start) % T), state, lengths=lengths)
            logits = logits[torch.arange(len(start), device=start.device)[:, None], (kept - start) % T]
        elif T == 1 and state is not None:
            token_logits, state = self.model.step(input_ids[:, 0], state)
            logits = token_logits[:, None]
        else:
            logits, state = self.model(input_ids, state, cu_seqlens=packed)
            logits = logits[:, kept] if some else logits

        loss = None
        if labels is not None:
            targets = labels
            if keep is not None:
                known = keep & torch.cat([keep[:, :1], keep[:, :-1]], 1)
                targets = targets.masked_fill(~known, _IGNORED)
            loss = self.loss_function(logits, targets, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        if use_cache:
            if past_key_values is None:
                past_key_values = DynamicCache(config=self.config)
            write_cache(past_key_values, state, T)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )
        if self.config.return_dict if return_dict is None else return_dict:
            return output
        values: tuple[Any, ...] = output.to_tuple()
        return values

    def cache_of(self, state: ModelState) -> DynamicCache:
        """A cache that continues from ``state``, for ``forward`` and ``generate``.

        The tensors are shared, and nothing here writes into them. Every row of a batch continues from its own row.
        """
        given = pytree.tree_structure(state)
        if given != self._state_spec:
            raise ValueError(f"state is {type(state).__name__} of another structure than this model's init_state")
        cache = DynamicCache(config=self.config)
        write_cache(cache, state, 0)
        return cache

    def state_of(self, cache: DynamicCache) -> ModelState | None:
        """The state a cache holds; ``None`` before anything was read. It stays as it is when the cache goes on."""
        return read_cache(cache, self._state_spec)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers, which calls this from ``generate``; see there. Masked tokens move to the front."""
        wanted = kwargs.get("next_sequence_length")
        if wanted is not None and wanted < 1:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} columns, of which past_key_values has read all: give what came "
                "before and what is new, or the new tokens with a mask over everything"
            )
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
        if mask is None or tokens is None or bool(mask[:, -tokens.shape[1] :].all()):
            return inputs
        # `generate` takes the last column's logits for every row's, also where that column is padding; and without a
        # cache it reads everything again, where padding on the right has become a hole.
        before, mask = mask.split([mask.shape[1] - tokens.shape[1], tokens.shape[1]], dim=1)
        if bool((before.any(1) & ~mask.any(1)).any()):
            raise ValueError(
                "attention_mask leaves a row without tokens in a later chunk of the prompt: pad on the left"
            )
        order = mask.long().argsort(dim=1, stable=True)
        inputs["input_ids"], inputs["attention_mask"] = tokens.gather(1, order), mask.gather(1, order)
        return inputs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers, but strict: a directory that lacks a tensor or holds an unknown one is refused.

        Raises:
            WeightsError: naming the tensor, which transformers would initialise or drop with a warning.
        """
        told = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        for kind in ("missing", "unexpected"):
            if names := sorted(report[f"{kind}_keys"]):
                raise WeightsError(f"{pretrained_model_name_or_path}: {kind} tensor {names[0]} ({len(names)} in all)")
        return (model, report) if told else model

    def init_weights(self) -> None:
        """Nothing but the tied head: the architecture has initialised itself, or brings its weights."""
        self.tie_weights()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.get_submodule(self._name_among(_EMBEDDINGS))

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self._replace(self._name_among(_EMBEDDINGS), value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.get_submodule(self._name_among(_HEADS))

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put another head in its place."""
        self._replace(self._name_among(_HEADS), value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As transformers: more or fewer rows in embedding and head."""
        embedding: nn.Module = super().resize_token_embeddings(*args, **kwargs)
        fields = self.config.fields
        if fields["vocab_size"] != self.model.config.vocab_size:
            changed = {name: fields[name] for name in ("vocab_size", "pad_vocab_multiple") if name in fields}
            self.model.config = dataclasses.replace(self.model.config, **changed)
        return embedding

    def _name_among(self, names: tuple[str, ...]) -> str:
        modules = dict(self.model.named_modules())
        return next(name for name in names if name in modules)

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, *args: Any, every_n_layers: int = 1, **kwargs: Any
    ) -> None:
        # What transformers would checkpoint with is not taken: our models recompute each block, non-reentrant.
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers is {every_n_layers}; accepted is 1: every block is recomputed")
        self.gradient_checkpointing = enable
        self.model.set_grad_checkpointing(enable)


def wrap(model: LanguageModel, **options: Any) -> StatewiseForCausalLM:
    """A transformers model around ``model``, whose parameters are shared, not copied.

    Args:
        model: what :func:`statewise.create` and :func:`statewise.load` return.
        **options: further fields of :class:`StatewiseConfig`, e.g. ``eos_token_id=0``.

    Raises:
        ValueError: no language model of this package.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(
            f"model is {type(model).__name__}; accepted is what statewise.create and statewise.load return"
        )
    found = checkpoint_of(model)
    dtype = next(model.parameters()).dtype
    config = StatewiseConfig(architecture=found.architecture, fields=found.fields, dtype=dtype, **options)
    wrapped = StatewiseForCausalLM(config, model)
    wrapped.train(model.training)
    return wrapped


def register() -> None:
    """Tell AutoConfig and AutoModelForCausalLM about our models. Importing this module does; again is harmless."""
    AutoConfig.register(StatewiseConfig.model_type, StatewiseConfig, exist_ok=True)
    AutoModelForCausalLM.register(StatewiseConfig, StatewiseForCausalLM, exist_ok=True)


def _mask_of(mask: Tensor | None, input_ids: Tensor, *, continued: bool) -> Tensor | None:
    """What of ``input_ids`` is to be read, ``(B, T)`` bool; ``None``: everything."""
    if mask is None:
        return None
    rows, T = input_ids.shape
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < T or (mask.shape[1] > T and not continued):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; accepted is {(rows, T)}, as input_ids, or longer by what "
            "past_key_values has read"
        )
    mask = mask[:, mask.shape[1] - T :]
    keep = mask == 1
    if bool(keep.all()):
        return None
    if not bool((keep | (mask == 0)).all()):
        raise ValueError("attention_mask holds other values than 0 and 1")
    begins = keep[:, :1].int().sum(1) + (keep[:, 1:] & ~keep[:, :-1]).sum(1)
    if bool((begins > 1).any()):
        row = int(begins.argmax())
        raise ValueError(f"attention_mask has a hole in row {row}: its ones must be beside each other")
    return keep


def _packed(position_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """``cu_seqlens`` of sequences packed into one row, which positions that begin again tell; ``None``: no such."""
    if position_ids is None or not bool((position_ids[..., 1:] == 0).any()):
        return None
    if position_ids.shape != input_ids.shape or len(input_ids) != 1:
        raise ValueError(
            f"position_ids of shape {tuple(position_ids.shape)} begin again within a row; "
            f"accepted are packed sequences in one row, here (1, {input_ids.shape[1]})"
        )
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    return torch.cat([starts.new_zeros(1 if starts[0] else 0), starts, starts.new_tensor([input_ids.shape[1]])])


register()
