"""Tokenizers, corpora, and the yardsticks a language model's bits per byte are read beside.

Nothing here imports torch; names are resolved on first use, so ``import statewise.text`` does not import numpy either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Corpus": "corpora",
    "Decoder": "tokenizers",
    "Tokenizer": "tokenizers",
    "compressor_bits_per_byte": "yardsticks",
    "decode_text": "corpora",
    "load_corpus": "corpora",
    "load_tokenizer": "tokenizers",
    "order_entropy": "yardsticks",
}

__all__ = [
    "Corpus",
    "Decoder",
    "Tokenizer",
    "compressor_bits_per_byte",
    "decode_text",
    "load_corpus",
    "load_tokenizer",
    "order_entropy",
]

if TYPE_CHECKING:
    from statewise.text.corpora import Corpus, decode_text, load_corpus
    from statewise.text.tokenizers import Decoder, Tokenizer, load_tokenizer
    from statewise.text.yardsticks import compressor_bits_per_byte, order_entropy


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'statewise.text' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"statewise.text.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
