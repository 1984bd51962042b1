"""One run on images, written down: a dataclass, a TOML file and command-line flags with the same names.

Nothing here imports torch: ``--help`` and reading a file are cheap.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from statewise.training.config import WrittenConfig

__all__ = ["IMAGE_RESUMABLE", "ImageTrainConfig", "is_image_model"]

#: What may differ between a run and its ``resume``; everything else would make it another run.
IMAGE_RESUMABLE = (
    *("out", "data", "steps", "log_every", "save_every", "eval_every", "keep"),
    *("device", "grad_checkpointing", "resume", "tensorboard", "plot"),
)


def is_image_model(name: str) -> bool:
    """Whether ``name`` is of an architecture that reads images."""
    return name.startswith(("vrwkv", "vim"))


@dataclass(frozen=True)
class ImageTrainConfig(WrittenConfig):
    """Everything a run on images depends on. ``None`` means what suits the data set, see :meth:`resolved`."""

    model: str = "vrwkv_tiny"
    """Architecture or released size, a name of `statewise.list_models("vision")`."""
    data: str = "digits"
    """digits, an .npz, or a folder of class folders."""
    out: str = "run"
    """Directory of the run: snapshots, metrics, plots."""
    steps: int = 1000
    """Optimiser steps in all, those of earlier sittings included."""
    image_size: int | None = None
    """Pixels of a side that the model reads; images are resized to it."""
    patch_size: int | None = None
    """Pixels of a side of a patch, one token."""
    num_layers: int | None = None
    """Blocks of the model."""
    width: int | None = None
    """Channels of the model."""
    batch_size: int = 64
    """Images a step."""
    model_fields: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further fields of the model's configuration, by name."""
    learning_rate: float | None = None
    """Peak learning rate."""
    final_learning_rate: float | None = None
    """Learning rate of the last step (a constant schedule has no use for it)."""
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"
    """How the learning rate falls from peak to final, after the warm-up."""
    warmup_steps: int = 50
    """Steps of linear rise: step s of w runs at 0.01 + 0.99 s/w of the peak."""
    weight_decay: float = 0.05
    """AdamW's decay, of the parameters which the family decays."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors."""
    eps: float = 1e-8
    """AdamW's smallest denominator."""
    grad_clip: float = 5.0
    """Largest norm of the whole gradient; 0 does not clip."""
    label_smoothing: float = 0.1
    """Share of a target that goes to all classes evenly."""
    mixup: float | None = None
    """Images are blended in pairs, in a proportion drawn from Beta(x, x); 0 does not. Beside cutmix, every other batch
    on average."""
    cutmix: float = 0.0
    """A box of every image is taken from another one; its area is drawn from Beta(x, x); 0 does not."""
    crop: Literal["none", "shift", "resized"] | None = None
    """Random view: the whole image, moved by up to an eighth, or a random part resized."""
    flip: bool | None = None
    """Mirror half of the training images."""
    turn: float | None = None
    """Turn training images by up to this many degrees, and scale them by up to as many hundredths."""
    ema: float = 0.999
    """Weights that are measured and written are a moving average; this is the share that stays each step (less at
    first); 0 takes the weights themselves."""
    seed: int = 0
    """Of the initial weights, the order of the data and all that is random in a step."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the model under autocast; parameters, optimiser and loss stay float32."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    log_every: int = 10
    """Steps between records of metrics.jsonl."""
    save_every: int = 500
    """Steps between snapshots; the last step always makes one."""
    eval_every: int = 200
    """Steps between measurements on the test images; the last step always makes one; 0 makes none."""
    keep: int = 2
    """Snapshots kept."""
    tensorboard: bool = True
    """Write TensorBoard event files too."""
    plot: bool = True
    """Draw loss and accuracy as curves.png, and in the end confusion.png."""
    resume: bool = False
    """Continue the run in `out` from its newest snapshot, bit for bit."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _checked(spec.name, getattr(self, spec.name)))

    def resolved(self, side: int | None, *, mirrored: bool) -> ImageTrainConfig:
        """The same run with every ``None`` replaced.

        ``image_size``: the data's own where all images are squares of one size up to 256 pixels, else 224;
        ``patch_size``: an eighth of it, from 2 to 16. ``learning_rate``: 1e-3 at 64 images a step and in proportion to
        the square root of their number; ``final_learning_rate``: a hundredth. ``crop``: shift up to 64 pixels, else
        resized. ``flip``: where mirrored images keep their class. ``turn`` and ``mixup``: 0. Other sizes are those of
        the model's name. Of digits: 16 pixels (twice their own, so that a shift may be half a pixel), patches of 4, 4
        blocks of 96 channels, a learning rate of 3e-3, turned by up to 12 degrees, and a mixup of 0.4.

        Args:
            side: pixels of the data's images, where all are squares of one size.
            mirrored: whether a mirrored image is another of its class.
        """
        small = self.data == "digits"
        size = self.image_size or (16 if small else side if side is not None and side <= 256 else 224)
        rate = self.learning_rate or (3e-3 if small else 1e-3) * math.sqrt(self.batch_size / 64)
        return dataclasses.replace(
            self,
            image_size=size,
            patch_size=self.patch_size or (min(4, size) if small else min(max(2, round(size / 8)), 16, size)),
            num_layers=self.num_layers or (4 if small else None),
            width=self.width or (96 if small else None),
            learning_rate=rate,
            final_learning_rate=self.final_learning_rate or rate / 100,
            crop=self.crop or ("shift" if size <= 64 else "resized"),
            turn=self.turn if self.turn is not None else (12.0 if small else 0.0),
            mixup=self.mixup if self.mixup is not None else (0.4 if small else 0.0),
            flip=self.flip if self.flip is not None else mirrored,
        )


class _Kind(NamedTuple):
    accepts: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value < 2**63


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(x) and 0 <= x < 1 for x in value)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(entry, (bool, int, float, str)) for key, entry in value.items()
    )


def _one_of(*words: str) -> _Kind:
    return _Kind(lambda value: isinstance(value, str) and value in words, " or ".join(map(repr, words)))


_FROM_1 = _Kind(lambda value: _is_integer(value) and value >= 1, "an integer of 1 or more")
_FROM_0 = _Kind(lambda value: _is_integer(value) and value >= 0, "an integer of 0 or more")
_ABOVE_ZERO = _Kind(lambda value: _is_number(value) and value > 0, "a finite number above 0")
_NOT_NEGATIVE = _Kind(lambda value: _is_number(value) and value >= 0, "a finite number of 0 or more")
_SHARE = _Kind(lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
_TEXT = _Kind(lambda value: isinstance(value, str) and value != "", "text that is not empty")
_YES_NO = _Kind(lambda value: isinstance(value, bool), "true or false")
_KINDS = {
    **dict.fromkeys(("model", "data", "out", "device"), _TEXT),
    **dict.fromkeys(("steps", "image_size", "patch_size", "num_layers", "width", "batch_size"), _FROM_1),
    **dict.fromkeys(("log_every", "save_every", "keep"), _FROM_1),
    **dict.fromkeys(("warmup_steps", "eval_every", "seed"), _FROM_0),
    **dict.fromkeys(("learning_rate", "final_learning_rate", "eps"), _ABOVE_ZERO),
    **dict.fromkeys(("weight_decay", "grad_clip", "mixup", "cutmix", "turn"), _NOT_NEGATIVE),
    **dict.fromkeys(("label_smoothing", "ema"), _SHARE),
    **dict.fromkeys(("flip", "grad_checkpointing", "tensorboard", "plot", "resume"), _YES_NO),
    "schedule": _one_of("cosine", "exponential", "constant"),
    "crop": _one_of("none", "shift", "resized"),
    "dtype": _one_of("float32", "bfloat16"),
    "betas": _Kind(_is_pair, "two numbers from 0 up to but not including 1"),
    "model_fields": _Kind(_is_table, "a table of names with numbers, booleans or texts"),
}
_OPTIONAL = (
    *("image_size", "patch_size", "num_layers", "width", "learning_rate", "final_learning_rate"),
    *("crop", "flip", "turn", "mixup"),
)
_OWN_NAME = {"num_layers", "width", "image_size", "patch_size"}
_OF_DATA = {"num_classes", "in_channels"}


def _checked(name: str, value: Any) -> Any:
    """``value`` in its canonical type, or a ValueError that says what is accepted."""
    kind = _KINDS[name]
    if value is None and name in _OPTIONAL:
        return None
    if not kind.accepts(value):
        raise ValueError(f"{name} is {value!r}; accepted is {kind.words}")
    if name == "model" and not is_image_model(value):
        raise ValueError(f"model is {value!r}; a model of images (vrwkv..., vim...) is accepted")
    if name == "model_fields":
        if named := sorted(_OWN_NAME & set(value)):
            raise ValueError(f"model_fields holds {named[0]!r}, which has a name of its own: {named[0]}")
        if told := sorted(_OF_DATA & set(value)):
            raise ValueError(f"model_fields holds {told[0]!r}, which the data tell")
        return dict(value)
    if name == "betas":
        return (float(value[0]), float(value[1]))
    return float(value) if kind in (_ABOVE_ZERO, _NOT_NEGATIVE, _SHARE) else value
