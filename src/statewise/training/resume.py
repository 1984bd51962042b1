"""Everything a run needs to go on as if it had never stopped, into a snapshot and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statewise import models
from statewise.errors import SnapshotError
from statewise.state import ModelState, load_state
from statewise.training.config import RESUMABLE, TrainConfig
from statewise.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from statewise.training.record import FILE as RECORD
from statewise.training.record import check_same_run, read_record, warn_of_other_threads
from statewise.training.snapshot import verify_snapshot, write_snapshot

__all__ = ["Run", "restore_run", "save_run"]


@dataclass
class Run:
    """A run at the end of a step.

    ``loss_sum`` and ``loss_count`` belong to the steps since the last record; ``state`` is the carried one, or ``None``
    where the next batch starts afresh; ``seconds`` counts earlier sittings too.
    """

    model: Any  # a language model of ours: nn.Module with parameter_groups, config, ...
    optimizer: torch.optim.Optimizer
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    state: ModelState | None = None
    seconds: float = 0.0


def save_run(run: Run, out: Path, config: TrainConfig, tokens_sha256: str) -> Path:
    """Write the snapshot of ``run``, which is a checkpoint of its model too; return its directory.

    Raises:
        SnapshotError: it cannot be written; earlier snapshots are as they were.
    """
    from safetensors.torch import save_file

    record = {
        "step": run.step,
        "loss_sum": run.loss_sum,
        "loss_count": run.loss_count,
        "seconds": run.seconds,
        "carries_state": run.state is not None,
        "config": config.to_dict(),
        "tokens_sha256": tokens_sha256,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }

    def fill(directory: Path) -> None:
        models.save(run.model, directory, "statewise")
        slots = optimizer_tensors(run.optimizer, run.model)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in slots.items()}, directory / "optimizer.safetensors"
        )
        save_file(_random_state(torch.device(config.device)), directory / "random.safetensors")
        if run.state is not None:
            run.state.save(directory / "state.safetensors")
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")

    return write_snapshot(out, run.step, fill, keep=config.keep)


def restore_run(path: Path, config: TrainConfig, tokens_sha256: str) -> Run:
    """Check a snapshot from end to end, then put it back; torch's random state too.

    Raises:
        SnapshotError: damaged, or no snapshot of a run; names the file and the reason.
        ValueError: the configuration or the data is not that of the run.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    verify_snapshot(path)
    record = read_record(path, _RECORD)
    check_same_run(path, record, config, RESUMABLE, ("tokens_sha256", tokens_sha256, "text"))
    device = torch.device(config.device)
    model: nn.Module = models.load(path).to(device)
    optimizer = build_optimizer(model, config)
    try:
        restore_optimizer(optimizer, model, load_file(path / "optimizer.safetensors"))
        state = load_state(path / "state.safetensors").to(device) if record["carries_state"] else None
        _set_random_state(load_file(path / "random.safetensors"), device)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise SnapshotError(f"{path}: does not fit its own model: {error}") from error
    warn_of_other_threads(record)
    return Run(
        model, optimizer, record["step"], record["loss_sum"], record["loss_count"], state, float(record["seconds"])
    )


_RECORD = {
    "step": int,
    "loss_sum": float,
    "loss_count": int,
    "seconds": float,
    "carries_state": bool,
    "config": dict,
    "tokens_sha256": str,
    "torch": str,
    "threads": int,
}


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Of all generators a run draws from; a run on the CPU does not wake a GPU."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _set_random_state(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
