"""The training loop of image classifiers.

Legend: a *step* is one move of the optimiser over one batch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from statewise import models
from statewise.errors import SnapshotError
from statewise.files import atomic_write
from statewise.images import ImageSet, Preprocessing, load_images, measure_channels
from statewise.training.directory import check_out, hold_run
from statewise.training.display import Display, duration
from statewise.training.feed import send
from statewise.training.image_config import ImageTrainConfig
from statewise.training.image_data import ImageBatches, step_seed
from statewise.training.image_metrics import Accuracy, draw_confusion, draw_image_curves, measure_accuracy
from statewise.training.image_resume import ImageRun, freeze, restore_image_run, save_image_run
from statewise.training.loop import DivergenceError, find_device, stop_signals
from statewise.training.metrics import EventFile, MetricsFile, Record, cut_metrics, read_metrics
from statewise.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from statewise.training.snapshot import latest_snapshot

__all__ = ["ClassifierResult", "describe_images", "train_classifier"]

_SECONDS_BETWEEN_PLOTS = 30.0


@dataclass(frozen=True)
class ClassifierResult:
    """How a run ended.

    ``loss`` is the last record's, smoothed and mixed targets included; ``test_top1`` and ``test_top5`` are shares, of
    the last measurement; ``None`` where nothing was recorded or measured. ``seconds`` and ``images`` count earlier
    sittings too. ``interrupted``: a signal asked the run to stop; it saved first, and can be resumed.
    """

    out: Path
    snapshot: Path
    step: int
    loss: float | None
    test_loss: float | None
    test_top1: float | None
    test_top5: float | None
    images: int
    seconds: float
    interrupted: bool


def describe_images(report: Mapping[str, Any]) -> str:
    """One line: ``step 20/300 · loss 1.513 · test top-1 63.1 % · 940 images/s · ETA 0:14``."""
    parts = [
        f"step {report['step']}/{report['steps']}",
        f"loss {report['loss']:.3f}",
        f"{report['images_per_second']:,.0f} images/s",
        f"ETA {duration(report['eta_seconds'])}",
    ]
    if report.get("last_top1") is not None:
        parts.insert(2, f"test top-1 {100 * report['last_top1']:.1f} %")
    return " · ".join(parts)


def train_classifier(
    config: ImageTrainConfig, *, progress: Callable[[Mapping[str, Any]], None] | None = None
) -> ClassifierResult:
    """Train a model of images as ``config`` says, into ``config.out``.

    As of :func:`statewise.training.train`: all that happens follows from configuration and data, torch's global random
    state is left as it was, a signal ends the run with a snapshot, and a killed run continues bit for bit. The
    optimiser is AdamW over the model's ``parameter_groups``; the loss is cross-entropy with soft targets.

    Args:
        config: what is ``None`` in it follows the data set.
        progress: called with every record, with ``steps`` and ``eta_seconds`` besides and ``last_top1``, the newest
            measurement or ``None``; ``None`` shows a bar on a terminal, plain lines off one, on standard error.

    Raises:
        ValueError: a value that is not accepted, data that are no labelled images, a used ``out`` without ``resume``,
            nothing to resume, another trainer at work there. Nothing is lost.
        DivergenceError: the loss or the gradient became infinite or NaN. The last snapshot stays.
        SnapshotError: a file of the run is damaged, or cannot be written. The last good snapshot stays.
    """
    out = Path(config.out)
    check_out(out, resume=config.resume)
    device = find_device(config.device)
    data = load_images(config.data)
    config = config.resolved(data.side, mirrored=data.mirrored)
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else ()),
        contextlib.ExitStack() as stack,
    ):
        if not config.resume:
            run = _begin(config, data, device)  # before anything is written: it may refuse the configuration
        stack.enter_context(hold_run(out))
        newest = check_out(out, resume=config.resume)
        if newest is not None:
            run = restore_image_run(newest, config, data.sha256)
        try:
            if newest is None:
                newest = save_image_run(run, out, config, data.sha256)
            atomic_write(out / "config.toml", dataclasses.replace(config, resume=False).to_toml())
            cut_metrics(out / "metrics.jsonl", run.step)
            show = progress or stack.enter_context(contextlib.closing(Display(line=describe_images)))
            trainer = _Trainer(config, out, data, run, newest, stack)
            interrupted = trainer.run_steps(show, stack.enter_context(stop_signals()))
        except OSError as error:
            last = latest_snapshot(out)
            raise SnapshotError(
                f"{error.filename or out}: cannot write: {error.strerror}; last snapshot: {last}"
            ) from error
        return trainer.result(interrupted)


class _Trainer:
    """One sitting of a run; it holds the run's files open."""

    def __init__(
        self,
        config: ImageTrainConfig,
        out: Path,
        data: ImageSet,
        run: ImageRun,
        snapshot: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config, self.out, self.data, self.run, self.snapshot = config, out, data, run, snapshot
        self.device = torch.device(config.device)
        self.batches = ImageBatches(data, config, run.preprocessing)
        self.metrics = stack.enter_context(MetricsFile(out / "metrics.jsonl"))
        self.events: EventFile | None = None
        if config.tensorboard:
            self.events = stack.enter_context(contextlib.closing(EventFile(out / "tensorboard", run.step)))
        self.began = time.perf_counter()
        self.seconds_before = run.seconds
        self.plotted = self.began
        self.last: Accuracy | None = None
        if config.grad_checkpointing:
            run.model.set_grad_checkpointing(True)

    def run_steps(self, show: Callable[[Mapping[str, Any]], None], stopping: Callable[[], bool]) -> bool:
        """Step, record and save until the end or a signal; True for a signal."""
        config, run = self.config, self.run
        run.model.train()
        stepping, steps = 0.0, 0
        while run.step < config.steps and not stopping():
            before = time.perf_counter()
            rate, norm = self.step()
            stepping, steps = stepping + time.perf_counter() - before, steps + 1
            measure = config.eval_every > 0 and (run.step % config.eval_every == 0 or run.step == config.steps)
            if measure or run.step % config.log_every == 0 or run.step == config.steps:
                record = self.record(rate, norm, measure, steps * config.batch_size / stepping)
                left = (config.steps - run.step) * stepping / steps
                top1 = None if self.last is None else self.last.top1
                show({**record, "steps": config.steps, "eta_seconds": left, "last_top1": top1})
                stepping, steps = 0.0, 0
            if run.step % config.save_every == 0 or run.step == config.steps:
                self.save()
        interrupted = run.step < config.steps
        if interrupted and self.snapshot.name != f"step-{run.step:08d}":
            self.save()
        self.plot()
        if config.plot and self.last is not None and not interrupted:
            title = f"{config.model} on {config.data}: top-1 {100 * self.last.top1:.2f} %"
            draw_confusion(self.last.confusion, self.data.classes, self.out / "confusion.png", title)
        return interrupted

    def step(self) -> tuple[float, float]:
        """One move of the optimiser; (learning rate, norm of the gradient before clipping)."""
        config, run = self.config, self.run
        torch.manual_seed(step_seed(config.seed, run.step))
        images, targets = (send(tensor, self.device) for tensor in self.batches.read(run.step))
        run.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = run.model(images)
        loss = F.cross_entropy(logits.float(), targets)
        torch.autograd.backward(loss)
        size = torch.nn.utils.clip_grad_norm_(list(run.model.parameters()), config.grad_clip or math.inf)
        value, norm = torch.stack([loss.detach(), size]).tolist()  # the one wait for the device in a step
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise DivergenceError(
                f"step {run.step + 1}: the loss is {value} and the norm of the gradient {norm}; stopped before "
                f"moving the weights; last snapshot: {self.snapshot}; a lower learning_rate may help"
            )
        rate = learning_rate_at(run.step, config)
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
        run.step += 1
        if run.average is not None:
            follow(run.average, run.model, share_kept(config.ema, run.step))
        run.loss_sum += value
        run.loss_count += 1
        return rate, norm

    def record(self, rate: float, norm: float, measure: bool, speed: float) -> Record:
        """Write down the steps since the last record."""
        config, run = self.config, self.run
        loss = run.loss_sum / run.loss_count
        run.loss_sum, run.loss_count = 0.0, 0
        record: Record = {
            "step": run.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "images": run.step * config.batch_size,
            "epoch": self.batches.epoch(run.step),
        }
        if measure:
            self.last = measure_accuracy(
                run.measured,
                self.data.test,
                run.preprocessing,
                batch_size=config.batch_size,
                device=self.device,
                autocast=config.dtype == "bfloat16",
            )
            record |= {"test_loss": self.last.loss, "test_top1": self.last.top1, "test_top5": self.last.top5}
        record["images_per_second"] = speed
        record["seconds"] = self.elapsed()
        self.metrics.append(record)
        if self.events is not None:
            self.events.append(record)
        return record

    def elapsed(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def save(self) -> None:
        """The metrics first: a snapshot on disk means that all records up to its step are."""
        self.metrics.flush()
        self.run.seconds = self.elapsed()
        self.snapshot = save_image_run(self.run, self.out, self.config, self.data.sha256)
        if time.perf_counter() - self.plotted > _SECONDS_BETWEEN_PLOTS:
            self.plot()

    def plot(self) -> None:
        if self.config.plot:
            title = f"{self.config.model} on {self.config.data}"
            draw_image_curves(read_metrics(self.out / "metrics.jsonl"), self.out / "curves.png", title)
            self.plotted = time.perf_counter()

    def result(self, interrupted: bool) -> ClassifierResult:
        records = read_metrics(self.out / "metrics.jsonl")
        measured = next((record for record in reversed(records) if "test_top1" in record), {})
        return ClassifierResult(
            out=self.out,
            snapshot=self.snapshot,
            step=self.run.step,
            loss=records[-1]["loss"] if records else None,
            test_loss=measured.get("test_loss"),
            test_top1=measured.get("test_top1"),
            test_top5=measured.get("test_top5"),
            images=self.run.step * self.config.batch_size,
            seconds=self.elapsed(),
            interrupted=interrupted,
        )


def share_kept(ema: float, step: int) -> float:
    """What the average keeps of itself at step 1, 2, ...: ``ema``, less while it is younger than it remembers."""
    return min(ema, (1 + step) / (10 + step))


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, kept: float) -> None:
    """``average ← kept · average + (1 - kept) · model``, parameter by parameter."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - kept)


def _begin(config: ImageTrainConfig, data: ImageSet, device: torch.device) -> ImageRun:
    assert config.image_size is not None  # resolved
    torch.manual_seed(config.seed)
    named = {name: getattr(config, name) for name in ("image_size", "patch_size", "num_layers", "width")}
    fields: dict[str, Any] = {
        **{name: value for name, value in named.items() if value is not None},
        **config.model_fields,
        "num_classes": len(data.classes),
        "in_channels": data.channels,
    }
    model: Any = models.create(config.model, **fields).to(device)
    mean, std = measure_channels(data.train, config.image_size)
    preprocessing = Preprocessing(config.image_size, data.channels, mean, std, data.classes)
    average = freeze(copy.deepcopy(model)) if config.ema else None
    return ImageRun(model, average, build_optimizer(model, config), preprocessing)
