"""The language-model evaluation harness (``lm-eval``) on models of this package, as its model ``statewise``.

Importing this module registers the name; from a shell, where nothing imports it, this module stands in for the
harness's own command::

    python -m statewise.bridges.lm_eval run --model statewise --model_args pretrained=PATH,tokenizer=bytes --tasks ...

A recurrent model has no longest input, so nothing is ever cut: contexts and documents are read in windows with the
state carried from one to the next. A context is read once however many answers are scored after it. Rows of a batch
are padded with ``lengths``, which changes nothing: scores are those of each request alone (but for rounding).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statewise.inference import generate
from statewise.models import load
from statewise.state import ModelState
from statewise.text import Tokenizer, load_tokenizer

try:
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from lm_eval.api.registry import register_model  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from lm_eval.models.utils import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        normalize_gen_kwargs,
    )
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError("this bridge needs the optional package lm-eval: `pip install 'statewise[eval]'`") from error

__all__ = ["StatewiseLM"]

_log = logging.getLogger(__name__)

# Logits of one window of a batch are held at once: this many values, 64 MiB in float32.
_LOGITS_AT_ONCE = 1 << 24
_ROWS_BY_DEFAULT = 16
_SAMPLING = ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty")

Item = TypeVar("Item")


class _Reading(NamedTuple):
    """What reading B rows gave."""

    last: Tensor  # (B, vocab) logits after each row's last token
    score: Tensor  # (B,) float64, on the CPU: sum of the targets' log likelihoods
    greedy: Tensor  # (B,) bool, on the CPU: whether each target was the likeliest
    state: ModelState  # B rows


@register_model("statewise")
class StatewiseLM(TemplateLM):
    """A model of this package, as the harness asks for one.

    Args:
        pretrained: what :func:`statewise.load` opens, or a model: its mode, train or eval, is left as it is, and
            ``dtype`` and ``device`` change it in place.
        tokenizer: what :func:`statewise.text.load_tokenizer` takes, or an object of that kind.
        dtype: of the weights, as torch names it (``"bfloat16"``); ``None`` means float32, or what a given model has.
        device: ``None`` means the CPU, or where a given model is. The harness's command asks for ``cuda:0`` where
            nobody names a device, so on a machine without CUDA any CUDA device means the CPU, with a warning.
        batch_size: rows per forward call; ``"auto"`` means 16 (memory is bounded by windows, not by rows).
        max_batch_size: the most that ``"auto"`` may choose; ``None`` means no limit.
        window: the most tokens of a row per forward call; it changes memory, not results.
        prefix_token_id: read before an empty context, and before a document whose every token is scored. 0 is the end
            of a document in the RWKV World and GPT-NeoX vocabularies.
        add_bos_token: whether every context begins with ``prefix_token_id``.
        eot_token_id: ends a generation when sampled; ``None`` means the tokenizer's ``end_id``, which may be none.
        max_gen_toks: tokens to generate at most where a task does not say.
        seed: sampling of the n-th request draws from a generator seeded with seed + n; ``None`` draws from torch's
            global one, which the harness seeds.
        fields: configuration fields that a file's tensors cannot tell, for :func:`statewise.load`.

    Raises:
        ValueError: a size or id out of range, an unknown dtype, or a tokenizer with more ids than the model has rows.
        WeightsError: as :func:`statewise.load`.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | nn.Module,
        tokenizer: str | os.PathLike[str] | Tokenizer = "bytes",
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        window: int = 512,
        prefix_token_id: int = 0,
        add_bos_token: bool = False,
        eot_token_id: int | None = None,
        max_gen_toks: int = 256,
        seed: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.batch_size = _rows(batch_size, max_batch_size)
        for name, value in (("window", window), ("max_gen_toks", max_gen_toks)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; an integer of 1 or more is accepted")
        wanted = _dtype(dtype)
        if isinstance(pretrained, nn.Module):
            if fields:
                raise ValueError(f"pretrained is a model, so {', '.join(fields)} cannot be given")
            self.model: Any = pretrained if wanted is None else pretrained.to(wanted)
        else:
            self.model = load(pretrained, dtype=wanted or torch.float32, **fields).eval()
        if device is not None:
            self.model = self.model.to(_device(device))
        self.tokenizer: Any = load_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
        rows = self.model.config.vocab_size
        if self.tokenizer.vocab_size > rows:
            raise ValueError(f"tokenizer has {self.tokenizer.vocab_size} ids, more than the model's {rows} rows")
        ends = self.tokenizer.end_id if eot_token_id is None else eot_token_id
        for name, token in (("prefix_token_id", prefix_token_id), ("eot_token_id", 0 if ends is None else ends)):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < rows:
                raise ValueError(f"{name} is {token!r}; this model's ids are 0 to {rows - 1}")
        self.window, self.max_gen_toks, self.seed = window, max_gen_toks, seed
        self._prefix, self._eot, self._add_bos = prefix_token_id, ends, add_bos_token
        self._device = next(self.model.parameters()).device

    @property
    def eot_token_id(self) -> int | None:
        """Ends a generation; ``None`` means no token does."""
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        """What is read where there is nothing before the first token to score."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Told apart by the harness's cache of requests."""
        return str(getattr(self.tokenizer, "name", type(self.tokenizer).__name__))

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        parameters = list(self.model.parameters())
        return {
            "model_architecture": type(self.model).__name__,
            "model_num_parameters": sum(parameter.numel() for parameter in parameters),
            "model_dtype": str(parameters[0].dtype),
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of ``string``; before them the prefix if ``add_special_tokens`` (``None``: as ``add_bos_token``)."""
        ids = list(self.tokenizer.encode(string))
        return [self._prefix, *ids] if (self._add_bos if add_special_tokens is None else add_special_tokens) else ids

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding gives it) for each request's two strings.

        Raises:
            ValueError: a continuation without tokens of its own.
        """
        if any(not request.args[1] for request in requests):
            raise ValueError("a continuation is empty: there is nothing to score")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=_quiet(disable_tqdm))
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (texts, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise ValueError(f"{texts!r:.200}: the tokenizer leaves no tokens to the context or the continuation")
            by_context.setdefault(tuple(context), []).append(index)
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), disable=_quiet(disable_tqdm), desc="Running loglikelihood requests") as bar:
            for contexts in _batches(sorted(by_context, key=len, reverse=True), self.batch_size):
                read = self._read(contexts)
                jobs = [(row, index) for row, context in enumerate(contexts) for index in by_context[context]]
                jobs.sort(key=lambda job: len(requests[job[1]][2]))
                for part in _batches(jobs, self.batch_size):
                    rows = [row for row, _ in part]
                    answers = [requests[index][2] for _, index in part]
                    for (_, index), result in zip(part, self._score(read, rows, answers), strict=True):
                        results[index] = result
                        if (texts := requests[index][0]) is not None:
                            self.cache_hook.add_partial("loglikelihood", texts, result)
                    bar.update(len(part))
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log p(text | prefix) of each request's string, every token of it scored with all before it, at any length."""
        documents = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        results = [0.0] * len(requests)
        order = sorted((i for i, ids in enumerate(documents) if ids), key=lambda i: -len(documents[i]))
        with tqdm(total=len(order), disable=_quiet(disable_tqdm), desc="Running rolling requests") as bar:
            for part in _batches(order, self.batch_size):
                targets = [documents[index] for index in part]
                read = self._read([[self._prefix, *ids[:-1]] for ids in targets], targets)
                for index, score in zip(part, read.score.tolist(), strict=True):
                    results[index] = score
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, score)
                bar.update(len(part))
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each request's context, up to the first stop string (not included), ``eot_token_id`` or
        ``max_gen_toks``; greedy unless ``do_sample`` or a temperature is given.

        Raises:
            ValueError: a generation option that is not known here, or out of range.
        """
        results = []
        with tqdm(total=len(requests), disable=_quiet(disable_tqdm), desc="Running generate_until requests") as bar:
            for index, request in enumerate(requests):
                context, options = request.args
                text = self._continue(context, options, None if self.seed is None else self.seed + index)
                self.cache_hook.add_partial("generate_until", request.args, text)
                results.append(text)
                bar.update(1)
        return results

    def _continue(self, context: str, options: dict[str, Any], seed: int | None) -> str:
        given = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        stops = [stop for stop in given.pop("until") if stop]
        most, sampled = given.pop("max_gen_toks"), given.pop("do_sample")
        rule = {name: given.pop(name) for name in _SAMPLING if name in given}
        if given:
            raise ValueError(
                f"generation option {next(iter(given))!r} is not known; accepted are {', '.join(_SAMPLING)}"
            )
        if not sampled:
            rule["temperature"] = 0.0
        run = generate(
            self.model,
            self.tok_encode(context) or [self._prefix],
            max_tokens=most,
            stop=() if self._eot is None else (self._eot,),
            seed=seed,
            vocab_size=self.tokenizer.vocab_size,
            suppress=self.tokenizer.unused_ids,
            **rule,
        )
        text, decoder = "", self.tokenizer.decoder()
        reach = max(map(len, stops), default=1) - 1  # how far back a stop string may have begun
        for token in run:
            seen = len(text)
            text += str(decoder.push(token))
            if any(stop in text[max(0, seen - reach) :] for stop in stops):
                break
        else:
            text += str(decoder.finish())
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    def _score(self, read: _Reading, rows: list[int], answers: list[list[int]]) -> list[tuple[float, bool]]:
        """Each answer after the context of its row."""
        first = torch.tensor([answer[0] for answer in answers], device=self._device)
        logits = read.last[torch.tensor(rows, device=self._device)]
        score = -F.cross_entropy(logits, first, reduction="none").double().cpu()
        greedy = (logits.argmax(-1) == first).cpu()
        if any(len(answer) > 1 for answer in answers):
            rest = self._read(
                [answer[:-1] for answer in answers], [answer[1:] for answer in answers], read.state.select(rows)
            )
            score, greedy = score + rest.score, greedy & rest.greedy
        return list(zip(score.tolist(), greedy.tolist(), strict=True))

    @torch.no_grad()
    def _read(
        self,
        rows: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]] | None = None,
        state: ModelState | None = None,
    ) -> _Reading:
        """Read ``rows`` from ``state`` in windows.

        Args:
            rows: token ids; a row may be empty, not all.
            targets: for every token of every row the one that should follow; ``None`` scores nothing.
            state: a row for each of ``rows``; ``None`` is the start.
        """
        count, vocab = len(rows), self.model.config.vocab_size
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        tokens, wanted = torch.zeros(2, count, longest, dtype=torch.int64)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            if targets is not None:
                wanted[index, : len(row)] = torch.tensor(targets[index], dtype=torch.int64)
        score, greedy = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.bool)
        last = torch.zeros(0)
        size = max(1, min(self.window, _LOGITS_AT_ONCE // (count * vocab)))
        for start in range(0, longest, size):
            piece = tokens[:, start : start + size]
            here = (lengths - start).clamp(0, piece.shape[1])
            ragged = {} if bool((here == piece.shape[1]).all()) else {"lengths": here.to(self._device)}
            logits, state = self.model(piece.to(self._device), state, **ragged)
            if logits.dtype != torch.float64:
                logits = logits.float()
            if not last.numel():
                last = logits.new_zeros(count, vocab)
            ends = ((here > 0) & (lengths <= start + piece.shape[1])).nonzero()[:, 0]
            at = (here[ends] - 1).to(self._device)
            last[ends.to(self._device)] = logits[ends.to(self._device), at]
            if targets is not None:
                valid = torch.arange(piece.shape[1]) < here[:, None]
                scored, goal = logits[valid.to(self._device)], wanted[:, start : start + size][valid].to(self._device)
                owner = valid.nonzero()[:, 0]
                score.index_add_(0, owner, -F.cross_entropy(scored, goal, reduction="none").double().cpu())
                greedy[owner[(scored.argmax(-1) != goal).cpu()]] = False
        assert state is not None
        return _Reading(last, score, greedy, state)


def _quiet(disabled: bool) -> bool:
    """Whether to draw no progress bar: nobody watches where there is no terminal."""
    return disabled or not sys.stderr.isatty()


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _rows(batch_size: int | str, most: int | None) -> int:
    if isinstance(batch_size, str) and batch_size.partition(":")[0] == "auto":
        return _ROWS_BY_DEFAULT if most is None else min(_ROWS_BY_DEFAULT, int(most))
    try:
        rows = int(batch_size)
    except ValueError:
        rows = 0
    if rows < 1 or isinstance(batch_size, bool):
        raise ValueError(f"batch_size is {batch_size!r}; an integer of 1 or more, or 'auto', is accepted")
    return rows


def _device(name: str | torch.device) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        _log.warning("device %s: torch finds no CUDA here, so the CPU is used", device)
        return torch.device("cpu")
    return device


def _dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    if found is None and name is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {name!r}; names of floating-point dtypes are accepted, such as 'float32'")
    return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found, import-untyped, unused-ignore]

    cli_evaluate()
