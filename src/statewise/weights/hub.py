"""``hf://owner/name``: checkpoints out of the Hugging Face hub, through its own client where that is installed.

What is fetched, and nothing else (never code, never a tokenizer):

- ``hf://owner/name/file``: that one file.
- ``hf://owner/name`` of a repository with ``config.json`` and one of the names in :data:`TENSORS`: the configuration
  and the first of those names that is there; with an index, its shards too.
- ``hf://owner/name`` of any other: the one ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.gguf`` at its top.
  Several are refused, and the message lists them.

``hf://owner/name@revision`` takes a branch, a tag or a commit instead of the main branch. The client keeps what it
fetched, and what it has kept is opened when the hub cannot be reached.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from statewise.errors import WeightsError

__all__ = ["TENSORS", "is_address", "local_path"]

_SCHEME = "hf://"
#: The order in which a directory is searched, as ``weights.files`` does.
TENSORS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "model.pth",
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".gguf")
_LISTED = 12  # files in a message

_WORD = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_ADDRESS = re.compile(
    rf"hf://(?P<repository>{_WORD}/{_WORD})(?:@(?P<revision>(?:refs/(?:pr|convert)/)?{_WORD}))?(?:/(?P<file>.+))?"
)


class _Address(NamedTuple):
    text: str
    repository: str
    revision: str | None
    file: str | None


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is meant for the hub. A ``pathlib.Path`` never is."""
    return isinstance(path, str) and path.startswith(_SCHEME)


def local_path(path: str | os.PathLike[str]) -> Path:
    """``path`` as it is when it is local (which needs no client and no network); else fetched, and where it lies.

    Args:
        path: a path, or ``hf://owner/name[@revision][/file]``. A revision with slashes is accepted as ``refs/pr/…`` and
            ``refs/convert/…``.

    Returns:
        A file, or a directory with ``config.json``. It belongs to the client's cache and must not be written to.

    Raises:
        ValueError: an address of another form, or ``huggingface_hub`` is not installed.
        WeightsError: no such repository, revision or file, no access, nothing in it that can be read, or the hub is
            out of reach and the cache has not what is needed.
    """
    if not is_address(path):
        return Path(path)
    address = _parse(str(path))
    try:
        client = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"{address.text}: needs the optional package huggingface_hub: pip install 'statewise[hub]'"
        ) from None
    return _fetch(address, client)


def _parse(text: str) -> _Address:
    found = _ADDRESS.fullmatch(text)
    if found is None or any(twice in f"{found['repository']}@{found['revision']}" for twice in ("..", "--")):
        raise ValueError(f"address {text!r}: accepted is hf://owner/name[@revision][/file]")
    file = found["file"]
    if file is not None:
        parts = file.split("/")
        if "\\" in file or not file.isprintable() or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"address {text!r}: {file!r} is no path within a repository")
        if not file.endswith(_SUFFIXES):
            raise ValueError(f"address {text!r}: a file with {', '.join(_SUFFIXES)} is accepted")
    return _Address(text, found["repository"], found["revision"], file)


def _fetch(address: _Address, client: Any) -> Path:
    where = {"repo_id": address.repository, "revision": address.revision}
    # The client is asked in many versions, over many transports: what it raises is no closed list.
    try:
        # Not `list_repo_files`, which asks six times over half a minute before it says that nobody answers.
        names = [file.rfilename for file in client.model_info(**where).siblings or ()]
    except Exception as error:
        # A file of configuration is all that is sure to be asked for: of a repository without one, nothing is.
        kept = [glob.escape(address.file or "config.json")]
        try:
            folder = Path(client.snapshot_download(**where, allow_patterns=kept, local_files_only=True))
        except Exception:
            raise WeightsError(f"{address.text}: {_reason(error)}") from error
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    wanted = _choose(address, names)
    try:
        folder = Path(client.snapshot_download(**where, allow_patterns=[glob.escape(name) for name in wanted]))
    except Exception as error:
        raise WeightsError(f"{address.text}: {_reason(error)}") from error
    for name in wanted:
        if not (folder / name).is_file():
            raise WeightsError(f"{address.text}: {name} did not arrive")
    return folder if wanted[0] == "config.json" else folder / wanted[0]


def _choose(address: _Address, names: list[str]) -> list[str]:
    """The files to fetch; the first is ``config.json`` for a directory, else the only one."""
    single = sorted(name for name in names if name.endswith(_SUFFIXES) and "/" not in name)
    if address.file is not None:
        if address.file not in names:
            raise WeightsError(f"{address.text}: has no file {address.file}; there are: {_listed(single)}")
        return [address.file]
    if "config.json" in names:
        for name in TENSORS:
            if name in names:
                return ["config.json", name, *_shards(name, names)]
    if len(single) == 1:
        return single
    if single:
        raise WeightsError(f"{address.text}: holds {len(single)} checkpoints; add /FILE, one of: {_listed(single)}")
    raise WeightsError(
        f"{address.text}: holds no checkpoint (looked for config.json with tensors, or {', '.join(_SUFFIXES)})"
    )


def _shards(index: str, names: list[str]) -> list[str]:
    if not index.endswith(".index.json"):
        return []
    stem, suffix = index.removesuffix(".index.json").rsplit(".", 1)
    return sorted(name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name))


def _listed(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _reason(error: Exception) -> str:
    """What went wrong, in one line, by the names that the client gives its errors."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    for kind, told in _REASONS.items():
        if kind in kinds:
            return told
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


_REASONS = {
    "GatedRepoError": "its owner gives access on request only: ask for it, then log in (`hf auth login`)",
    "RepositoryNotFoundError": "no such repository, or a private one and no access (`hf auth login`)",
    "RevisionNotFoundError": "no such revision of this repository",
    "RemoteEntryNotFoundError": "no such file in this repository",
    "OfflineModeIsEnabled": "the client is switched offline (HF_HUB_OFFLINE), and its cache has not what is needed",
    "LocalEntryNotFoundError": "the hub cannot be reached, and the client's cache has not what is needed",
    "ConnectError": "the hub cannot be reached, and the client's cache has not what is needed",
    "ConnectionError": "the hub cannot be reached, and the client's cache has not what is needed",
    "TimeoutException": "the hub does not answer, and the client's cache has not what is needed",
}
