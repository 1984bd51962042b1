"""Everything a run on images needs to go on as if it had never stopped, into a snapshot and back.

What is random in a step is drawn from the seed and the step's number, so no generator's state is kept.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from statewise import models
from statewise.errors import SnapshotError
from statewise.images import Preprocessing, read_preprocessing
from statewise.images.preprocessing import FILE
from statewise.training.image_config import IMAGE_RESUMABLE, ImageTrainConfig
from statewise.training.optimizer import build_optimizer, optimizer_tensors, restore_optimizer
from statewise.training.record import FILE as RECORD
from statewise.training.record import check_same_run, read_record, warn_of_other_threads
from statewise.training.snapshot import verify_snapshot, write_snapshot

__all__ = ["ImageRun", "freeze", "restore_image_run", "save_image_run"]


@dataclass
class ImageRun:
    """A run at the end of a step.

    ``average`` is the moving average of ``model``'s weights, or ``None``; ``loss_sum`` and ``loss_count`` belong to the
    steps since the last record; ``seconds`` counts earlier sittings too.
    """

    model: Any  # a model of images of ours
    average: Any
    optimizer: torch.optim.Optimizer
    preprocessing: Preprocessing
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0

    @property
    def measured(self) -> Any:
        """The model that is measured and written."""
        return self.model if self.average is None else self.average


def save_image_run(run: ImageRun, out: Path, config: ImageTrainConfig, data_sha256: str) -> Path:
    """Write the snapshot of ``run``, which is a checkpoint of the measured model too; return its directory.

    Raises:
        SnapshotError: it cannot be written; earlier snapshots are as they were.
    """
    from safetensors.torch import save_file

    record = {
        "step": run.step,
        "loss_sum": run.loss_sum,
        "loss_count": run.loss_count,
        "seconds": run.seconds,
        "config": config.to_dict(),
        "data_sha256": data_sha256,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }

    def fill(directory: Path) -> None:
        models.save(run.measured, directory, "statewise")
        slots = optimizer_tensors(run.optimizer, run.model)
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in slots.items()}, directory / "optimizer.safetensors"
        )
        if run.average is not None:
            weights = {name: tensor.cpu().contiguous() for name, tensor in run.model.state_dict().items()}
            save_file(weights, directory / "training.safetensors")
        (directory / FILE).write_text(run.preprocessing.to_json(), "utf-8")
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")

    return write_snapshot(out, run.step, fill, keep=config.keep)


def restore_image_run(path: Path, config: ImageTrainConfig, data_sha256: str) -> ImageRun:
    """Check a snapshot from end to end, then put it back.

    Raises:
        SnapshotError: damaged, or no snapshot of a run on images; names the file and the reason.
        ValueError: the configuration or the data is not that of the run.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    verify_snapshot(path)
    record = read_record(path, _RECORD)
    check_same_run(path, record, config, IMAGE_RESUMABLE, ("data_sha256", data_sha256, "images"))
    device = torch.device(config.device)
    measured: Any = models.load(path)
    try:
        preprocessing = read_preprocessing(path)
        if preprocessing is None:
            raise ValueError(f"{FILE} is missing")
        model, average = measured, None
        if config.ema:
            model, average = copy.deepcopy(measured), measured
            model.load_state_dict(load_file(path / "training.safetensors"), strict=True)
            average = freeze(average.to(device))
        model = model.to(device)
        optimizer = build_optimizer(model, config)
        restore_optimizer(optimizer, model, load_file(path / "optimizer.safetensors"))
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise SnapshotError(f"{path}: does not fit its own model: {error}") from error
    warn_of_other_threads(record)
    return ImageRun(
        model,
        average,
        optimizer,
        preprocessing,
        record["step"],
        record["loss_sum"],
        record["loss_count"],
        record["seconds"],
    )


def freeze(average: Any) -> Any:
    """A model that no optimiser moves."""
    for parameter in average.parameters():
        parameter.requires_grad_(False)
    return average.eval()


_RECORD = {
    "step": int,
    "loss_sum": float,
    "loss_count": int,
    "seconds": float,
    "config": dict,
    "data_sha256": str,
    "threads": int,
}
