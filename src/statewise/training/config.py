"""One training run, written down: a dataclass, a TOML file and command-line flags with the same names.

Nothing here imports torch: ``--help`` and reading a file are cheap.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

__all__ = ["RESUMABLE", "TrainConfig", "WrittenConfig"]

Own = TypeVar("Own", bound="WrittenConfig")

#: What may differ between a run and its ``resume``; everything else would make it another run.
RESUMABLE = (
    *("out", "data", "steps", "log_every", "save_every", "eval_every", "eval_tokens", "keep"),
    *("device", "grad_checkpointing", "resume", "tensorboard", "plot"),
)


@dataclass(frozen=True)
class WrittenConfig:
    """A configuration that files hold under the names of its fields; ``model_fields`` among them is a table."""

    @classmethod
    def from_toml(cls: type[Own], path: str | os.PathLike[str]) -> Own:
        """Read a file with the names of the fields; absent names take their defaults.

        Raises:
            ValueError: not TOML, an unknown name, or a value that is not accepted; names the file.
            FileNotFoundError: no such file.
        """
        try:
            text = Path(path).read_text("utf-8")
            return cls.from_dict(tomllib.loads(text))
        except ValueError as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def from_dict(cls: type[Own], values: dict[str, Any]) -> Own:
        """From names and values.

        Raises:
            ValueError: an unknown name, or a value that is not accepted.
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known names: {', '.join(known)}"
                raise ValueError(f"unknown name {name!r}; {hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ``None`` left out; made of what JSON and TOML can hold."""
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        values["model_fields"] = dict(values["model_fields"])
        return {name: value for name, value in values.items() if value is not None}

    def to_toml(self) -> str:
        """The text :meth:`from_toml` reads back to an equal configuration."""
        values = self.to_dict()
        table = values.pop("model_fields")
        lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
        if table:
            lines += ["", "[model_fields]", *(f"{_toml(name)} = {_toml(value)}" for name, value in table.items())]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class TrainConfig(WrittenConfig):
    """Everything a run depends on. ``None`` means the model family's official recipe, see :meth:`resolved`."""

    model: str = "rwkv7"
    """Architecture, a name of `statewise.list_models()`."""
    data: str = "stdlib"
    """A file or folder of text, or the name of a corpus: stdlib, enwik8."""
    out: str = "run"
    """Directory of the run: snapshots, metrics, plot."""
    steps: int = 1000
    """Optimiser steps in all, those of earlier sittings included."""
    num_layers: int = 4
    """Blocks of the model."""
    width: int = 256
    """Channels of the model."""
    context: int = 256
    """Tokens of a training window."""
    batch_size: int = 16
    """Windows read at a time."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    carry_state: bool = False
    """Truncated back-propagation: every row of the batch reads on where it stopped, its state carried, detached."""
    model_fields: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Further fields of the model's configuration, by name."""
    tokenizer: str = "bytes"
    """bytes, rwkv-world, or a tokenizer file."""
    split: tuple[float, float] | None = None
    """Where the text is cut: fractions that are train and valid, or the byte offsets where those end; the rest is test.
    The corpus has a customary split of its own."""
    learning_rate: float | None = None
    """Peak learning rate."""
    final_learning_rate: float | None = None
    """Learning rate of the last step (a constant schedule has no use for it)."""
    schedule: Literal["cosine", "exponential", "constant"] | None = None
    """How the learning rate falls from peak to final, after the warm-up."""
    warmup_steps: int = 10
    """Steps of linear rise: step s of w runs at 0.01 + 0.99 s/w of the peak."""
    weight_decay: float | None = None
    """AdamW's decay, of the parameters which the family decays."""
    betas: tuple[float, float] | None = None
    """AdamW's averaging factors."""
    eps: float | None = None
    """AdamW's smallest denominator."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 does not clip."""
    l2wrap: float | None = None
    """Pull on the largest logit, see `language_model_loss`."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the model under autocast; parameters, optimiser, state and loss stay float32."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    compile: bool = False
    """torch.compile every block, which takes a minute or so and a C++ compiler (on a GPU, Triton), and pays there."""
    log_every: int = 10
    """Steps between records of metrics.jsonl."""
    save_every: int = 500
    """Steps between snapshots; the last step always makes one."""
    eval_every: int = 500
    """Steps between measurements on the validation split; 0 makes none."""
    eval_tokens: int = 65536
    """Tokens of the validation split that are measured, from its start."""
    keep: int = 2
    """Snapshots kept."""
    tensorboard: bool = True
    """Write TensorBoard event files too."""
    plot: bool = True
    """Draw the curve as loss.png."""
    resume: bool = False
    """Continue the run in `out` from its newest snapshot, bit for bit."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, _checked(spec.name, getattr(self, spec.name)))

    def resolved(self) -> TrainConfig:
        """The same run with every ``None`` replaced by what the authors of the family use.

        RWKV: AdamW with betas (0.9, 0.99), eps 1e-18 (RWKV-4: 1e-8), L2Wrap 1e-4; peak learning rate by width as in
        RWKV-LM's hints, falling to a tenth along a cosine (RWKV-4: to 1e-5, exponentially); decay 0.001 (RWKV-4: none).
        Mamba: AdamW with betas (0.9, 0.95), eps 1e-8, decay 0.1, no L2Wrap; a cosine to 1e-5 from the paper's peaks,
        five times GPT-3's.

        Raises:
            ValueError: a family without a recipe here.
        """
        if self.model.startswith("rwkv"):
            peak = next(rate for limit, rate in _RWKV_RATES if self.width <= limit)
            recipe: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-18, "l2wrap": 1e-4, "weight_decay": 0.001}
            recipe |= {"learning_rate": peak, "schedule": "cosine"}
            if self.model == "rwkv4":
                recipe |= {"eps": 1e-8, "weight_decay": 0.0, "schedule": "exponential", "final_learning_rate": 1e-5}
        elif self.model.startswith("mamba"):
            peak = next(rate for limit, rate in _MAMBA_RATES if self.width <= limit)
            recipe = {"betas": (0.9, 0.95), "eps": 1e-8, "l2wrap": 0.0, "weight_decay": 0.1}
            recipe |= {"learning_rate": peak, "schedule": "cosine", "final_learning_rate": 1e-5}
        else:
            raise ValueError(f"model is {self.model!r}; a family with a recipe (rwkv..., mamba...) is accepted")
        chosen = {name: value for name, value in recipe.items() if getattr(self, name) is None}
        rate = self.learning_rate if self.learning_rate is not None else recipe["learning_rate"]
        if self.final_learning_rate is None:
            chosen["final_learning_rate"] = min(rate, recipe.get("final_learning_rate", rate / 10))
        return dataclasses.replace(self, **chosen)


# RWKV-LM's hints for L6-D512, L12-D768, L24-D1024, L24-D2048; the Mamba paper's for its 130M, 370M, 790M, 1.4B models.
_RWKV_RATES = ((512, 8e-4), (768, 6e-4), (1024, 4e-4), (math.inf, 3e-4))
_MAMBA_RATES = ((768, 3e-3), (1024, 1.5e-3), (1536, 1.25e-3), (math.inf, 1e-3))

_LEAST = {
    **dict.fromkeys(("steps", "num_layers", "width", "context", "batch_size", "accumulate"), 1),
    **dict.fromkeys(("log_every", "save_every", "eval_tokens", "keep"), 1),
    **dict.fromkeys(("warmup_steps", "eval_every", "seed"), 0),
}
_ABOVE_ZERO = ("learning_rate", "final_learning_rate", "eps")
_FROM_ZERO = ("weight_decay", "grad_clip", "l2wrap")
_CHOICES = {
    "schedule": ("cosine", "exponential", "constant"),
    "dtype": ("float32", "bfloat16"),
}
_OPTIONAL = ("learning_rate", "final_learning_rate", "schedule", "weight_decay", "betas", "eps", "l2wrap", "split")
_TEXTS = ("model", "data", "out", "tokenizer", "device")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _checked(name: str, value: Any) -> Any:
    """``value`` in its canonical type, or a ValueError that says what is accepted."""
    accepted: str
    if value is None and name in _OPTIONAL:
        return None
    if name in _LEAST:
        if isinstance(value, int) and not isinstance(value, bool) and _LEAST[name] <= value < 2**63:
            return value
        accepted = f"an integer of {_LEAST[name]} or more"
    elif name in _ABOVE_ZERO or name in _FROM_ZERO:
        if _is_number(value) and (value > 0 or (value == 0 and name in _FROM_ZERO)):
            return float(value)
        accepted = "a finite number above 0" if name in _ABOVE_ZERO else "a finite number of 0 or more"
    elif name in _CHOICES:
        if value in _CHOICES[name]:
            return value
        accepted = " or ".join(map(repr, _CHOICES[name]))
    elif name in _TEXTS:
        if isinstance(value, str) and value:
            return value
        accepted = "text that is not empty"
    elif name == "betas":
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value):
            return (float(value[0]), float(value[1]))
        accepted = "two numbers from 0 up to but not including 1"
    elif name == "split":
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(_is_number(cut) and cut >= 0 for cut in value):
            first, second = value
            if isinstance(first, float) and isinstance(second, float) and first + second <= 1:
                return (first, second)
            if int(first) == first and int(second) == second and first <= second:
                return (int(first), int(second))
        accepted = "two fractions that are together at most 1, or two byte offsets in rising order"
    elif name == "model_fields":
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            reserved = {"num_layers", "width"} & set(value)
            if reserved:
                raise ValueError(f"model_fields holds {min(reserved)!r}, which has a name of its own: {min(reserved)}")
            if all(isinstance(entry, (bool, int, float, str)) for entry in value.values()):
                return dict(value)
        accepted = "a table of names with numbers, booleans or texts"
    else:
        if isinstance(value, bool):
            return value
        accepted = "true or false"
    raise ValueError(f"{name} is {value!r}; accepted is {accepted}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
