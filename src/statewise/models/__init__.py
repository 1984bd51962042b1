"""Models by name: create one from its configuration, load one from a published file, save it in any of its formats."""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

import torch

from statewise.errors import WeightsError
from statewise.models.vision import PRESETS
from statewise.weights import Checkpoint, read, write
from statewise.weights.hub import local_path
from statewise.weights.progress import Progress, reading

if TYPE_CHECKING:
    from statewise.models.mamba import Mamba
    from statewise.models.mamba2 import Mamba2
    from statewise.models.mamba3 import Mamba3
    from statewise.models.rwkv4 import RWKV4
    from statewise.models.rwkv5 import RWKV5
    from statewise.models.rwkv6 import RWKV6
    from statewise.models.rwkv7 import RWKV7
    from statewise.models.vision.vision_mamba import VisionMamba
    from statewise.models.vision.vision_rwkv import VisionRWKV
    from statewise.models.vision.vision_rwkv6 import VisionRWKV6

    LanguageModel: TypeAlias = RWKV4 | RWKV5 | RWKV6 | RWKV7 | Mamba | Mamba2 | Mamba3
    VisionModel: TypeAlias = VisionRWKV | VisionRWKV6 | VisionMamba
    Model: TypeAlias = LanguageModel | VisionModel
    VisionName: TypeAlias = Literal[
        "vrwkv",
        "vrwkv_tiny",
        "vrwkv_small",
        "vrwkv_base",
        "vrwkv_large",
        "vrwkv6",
        "vrwkv6_tiny",
        "vrwkv6_small",
        "vrwkv6_base",
        "vim",
        "vim_tiny",
        "vim_small",
        "vim_base",
    ]

__all__ = ["create", "list_models", "load", "save"]


class _Home(NamedTuple):
    module: str
    config: str
    model: str


_MODELS = {
    "mamba": _Home("mamba", "MambaConfig", "Mamba"),
    "mamba2": _Home("mamba2", "Mamba2Config", "Mamba2"),
    "mamba3": _Home("mamba3", "Mamba3Config", "Mamba3"),
    "rwkv4": _Home("rwkv4", "RWKV4Config", "RWKV4"),
    "rwkv5": _Home("rwkv5", "RWKV5Config", "RWKV5"),
    "rwkv6": _Home("rwkv6", "RWKV6Config", "RWKV6"),
    "rwkv7": _Home("rwkv7", "RWKV7Config", "RWKV7"),
}
_MANY_BLOCKS = 100  # more than any published model has

# Of images; those that are listed are sizes of these.
_VISION = {
    "vrwkv": _Home("vision.vision_rwkv", "VisionRWKVConfig", "VisionRWKV"),
    "vrwkv6": _Home("vision.vision_rwkv6", "VisionRWKV6Config", "VisionRWKV6"),
    "vim": _Home("vision.vision_mamba", "VisionMambaConfig", "VisionMamba"),
}


def list_models(task: Literal["language", "vision"] | None = None) -> list[str]:
    """The names :func:`create` knows: architectures of language models, and released sizes of models of images.

    Args:
        task: the language models alone, or the models of images; ``None`` means all.

    Raises:
        ValueError: another task.
    """
    if task not in (None, "language", "vision"):
        raise ValueError(f"task is {task!r}; accepted are 'language', 'vision' and None")
    return sorted([*(_MODELS if task != "vision" else ()), *(PRESETS if task != "language" else ())])


@overload
def create(name: VisionName, **fields: Any) -> VisionModel: ...
@overload
def create(name: str, **fields: Any) -> LanguageModel: ...
def create(name: str, **fields: Any) -> Model:
    """A model with its authors' initialisation, seeded by torch's global generator.

    Args:
        name: one of :func:`list_models`, or ``"vrwkv"``, ``"vrwkv6"`` or ``"vim"``, whose sizes are then all given.
            (Type checkers take a name that is no literal for a language model's.)
        **fields: fields of its configuration, e.g. ``vocab_size=256, num_layers=4, width=256``; those of a released
            size that are given take the place of its own, e.g. ``create("vrwkv_tiny", num_classes=10)``.

    Raises:
        ValueError: an unknown name, or a field that is unknown, missing or out of range.
    """
    asked = name
    if name in PRESETS:
        name, sizes = PRESETS[name]
        fields = sizes | fields
    home = _MODELS.get(name) or _VISION.get(name)
    if home is None:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(list_models())}")
    module = importlib.import_module(f"statewise.models.{home.module}")
    kind = getattr(module, home.config)
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{asked} has no field {unknown[0]!r}; its fields: {', '.join(known)}")
    required = [
        field.name
        for field in known.values()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if absent := [field for field in required if field not in fields]:
        raise ValueError(f"{asked} needs {', '.join(absent)}")
    model: Model = getattr(module, home.model)(kind(**fields))
    return model


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    progress: bool | Progress | None = None,
    mapped: bool = False,
    **fields: Any,
) -> Model:
    """Open a published checkpoint or one of our own; architecture and sizes are found from the contents.

    Args:
        path: a ``.pth``, ``.bin``, ``.safetensors`` or ``.gguf`` file, or a directory with ``config.json``; or, as a
            string, ``hf://owner/name[@revision][/file]``: fetched from the Hugging Face hub into its client's cache
            (see ``statewise.weights.hub`` for what is fetched; needs the optional package ``huggingface_hub``). A local
            path never touches the network.
        dtype: what parameters are cast to, before anything is computed from them.
        progress: ``True`` shows on standard error how much has been read, ``False`` shows nothing, and ``None`` shows
            it for more than 1 GiB on a terminal. A callable is called as ``progress(done, total)``, in bytes of the
            checkpoint's files, from 0 to all of them. (A download shows the client's own bars.)
        mapped: whether tensors that the file holds in ``dtype`` stay in its own pages: read when they are first used,
            shared with other processes that map the file, and copied where training writes to them. The file is never
            written to; who cuts it short while the model lives takes the process down. Not for ``.gguf``.
        **fields: configuration fields that tensors cannot tell; they win over the file's own configuration text. Of a
            model of images, another ``image_size`` than the file's resizes the position embedding, another
            ``num_classes`` puts a fresh classifier in the place of the file's (0: none).

    Raises:
        WeightsError: unreadable, unknown, or a missing, extra or mis-shaped tensor, which is named; a repository that
            is not there or cannot be reached.
        ValueError: a dtype that is no floating point, or an address of another form or without its client.
        FileNotFoundError: nothing is there.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}; accepted are floating-point dtypes")
    name = os.fspath(path)
    source = local_path(path)
    with reading(source, progress):
        found = read(source, dtype=dtype, mapped=mapped, **fields)
    try:
        # Every value is about to be replaced: the meta device spares the random initialisation and its memory.
        with torch.device("meta"):
            if absent := _absent_in_later_blocks(found):
                raise WeightsError(f"{name}: tensor {absent} is missing")
            model: Model = create(found.architecture, **found.fields)
    except ValueError as error:
        raise WeightsError(f"{name}: {error}") from error
    expected = model.state_dict()
    if missing := [key for key in expected if key not in found.tensors]:
        raise WeightsError(f"{name}: tensor {missing[0]} is missing ({len(missing)} in all)")
    if extra := [key for key in found.tensors if key not in expected]:
        raise WeightsError(f"{name}: unknown tensor {extra[0]} ({len(extra)} in all)")
    for key, tensor in found.tensors.items():
        if tensor.shape != expected[key].shape:
            raise WeightsError(
                f"{name}: tensor {key} has shape {tuple(tensor.shape)}, this {found.architecture} "
                f"expects {tuple(expected[key].shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise WeightsError(f"{name}: tensor {key} has dtype {tensor.dtype}; weights are floating point")
    # What was not cast while it was read is now, one at a time, and let go: memory holds the checkpoint once.
    tensors = {}
    for key in list(found.tensors):
        tensors[key] = found.tensors.pop(key).to(dtype).contiguous()
    model.load_state_dict(tensors, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if found.architecture in _VISION:
        _fit(model, fields)
    return model


def _absent_in_later_blocks(found: Checkpoint) -> str | None:
    """A tensor that the second block has and a later one lacks: a small file may name thousands of blocks, and to build
    one takes milliseconds."""
    count = found.fields.get("num_layers")
    if not isinstance(count, int) or count < _MANY_BLOCKS:
        return None
    two = create(found.architecture, **{**found.fields, "num_layers": 2}).state_dict()
    for name in two:
        before, second, after = name.partition(".1.")
        if second and before.count(".") <= 1:
            for index in range(2, count):
                if (later := f"{before}.{index}.{after}") not in found.tensors:
                    return later
    return None


def _fit(model: Any, given: dict[str, Any]) -> None:
    """Make a model of images, as its file has it, one for the size of image and the classes that were given."""
    if "image_size" in given:
        model.set_input_size(given["image_size"])
    if given.get("num_classes", model.num_classes) != model.num_classes:
        model.reset_classifier(given["num_classes"])


def save(model: Model, path: str | os.PathLike[str], format: str = "statewise") -> None:
    """Write a model; see :func:`statewise.weights.write` for the formats. Dtypes are kept.

    Raises:
        ValueError: an unknown format, or one that cannot hold this architecture.
    """
    write(path, checkpoint_of(model), format)


def checkpoint_of(model: Model) -> Checkpoint:
    """A model as names, fields and tensors (which share the model's memory)."""
    config = model.config
    for name, home in (_MODELS | _VISION).items():
        if type(config).__name__ == home.config:
            return Checkpoint(name, dataclasses.asdict(config), dict(model.state_dict()), "statewise")
    raise ValueError(f"model of type {type(model).__name__} is none of {', '.join(list_models())}")
