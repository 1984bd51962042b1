"""``statewise verify``: does a model keep the promise of equal forms?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from statewise.cli import COMMANDS
from statewise.cli.options import Dtype, from_arguments

if TYPE_CHECKING:
    import torch

    from statewise.inference import LawResult

__all__ = ["Options", "main", "print_laws"]

# Sizes of a model that is given by name: several chunks of every parallel form, seconds to run.
_FRESH = {"vocab_size": 256, "num_layers": 3, "width": 128}
_FRESH_IMAGES = {"image_size": 64, "num_classes": 10, "num_layers": 3}


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    model: Annotated[str, "a checkpoint, a run's folder, hf://owner/name, or a model's name (a small one, at random)"]
    device: Annotated[str, "where to run"] = "cpu"
    dtype: Annotated[Dtype, "precision, and with it the bounds"] = "float64"
    length: Annotated[int, "tokens in a row, where it reads text"] = 83
    seed: Annotated[int, "fixes tokens or images, cuts and a fresh model's values"] = 0
    json: Annotated[bool, "print one JSON document"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; exit code 1 when a law fails. See :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise verify", description=COMMANDS["verify"])
    from statewise.cli.checkpoints import DTYPES, find_device
    from statewise.cli.console import print_json, progress
    from statewise.inference import verify, verify_images

    device, dtype = find_device(options.device), DTYPES[options.dtype]
    model = _find(options, device, dtype)
    reads_text = hasattr(model.config, "vocab_size")
    with progress(11 if reads_text else 8, f"verify {options.model}") as bar:
        seen: list[str] = []

        def tell(law: str) -> None:
            bar(len(seen), law)
            seen.append(law)

        if reads_text:
            results = verify(model, length=options.length, seed=options.seed, progress=tell)
        else:
            results = verify_images(model, seed=options.seed, progress=tell)
    passed = all(result.ok for result in results)
    if options.json:
        laws = [{**result._asdict(), "ok": result.ok} for result in results]
        print_json({"model": options.model, "dtype": options.dtype, "ok": passed, "laws": laws})
    else:
        print_laws(results, f"{options.model}, {options.dtype} on {options.device}")
    return 0 if passed else 1


def _find(options: Options, device: torch.device, dtype: torch.dtype) -> Any:
    """The checkpoint meant, or a small model of the architecture meant."""
    import torch

    from statewise.cli.checkpoints import locate
    from statewise.inference import stir
    from statewise.models import create, list_models, load
    from statewise.weights.hub import is_address

    model: Any
    if options.model in list_models():
        torch.manual_seed(options.seed)
        sizes = _FRESH if options.model in list_models("language") else _FRESH_IMAGES
        model = create(options.model, **sizes).to(device=device, dtype=dtype)
        stir(model, seed=options.seed)
        return model
    if not (is_address(options.model) or Path(options.model).exists()):
        raise ValueError(
            f"{options.model!r} is neither a checkpoint nor the name of a model; names are {', '.join(list_models())}"
        )
    model = load(locate(options.model), dtype=dtype).to(device)
    return model


def print_laws(results: Sequence[LawResult], title: str) -> None:
    """One row a law: the largest relative difference met, what is allowed, and whether it holds."""
    from statewise.cli.console import print_table

    rows = [
        (result.law, f"{result.difference:.1e}", f"{result.bound:.0e}", "ok" if result.ok else "FAILS")
        for result in results
    ]
    print_table(["law", "largest difference", "bound", ""], rows, title=title)
