"""Published checkpoints: files in, names and sizes found from the contents, tensors out, and the way back.

Nothing here knows a module: :func:`read` returns our own names, fields and tensors, which ``statewise.models`` builds
from. A checkpoint never executes code, and whatever is wrong with one is a :class:`~statewise.errors.WeightsError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statewise.errors import WeightsError
from statewise.files import atomic_write
from statewise.weights import files, fla, gguf, gguf_models, mamba, mamba2, mamba3, rwkv, rwkv_hf, vision, vision_mamba

__all__ = ["FORMATS", "Checkpoint", "read", "write"]

#: What :func:`write` can make. "rwkv" is one ``.pth`` file, "gguf" one ``.gguf``, the others are directories.
FORMATS = ("statewise", "rwkv", "fla", "mamba-ssm", "hf", "mamba.py", "gguf")

_MAMBAS = {"mamba": mamba, "mamba2": mamba2, "mamba3": mamba3}
_PICKLED = {"mamba-ssm": "pytorch_model.bin", "mamba.py": "model.pt"}  # the others' directories hold safetensors
_MAMBA_LAYOUT = {"mamba-ssm": "state-spaces", "hf": "transformers", "mamba.py": "mamba.py"}
_OF_IMAGES = (*vision.FAMILIES, "vim")


class Checkpoint(NamedTuple):
    """What a file holds, in our terms.

    ``architecture``: a name :func:`statewise.create` knows. ``fields``: arguments of its configuration that the
    contents decide. ``tensors``: our parameter names → tensors in the file's own dtype. ``layout``: whose naming it
    was.
    """

    architecture: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    layout: str


def read(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, mapped: bool = False, **fields: Any
) -> Checkpoint:
    """Open a checkpoint without being told what it is.

    Args:
        path: a ``.pth``/``.pt``/``.bin``, ``.safetensors`` or ``.gguf`` file, or a directory holding one of the former,
            or several and their index, beside ``config.json``.
        dtype: what tensors of floating point are cast to as they are read, so that memory never holds them twice;
            ``None`` leaves them as they are (and so are those of a ``.gguf``, of which ours are computed).
        mapped: whether tensors that are not cast lie in the file's own pages, see :func:`statewise.load`.
        **fields: what the file cannot tell; these win over what configuration text in the file says. Of a model of
            images, ``image_size`` and ``num_classes`` are returned as the file's own: :func:`statewise.load` makes
            another size or classifier of them.

    Raises:
        WeightsError: unreadable, of no known architecture, or contradicting itself; names the file and the tensor.
        FileNotFoundError: nothing is there.
    """
    source = Path(path)
    config: dict[str, Any] | None = None
    sources = [source]
    if source.is_dir():
        config, sources = files.open_directory(source)
    elif not source.exists():
        raise FileNotFoundError(f"no checkpoint at {source}")
    elif gguf.detect(source):
        return _read_gguf(source, fields)
    tensors: dict[str, Tensor] = {}
    for part in sources:
        found_here = files.read_tensors(part, dtype, mapped=mapped)
        if twice := sorted(set(found_here) & set(tensors)):
            raise WeightsError(f"{part}: tensor {twice[0]} is in another file of this checkpoint, too")
        tensors |= found_here
    try:
        found = _recognise(config, tensors, sources, fields)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error
    if found.architecture in _OF_IMAGES:
        fields = {name: value for name, value in fields.items() if name not in ("image_size", "num_classes")}
    return found._replace(fields={**found.fields, **fields})


def _read_gguf(source: Path, given: dict[str, Any]) -> Checkpoint:
    metadata, tensors = gguf.read_gguf(source)
    try:
        architecture, fields, renamed = gguf_models.to_ours(metadata, tensors)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error
    return Checkpoint(architecture, fields | given, renamed, "gguf")


def _recognise(
    config: dict[str, Any] | None, tensors: dict[str, Tensor], sources: list[Path], given: dict[str, Any]
) -> Checkpoint:
    if config is not None and "architecture" in config:  # our own directory
        architecture, own = config["architecture"], config.get("config")
        if not isinstance(architecture, str) or not isinstance(own, dict):
            raise ValueError("config.json names no architecture and configuration of ours")
        return Checkpoint(architecture, dict(own), tensors, "statewise")
    names = set(tensors)
    for name, family in _MAMBAS.items():
        if (layout := family.detect(config, names)) is not None:
            fields, renamed = family.to_ours(layout, config or {}, tensors)
            return Checkpoint(name, fields, renamed, layout)
    if (seen := vision.detect(names)) is not None:
        options = vision.options_of(config, files.read_config(sources[0]))
        fields, renamed = vision.to_ours(seen, options, tensors, given)
        return Checkpoint(seen, fields, renamed, "vision-rwkv")
    if vision_mamba.detect(names):
        fields, renamed = vision_mamba.to_ours(tensors, given)
        return Checkpoint("vim", fields, renamed, "vision-mamba")
    if fla.detect(names):
        fields, renamed = fla.to_ours(config or {}, tensors)
        return Checkpoint("rwkv7", fields, renamed, "fla")
    if rwkv_hf.detect(names):
        fields, renamed = rwkv_hf.to_ours(config or {}, tensors)
        return Checkpoint("rwkv4", fields, renamed, "transformers")
    architecture = rwkv.detect(names, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    if architecture is None:
        few = ", ".join(sorted(names)[:3])
        raise ValueError(f"the tensor names (first: {few}) belong to no architecture this release knows")
    fields, renamed = rwkv.to_ours(architecture, tensors)
    return Checkpoint(architecture, fields, renamed, "rwkv")


def write(path: str | os.PathLike[str], checkpoint: Checkpoint, format: str = "statewise") -> None:
    """Write a checkpoint; dtypes are kept, every file appears whole or not at all.

    Args:
        path: the file ("rwkv", "gguf") or the directory (made if missing) to write.
        checkpoint: in our terms, with every field of its configuration, as a model has it (``read`` gives those that
            the file tells); its ``layout`` does not matter.
        format: one of :data:`FORMATS`.

    Raises:
        ValueError: an unknown format, or one that cannot hold this architecture; a field that is not there.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; accepted are {', '.join(map(repr, FORMATS))}")
    architecture, target = checkpoint.architecture, Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    layout = _MAMBA_LAYOUT.get(format, "")
    held = {
        "statewise": True,
        "rwkv": architecture.startswith("rwkv"),
        "fla": architecture == "rwkv7",
        "hf": architecture == "rwkv4",
        "gguf": architecture in gguf_models.ARCHITECTURES,
    }.get(format, False)
    if not held and not (architecture in _MAMBAS and layout in _MAMBAS[architecture].LAYOUTS):
        raise ValueError(f"format {format!r} cannot hold a {architecture} model")
    fields = _Whole(checkpoint.fields)
    if format in ("rwkv", "gguf") and target.is_dir():
        raise ValueError(f"format {format!r} is a file, but {target} is a directory")
    if format == "rwkv":
        flat = rwkv.from_ours(architecture, fields, tensors)
        atomic_write(target, lambda temporary: torch.save(flat, temporary))
        return
    if format == "gguf":
        metadata, blocks = gguf_models.from_ours(architecture, fields, tensors)
        atomic_write(target, lambda temporary: gguf.write_gguf(temporary, metadata, blocks))
        return
    if target.exists() and not target.is_dir():
        raise ValueError(f"format {format!r} is a directory, but {target} is a file")
    config: Mapping[str, Any]
    if format == "statewise":
        config, renamed = {"architecture": architecture, "config": fields}, tensors
    elif format == "fla" or architecture == "rwkv4":
        config, renamed = (fla if format == "fla" else rwkv_hf).from_ours(fields, tensors)
    else:
        config, renamed = _MAMBAS[architecture].from_ours(layout, fields, tensors)
    target.mkdir(parents=True, exist_ok=True)
    if format in _PICKLED:
        atomic_write(target / _PICKLED[format], lambda temporary: torch.save(renamed, temporary))
    else:
        files.write_safetensors(target / "model.safetensors", renamed)
    # The configuration comes last: a directory without it is recognised as unfinished.
    atomic_write(target / "config.json", json.dumps(config, indent=2) + "\n")


class _Whole(dict[str, Any]):
    """Fields of a configuration; one that is not there is the caller's mistake, by name."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"the checkpoint has no field {name!r}: what is written needs a whole configuration")
