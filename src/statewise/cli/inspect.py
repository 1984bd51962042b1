"""``statewise inspect``: what a checkpoint holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from statewise.cli import COMMANDS
from statewise.cli.options import from_arguments

__all__ = ["Options", "main"]

_GENERATIONS = {
    "rwkv4": "RWKV-4",
    "rwkv6": "RWKV-6 (x060)",
    "rwkv7": "RWKV-7 (x070)",
    "mamba": "Mamba-1",
    "mamba2": "Mamba-2",
    "mamba3": "Mamba-3",
    "vrwkv": "Vision-RWKV",
    "vrwkv6": "Vision-RWKV on RWKV-6",
    "vim": "Vision Mamba (Vim)",
}


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    checkpoint: Annotated[str, "a checkpoint file or directory, a run's folder, or hf://owner/name"]
    tensors: Annotated[bool, "list every tensor"] = True
    json: Annotated[bool, "print one JSON document"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise inspect", description=COMMANDS["inspect"])
    report = _report(options.checkpoint)
    from statewise.cli.console import print_json, print_table

    if options.json:
        print_json(report)
        return 0
    facts = [(name, _shown(report[name])) for name in report if name not in ("config", "tensors")]
    print_table(["", options.checkpoint], facts)
    print()
    print_table(["field", "value"], [(name, str(value)) for name, value in report["config"].items()])
    if options.tensors:
        print()
        rows = [
            (entry["name"], " x ".join(map(str, entry["shape"])), entry["dtype"], entry["note"])
            for entry in report["tensors"]
        ]
        print_table(["tensor", "shape", "dtype", "note"], rows)
    return 0


def _report(path: str) -> dict[str, Any]:
    from statewise.cli.checkpoints import locate, survey

    found = survey(locate(path))
    tensors = found.checkpoint.tensors
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    architecture = found.checkpoint.architecture

    def note(name: str) -> str:
        if name in found.misshaped:
            return f"the model expects {' x '.join(map(str, found.misshaped[name]))}"
        return "unknown to the model" if name in found.extra else ""

    return {
        "architecture": architecture,
        "generation": _generation(architecture, found.checkpoint.fields),
        "layout": found.checkpoint.layout,
        "parameters": sum(parameter.numel() for parameter in found.model.parameters()),  # tied ones once
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "dtypes": dict(dtypes),
        "missing": found.missing,
        "extra": found.extra,
        "misshaped": sorted(found.misshaped),
        "config": found.checkpoint.fields,
        "tensors": [
            {
                "name": name,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "note": note(name),
            }
            for name, tensor in tensors.items()
        ],
    }


def _generation(architecture: str, fields: dict[str, Any]) -> str:
    if architecture == "rwkv5":
        return f"RWKV-{fields['version']}"
    if architecture == "rwkv7" and fields["deep_embed"]:
        return "RWKV-7a (x070a, DeepEmbed)"
    return _GENERATIONS[architecture]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} ({count})" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(value) if value else "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
