"""From what the user typed to a model: checkpoint files, run folders, devices and dtypes. Imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from statewise.errors import WeightsError
from statewise.models import create, load
from statewise.text import load_tokenizer
from statewise.training.config import TrainConfig
from statewise.training.snapshot import latest_snapshot, verify_snapshot
from statewise.weights import Checkpoint, read
from statewise.weights.hub import is_address, local_path
from statewise.weights.progress import reading

if TYPE_CHECKING:
    from statewise.models import LanguageModel
    from statewise.text import Tokenizer

__all__ = ["DTYPES", "Opened", "Survey", "find_device", "locate", "open_model", "survey", "tokenizer_for"]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def find_device(name: str) -> torch.device:
    """The device called ``name``, if this machine has it.

    Raises:
        ValueError: no such kind of device, or none here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def locate(path: str | Path) -> Path:
    """The checkpoint meant by ``path``: of a run's folder, its newest snapshot (checked against its manifest); of an
    ``hf://`` address, what was fetched from there.

    Raises:
        ValueError: the folder of a run that has no snapshot yet; a wrong address.
        WeightsError: nothing to be had from the address.
        SnapshotError: the snapshot is damaged.
        FileNotFoundError: nothing is there.
    """
    place = local_path(path)
    if is_address(path):
        return place
    if not place.exists():
        raise FileNotFoundError(f"no checkpoint at {place}")
    newest = latest_snapshot(place)
    if newest is not None:
        verify_snapshot(newest)
        return newest
    if (place / "config.toml").is_file():
        raise ValueError(f"{place} is the folder of a run that has no snapshot yet")
    return place


class Opened(NamedTuple):
    """A model, and what the run it comes from was told (``None``: it comes from no run)."""

    model: LanguageModel
    run: TrainConfig | None
    path: Path


def open_model(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> Opened:
    """Load the checkpoint at ``path``, or a run's newest snapshot, ready to be read from.

    Raises:
        ValueError, WeightsError, SnapshotError, FileNotFoundError: as :func:`locate` and ``statewise.load``.
    """
    place = locate(path)
    model: Any = load(place, dtype=dtype).to(device).eval()
    if not hasattr(model.config, "vocab_size"):
        raise ValueError(f"{place} holds a model of images; what is asked for needs one of text")
    written = place.parent.parent / "config.toml"
    of_run = place.parent.name == "snapshots" and written.is_file()
    return Opened(model, TrainConfig.from_toml(written) if of_run else None, place)


def tokenizer_for(opened: Opened, name: str | None) -> Tokenizer:
    """The tokenizer called ``name``; without a name the run's, or the one the vocabulary's size points to.

    Raises:
        ValueError: no such tokenizer, one with more ids than the model, or none to be guessed.
    """
    size = opened.model.config.vocab_size
    if name is None:
        if opened.run is not None:
            name = opened.run.tokenizer
        elif size == 256:
            name = "bytes"
        elif size == 65536:
            name = "rwkv-world"
        else:
            raise ValueError(f"nothing tells which tokenizer this model of {size} ids reads: give --tokenizer")
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > size:
        # Refused whole, although a prompt might use low ids alone: it would be read as other words, and no one told.
        raise ValueError(
            f"tokenizer {name} has {tokenizer.vocab_size} ids, this model only {size}: not the one it was trained with"
        )
    return tokenizer


class Survey(NamedTuple):
    """A checkpoint held against the model it claims to be."""

    checkpoint: Checkpoint
    model: LanguageModel  # on the meta device: sizes and configuration, no values
    missing: list[str]
    extra: list[str]
    misshaped: dict[str, tuple[int, ...]]  # name → the shape the model has


def survey(path: Path) -> Survey:
    """Open a checkpoint and compare its tensors with those of its architecture.

    Raises:
        WeightsError: unreadable, of no known architecture, or of impossible sizes.
        FileNotFoundError: nothing is there.
    """
    with reading(path, None):
        found = read(path)
    try:
        with torch.device("meta"):
            model = create(found.architecture, **found.fields)
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    expected = model.state_dict()
    return Survey(
        found._replace(fields=dataclasses.asdict(model.config)),
        model,
        [name for name in expected if name not in found.tensors],
        [name for name in found.tensors if name not in expected],
        {
            name: tuple(expected[name].shape)
            for name, tensor in found.tensors.items()
            if name in expected and expected[name].shape != tensor.shape
        },
    )
