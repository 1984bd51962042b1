"""The training loop.

Legend: a *batch* is what is read at a time, a *step* is one move of the optimiser over ``accumulate`` batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from statewise import models
from statewise.errors import SnapshotError
from statewise.files import atomic_write
from statewise.ops.checks import trusting_values
from statewise.training.compiled import compile_blocks
from statewise.training.config import TrainConfig
from statewise.training.data import Batches, Streams, TokenizedText, Windows, load_tokens
from statewise.training.directory import check_out, hold_run
from statewise.training.display import Display
from statewise.training.feed import Feed
from statewise.training.loss import language_model_loss
from statewise.training.metrics import EventFile, MetricsFile, Record, cut_metrics, read_metrics
from statewise.training.optimizer import build_optimizer, learning_rate_at, set_learning_rate
from statewise.training.plot import draw_curve
from statewise.training.resume import Run, restore_run, save_run
from statewise.training.snapshot import latest_snapshot
from statewise.training.validation import validation_bits

__all__ = ["DivergenceError", "RunResult", "find_device", "stop_signals", "train"]

_SECONDS_BETWEEN_PLOTS = 30.0


class DivergenceError(ValueError):
    """The loss or the gradient is no longer a number; the message names the step and the last good snapshot."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    ``loss`` (nats a token) and ``bits_per_byte`` are those of the last record, ``None`` where nothing was recorded, as
    ``valid_bits_per_byte`` is where nothing was measured. ``seconds`` and ``tokens`` count earlier sittings too.
    ``interrupted``: a signal asked the run to stop; it saved first, and can be resumed.
    """

    out: Path
    snapshot: Path
    step: int
    loss: float | None
    bits_per_byte: float | None
    valid_bits_per_byte: float | None
    tokens: int
    seconds: float
    interrupted: bool


def train(config: TrainConfig, *, progress: Callable[[Mapping[str, Any]], None] | None = None) -> RunResult:
    """Train as ``config`` says, into ``config.out``.

    Everything a run does follows from its configuration and its data; torch's global random state is left as it was.
    SIGINT and SIGTERM end it after the step at hand, with a snapshot (where Python lets handlers be set: in the main
    thread). Killed at any instant, it continues from its newest snapshot with ``resume``, and ends bit for bit as it
    would have unbroken: weights, optimiser, and ``metrics.jsonl`` but for the fields that hold time.

    Args:
        config: what is ``None`` in it follows the family's official recipe.
        progress: called with every record and with ``steps`` and ``eta_seconds`` besides; ``None`` shows a bar on a
            terminal, plain lines off one, on standard error.

    Raises:
        ValueError: a value that is not accepted, a used ``out`` without ``resume``, nothing to resume, another trainer
            at work there, too little data. Nothing is lost.
        DivergenceError: the loss or the gradient became infinite or NaN. The last snapshot stays.
        SnapshotError: a file of the run is damaged, or cannot be written. The last good snapshot stays.
    """
    config = config.resolved()
    out = Path(config.out)
    check_out(out, resume=config.resume)
    device = find_device(config.device)
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else ()),
        contextlib.ExitStack() as stack,
    ):
        torch.manual_seed(config.seed)
        text = _load_text(config, out)
        batches = _order(config, text)
        if not config.resume:
            run = _begin(config, text, device)  # before anything is written: it may refuse the configuration
        stack.enter_context(hold_run(out))
        newest = check_out(out, resume=config.resume)
        if newest is not None:
            run = restore_run(newest, config, text.sha256)
        try:
            if newest is None:
                newest = save_run(run, out, config, text.sha256)
            atomic_write(out / "config.toml", dataclasses.replace(config, resume=False).to_toml())
            cut_metrics(out / "metrics.jsonl", run.step)
            trainer = _Trainer(config, out, text, batches, run, newest, stack)
            interrupted = trainer.run_steps(_display(progress, stack), stack.enter_context(stop_signals()))
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
        config: TrainConfig,
        out: Path,
        text: TokenizedText,
        batches: Batches,
        run: Run,
        snapshot: Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self.config, self.out, self.text, self.batches = config, out, text, batches
        self.run, self.snapshot = run, snapshot
        self.device = torch.device(config.device)
        self.feed = Feed(batches, self.device)
        self.metrics = stack.enter_context(MetricsFile(out / "metrics.jsonl"))
        self.events: EventFile | None = None
        if config.tensorboard:
            self.events = stack.enter_context(contextlib.closing(EventFile(out / "tensorboard", run.step)))
        self.bits_per_nat = len(text.train) / (text.train_bytes * math.log(2))
        self.step_tokens = config.batch_size * config.context * config.accumulate
        self.began = time.perf_counter()
        self.seconds_before = run.seconds
        self.plotted = self.began
        if config.grad_checkpointing:
            run.model.set_grad_checkpointing(True)
        if config.compile:
            compile_blocks(run.model)

    def run_steps(self, show: Callable[[Mapping[str, Any]], None], stopping: Callable[[], bool]) -> bool:
        """Step, record and save until the end or a signal; True for a signal."""
        config, run = self.config, self.run
        run.model.train()
        stepping, steps = 0.0, 0
        while run.step < config.steps and not stopping():
            before = time.perf_counter()
            rate, norm = self.step()
            stepping, steps = stepping + time.perf_counter() - before, steps + 1
            validate = config.eval_every > 0 and (run.step % config.eval_every == 0 or run.step == config.steps)
            if validate or run.step % config.log_every == 0 or run.step == config.steps:
                record = self.record(rate, norm, validate, steps * self.step_tokens / stepping)
                left = (config.steps - run.step) * stepping / steps
                show({**record, "steps": config.steps, "eta_seconds": left})
                stepping, steps = 0.0, 0
            if run.step % config.save_every == 0 or run.step == config.steps:
                self.save()
        interrupted = run.step < config.steps
        if interrupted and self.snapshot.name != f"step-{run.step:08d}":
            self.save()
        self.plot()
        return interrupted

    def step(self) -> tuple[float, float]:
        """One move of the optimiser; (learning rate, norm of the gradient before clipping)."""
        config, run = self.config, self.run
        model, count = run.model, config.accumulate
        assert config.l2wrap is not None
        run.optimizer.zero_grad(set_to_none=True)
        found: list[torch.Tensor] = []
        for index in range(run.step * count, (run.step + 1) * count):
            inputs, targets, fresh = self.feed.take(index)
            before = None if fresh else run.state
            with trusting_values():  # what the text holds was looked at when the run began
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                    logits, state = model(inputs, before)
                loss = language_model_loss(logits, targets, l2wrap=config.l2wrap)
            torch.autograd.backward(loss / count)
            run.state = state.detach() if config.carry_state else None
            found.append(loss.detach())
        found.append(torch.nn.utils.clip_grad_norm_(list(model.parameters()), config.grad_clip or math.inf))
        if run.step + 1 < config.steps:
            self.feed.prepare((run.step + 1) * count)
        # The one wait for the device in a step: until here it was only told what to do.
        *losses, norm = torch.stack(found).tolist()
        loss_mean = sum(losses) / count
        if not (math.isfinite(loss_mean) and math.isfinite(norm)):
            raise DivergenceError(
                f"step {run.step + 1}: the loss is {loss_mean} and the norm of the gradient {norm}; stopped before "
                f"moving the weights; last snapshot: {self.snapshot}; a lower learning_rate may help"
            )
        rate = learning_rate_at(run.step, config)
        set_learning_rate(run.optimizer, rate)
        run.optimizer.step()
        run.step += 1
        run.loss_sum += loss_mean
        run.loss_count += 1
        return rate, norm

    def record(self, rate: float, norm: float, validate: bool, speed: float) -> Record:
        """Write down the steps since the last record."""
        config, run = self.config, self.run
        loss = run.loss_sum / run.loss_count
        run.loss_sum, run.loss_count = 0.0, 0
        record: Record = {
            "step": run.step,
            "loss": loss,
            "bits_per_byte": loss * self.bits_per_nat,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": run.step * self.step_tokens,
            "epoch": self.batches.epoch(run.step * config.accumulate),
        }
        if validate:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                bits = validation_bits(
                    run.model,
                    self.text.valid,
                    rows=config.batch_size,
                    context=config.context,
                    limit=config.eval_tokens,
                )
            record["valid_bits_per_byte"] = bits * len(self.text.valid) / self.text.valid_bytes
        record["tokens_per_second"] = speed
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
        self.snapshot = save_run(self.run, self.out, self.config, self.text.sha256)
        if time.perf_counter() - self.plotted > _SECONDS_BETWEEN_PLOTS:
            self.plot()

    def plot(self) -> None:
        if self.config.plot:
            title = f"{self.config.model}, {self.config.num_layers} blocks of {self.config.width}"
            draw_curve(read_metrics(self.out / "metrics.jsonl"), self.out / "loss.png", title)
            self.plotted = time.perf_counter()

    def result(self, interrupted: bool) -> RunResult:
        records = read_metrics(self.out / "metrics.jsonl")
        valid = [record["valid_bits_per_byte"] for record in records if "valid_bits_per_byte" in record]
        return RunResult(
            out=self.out,
            snapshot=self.snapshot,
            step=self.run.step,
            loss=records[-1]["loss"] if records else None,
            bits_per_byte=records[-1]["bits_per_byte"] if records else None,
            valid_bits_per_byte=valid[-1] if valid else None,
            tokens=self.run.step * self.step_tokens,
            seconds=self.elapsed(),
            interrupted=interrupted,
        )


def find_device(name: str) -> torch.device:
    """The device called ``name``.

    Raises:
        ValueError: this machine has none.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}: {str(error).splitlines()[0]}") from error
    return device


def _load_text(config: TrainConfig, out: Path) -> TokenizedText:
    try:
        text = load_tokens(config, out / "tokens")
    except OSError as error:  # of our cache: what is wrong with a corpus is a ValueError
        raise SnapshotError(f"{error.filename or out}: cannot keep the encoded text: {error.strerror}") from error
    if config.eval_every and len(text.valid) < 2:
        raise ValueError(
            f"the validation split of {config.data!r} has {len(text.valid)} tokens; eval_every 0 does without"
        )
    return text


def _order(config: TrainConfig, text: TokenizedText) -> Batches:
    kind = Streams if config.carry_state else Windows
    return kind(text.train, batch_size=config.batch_size, context=config.context, seed=config.seed)


def _begin(config: TrainConfig, text: TokenizedText, device: torch.device) -> Run:
    fields: dict[str, Any] = {"vocab_size": text.vocab_size, **config.model_fields}
    model = models.create(config.model, num_layers=config.num_layers, width=config.width, **fields).to(device)
    for part in (text.train, text.valid):
        largest = int(part.max()) if len(part) else 0
        if largest >= fields["vocab_size"]:
            raise ValueError(f"vocab_size is {fields['vocab_size']}, but the text holds the id {largest}")
    return Run(model, build_optimizer(model, config))


def _display(
    progress: Callable[[Mapping[str, Any]], None] | None, stack: contextlib.ExitStack
) -> Callable[[Mapping[str, Any]], None]:
    return progress if progress is not None else stack.enter_context(contextlib.closing(Display()))


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """A question that SIGINT or SIGTERM answers with yes; a second one acts as if nobody had asked."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received.is_set
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.set()
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
        yield received.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
