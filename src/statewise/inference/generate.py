"""Text one token at a time: a fixed-size state is carried, so the memory of a run does not grow with its length."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from statewise.inference.sampling import SamplingRule, choose_token
from statewise.inference.step_graph import StepGraph, capture_on_device
from statewise.state import ModelState

__all__ = ["Generation", "LanguageModel", "fit_state", "generate", "read_tokens"]

# Logits of one chunk of the prompt are held at once: this many values, 64 MiB in float32.
_LOGITS_AT_ONCE = 1 << 24
_LONGEST_CHUNK = 1024
# Capturing a step takes the time of several: a shorter run is over sooner without.
_WORTH_A_GRAPH = 32


class LanguageModel(Protocol):
    """What every causal model here offers: forward, one step, a fresh state, and its sizes."""

    @property
    def config(self) -> Any:
        """A frozen dataclass with ``vocab_size``, the rows of the embedding."""
        ...

    def __call__(self, tokens: Tensor, state: ModelState | None = None, **ragged: Tensor) -> tuple[Tensor, ModelState]:
        """``(B, T)`` ids → logits ``(B, T, vocab)`` and the state after them."""
        ...

    def step(self, token: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """``(B,)`` ids → logits ``(B, vocab)`` and the state after them."""
        ...

    def init_state(self, batch_size: int) -> ModelState:
        """The documented start."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """As in ``torch.nn.Module``."""
        ...


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int] | Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    stop: Iterable[int] = (),
    seed: int | None = None,
    state: ModelState | None = None,
    vocab_size: int | None = None,
    suppress: Iterable[int] = (),
    cuda_graph: bool | None = None,
) -> Generation:
    """Continue ``prompt_ids`` token by token.

    Args:
        model: any causal model of this package; its mode (``train``/``eval``) is left as it is.
        prompt_ids: at least one token id (a list or 1-D integer tensor), read when this function is called.
        max_tokens: how many tokens to yield at most; 0 only reads the prompt.
        temperature, top_p, top_k, presence_penalty, frequency_penalty: see
            :class:`~statewise.inference.sampling.SamplingRule`. The penalties count sampled tokens, not the prompt.
        stop: token ids that end the run; the one that did is the last sampled, and is not yielded. (To stop at a
            string, leave the loop: nothing is computed ahead of what was asked for.)
        seed: draws come from a generator of this run's own; ``None`` draws from torch's global generator.
        state: what was read before the prompt (one row; moved to the model's device and dtypes); ``None`` is the
            start. Never changed.
        vocab_size: ids from here on are never sampled, by any rule: a tokenizer may have fewer ids than the model has
            rows. ``None`` leaves all rows to choose from, as does a number above theirs.
        suppress: ids that are never sampled, such as a tokenizer's ``unused_ids``; those the model has not are passed
            over. What is masked in either way stays allowed in the prompt.
        cuda_graph: whether steps are replayed from a :class:`~statewise.inference.step_graph.StepGraph`, which gives
            what they give without, in less time. ``None``: on a CUDA device, from 32 tokens on, and a step that cannot
            be captured is warned of and run without. ``True``: always, or an error.

    Returns:
        An iterator of ids. Its ``.state`` has at any time read everything given and sampled but the last token,
        which is ``.pending``; so the way on is ``generate(model, [run.pending, *more], state=run.state, ...)``.

    Raises:
        ValueError: an empty prompt, an id outside the model's vocabulary, a state of other sizes, a sampling value
            out of range, no id left to choose, logits that hold NaN, or ``cuda_graph=True`` off a CUDA device.
        RuntimeError: ``cuda_graph=True``, and the model's step cannot be captured.
    """
    return Generation(
        model,
        prompt_ids,
        max_tokens=max_tokens,
        rule=SamplingRule(presence_penalty, frequency_penalty, temperature, top_k, top_p),
        stop=stop,
        seed=seed,
        state=state,
        vocab_size=vocab_size,
        suppress=suppress,
        cuda_graph=cuda_graph,
    )


class Generation(Iterator[int]):
    """A run of :func:`generate`: an iterator of token ids with ``.state`` and ``.pending``."""

    # A class, not a generator function: `torch.no_grad` around a `yield` would stay switched on in the caller's code
    # between two tokens.
    def __init__(
        self,
        model: LanguageModel,
        prompt_ids: Sequence[int] | Tensor,
        *,
        max_tokens: int,
        rule: SamplingRule,
        stop: Iterable[int],
        seed: int | None,
        state: ModelState | None,
        vocab_size: int | None,
        suppress: Iterable[int],
        cuda_graph: bool | None,
    ) -> None:
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
            raise ValueError(f"max_tokens is {max_tokens!r}; an integer of 0 or more is accepted")
        if vocab_size is not None and (type(vocab_size) is not int or vocab_size < 1):
            raise ValueError(f"vocab_size is {vocab_size!r}; None or an integer of 1 or more is accepted")
        self._stop = _token_ids(stop, "stop")
        masked = _token_ids(suppress, "suppress")
        prompt = _prompt_tensor(prompt_ids, model.config.vocab_size)
        self._model = model
        self._rule = rule
        self._left = max_tokens
        self._pending: int | None = None
        self._unread = False
        self._generator = None if seed is None else torch.Generator().manual_seed(_checked_seed(seed))
        device = next(model.parameters()).device
        if cuda_graph and not _has_graphs(device):
            raise ValueError(f"cuda_graph is True, and the model lies on {device}; None and False are accepted there")
        self._graph: StepGraph | None = None
        self._graph_is_asked_for = cuda_graph is True
        enough = self._graph_is_asked_for or max_tokens >= _WORTH_A_GRAPH
        self._wants_graph = cuda_graph is not False and enough and _has_graphs(device)
        self._logits, self._state = read_tokens(model, prompt.to(device), state)
        self._masked = _mask(self._logits, vocab_size, masked)
        self._counts = torch.zeros(self._logits.shape[0], dtype=torch.int64) if rule.counts_tokens else None

    @property
    def state(self) -> ModelState:
        """Has read everything given and sampled but the last token; one row. No graph hangs on it."""
        return self._state if self._graph is None else self._graph.state

    @property
    def pending(self) -> int | None:
        """The last token sampled (the stop token, when one ended the run), which ``state`` has not read; ``None``
        before the first."""
        return self._pending

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> int:
        if self._left == 0:
            raise StopIteration
        if self._unread:
            self._logits = self._read(torch.tensor([self._pending]))
            self._unread = False
        logits = self._logits
        if self._masked is not None:
            logits = logits.masked_fill(self._masked, float("-inf"))
        chosen = choose_token(logits, self._rule, counts=self._counts, generator=self._generator)
        self._pending, self._unread = chosen, True
        if chosen in self._stop:
            self._left = 0
            raise StopIteration
        if self._counts is not None:
            self._counts[chosen] += 1
        self._left -= 1
        return chosen

    def _read(self, token: Tensor) -> Tensor:
        """Take one more token into the state; its logits ``(vocab,)``."""
        if self._wants_graph:
            self._wants_graph = False
            try:
                self._graph = StepGraph(self._model, self._state, capture=capture_on_device)
            except RuntimeError as error:
                if self._graph_is_asked_for:
                    raise
                warnings.warn(
                    f"the step of this {type(self._model).__name__} runs kernel by kernel: it cannot be captured as a "
                    f"CUDA graph ({str(error).splitlines()[0]}); cuda_graph=False says so beforehand",
                    stacklevel=3,
                )
        if self._graph is not None:
            return self._graph.step(token)[0]
        with torch.no_grad():
            logits, self._state = self._model.step(token.to(self._logits.device), self._state)
        return logits[0]


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def read_tokens(model: LanguageModel, tokens: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
    """Read ``tokens`` (``(T,)``, at least one) in chunks, carrying the state, without a graph.

    Returns:
        The logits after the last token, ``(vocab,)``, and the state. The memory held does not grow with T.
    """
    if tokens.numel() == 0:
        raise ValueError("there are no tokens to read; at least one is needed")
    carried = model.init_state(1) if state is None else fit_state(model, state)
    length = max(1, min(_LONGEST_CHUNK, _LOGITS_AT_ONCE // model.config.vocab_size))
    logits = torch.empty(0)
    with torch.no_grad():
        for chunk in torch.split(tokens[None], length, dim=1):
            logits, carried = model(chunk, carried)
    return logits[0, -1].clone(), carried  # a copy: a view would keep the whole chunk's logits alive


def fit_state(model: LanguageModel, state: ModelState) -> ModelState:
    """``state`` on the model's device and in the dtypes of its own states.

    Raises:
        ValueError: ``state`` is not one row of this model's family and sizes.
    """
    own = model.init_state(1)
    want, spec = pytree.tree_flatten(own)
    given, given_spec = pytree.tree_flatten(state)
    if spec != given_spec:
        raise ValueError(f"state is {_describe(state)}; this model's is {_describe(own)}")
    for index, (leaf, expected) in enumerate(zip(given, want, strict=True)):
        if not isinstance(leaf, Tensor) or leaf.shape != expected.shape:
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"state tensor {index} has shape {shape}; this model needs {tuple(expected.shape)}")
    moved = [
        leaf.detach().to(device=expected.device, dtype=expected.dtype)
        for leaf, expected in zip(given, want, strict=True)
    ]
    fitted: ModelState = pytree.tree_unflatten(moved, spec)
    return fitted


def _describe(state: Any) -> str:
    if not isinstance(state, ModelState) or not state.layers:
        return f"a {type(state).__name__}"
    return f"{state.family} with {len(state.layers)} layers"


def _prompt_tensor(prompt_ids: Sequence[int] | Tensor, vocab_size: int) -> Tensor:
    if isinstance(prompt_ids, str):
        raise ValueError("prompt_ids is a str; token ids are accepted (a tokenizer's `encode` gives them)")
    try:
        ids = torch.as_tensor(prompt_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"prompt_ids is no list of integers: {error}") from error
    if ids.dim() != 1:
        raise ValueError(f"prompt_ids has shape {tuple(ids.shape)}; one row of ids is accepted")
    if ids.numel() == 0:
        raise ValueError("the prompt has no tokens; at least one is needed")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"prompt_ids has dtype {ids.dtype}; integers are accepted")
    ids = ids.long()
    for outside in (int(ids.min()), int(ids.max())):
        if not 0 <= outside < vocab_size:
            raise ValueError(f"prompt_ids holds {outside}; this model's ids are 0 to {vocab_size - 1}")
    return ids


def _token_ids(given: Iterable[int], name: str) -> frozenset[int]:
    ids = frozenset(given)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"{name} is {sorted(map(repr, ids))}; token ids (integers) are accepted")
    return ids


def _mask(logits: Tensor, vocab_size: int | None, suppressed: frozenset[int]) -> Tensor | None:
    """True where a token may not be chosen, ``(vocab,)``; ``None`` when all may."""
    rows = logits.shape[0]
    ids = [token for token in suppressed if 0 <= token < rows]
    if not ids and (vocab_size is None or vocab_size >= rows):
        return None
    mask = torch.arange(rows, device=logits.device) >= (rows if vocab_size is None else vocab_size)
    mask[ids] = True
    if mask.all():
        raise ValueError(f"vocab_size and suppress leave none of the model's {rows} ids to choose from")
    return mask


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed!r}; None or an integer from 0 to 2**63 - 1 is accepted")
    return seed
